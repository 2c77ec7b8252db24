"""What a suite is made of: parts, each a list of items that a model answers and whose answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image as PILImage

from chameleon.document import Document
from chameleon.evaluation.statistics import Figure, Metric, Term, figure_of
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import PartKind
from chameleon.generation.prompting import Example, GuidanceScale
from chameleon.generation.sampling import Sampling
from chameleon.tokenizers.image import ImageTokenizer
from chameleon.tokenizers.mixed import Content

Output = Any
"""What a model gives for an item: text, numbers, pictures, documents, and lists and dictionaries of them."""


class EvaluatedModel(Protocol):
    """What suites ask of a model: `LocalModel`, or a server (`chameleon.evaluation.server_model`)."""

    @property
    def is_here(self) -> bool:
        """Whether `local` returns the model."""
        ...

    def generate_texts(
        self,
        prompts: Sequence[Document],
        examples: Sequence[Example],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        views: int = 1,
    ) -> list[str]: ...

    def draw_batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        guidance_scale: float,
        sampling: Sampling,
    ) -> list[PILImage.Image]: ...

    def generate_batch(
        self,
        contents: Sequence[Content],
        *,
        max_new_tokens: int,
        max_images: int | None,
        guidance_scale: GuidanceScale | None,
        text_sampling: Sampling,
        image_sampling: Sampling,
        format: Sequence[PartKind] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Document]: ...

    def local(self, purpose: str) -> Chameleon:
        """Return the model itself. Raise `BadInput` where it is on a server: `purpose` needs it here."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what identifies the model: its bundle's fingerprint, dtype, weight format, device."""
        ...


class LocalModel:
    """A model that is loaded here."""

    is_here = True

    def __init__(self, model: Chameleon) -> None:
        self.model = model
        self.generate_texts = model.generate_texts
        self.draw_batch = model.draw_batch
        self.generate_batch = model.generate_batch

    def local(self, purpose: str) -> Chameleon:
        return self.model

    def describe(self) -> dict[str, Any]:
        engine = self.model.engine
        return {
            "bundle": self.model.bundle.fingerprint,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "weight_format": engine.decoder.weight_format,
            "device": engine.device.type,
            "exact": engine.is_exact,
        }


def image_tokenizer(model: EvaluatedModel) -> ImageTokenizer:
    return model.local("reconstruction").tokenizer.image


@dataclass(frozen=True)
class Item:
    """One question to the model."""

    key: str
    """Names the item among those of its part."""
    prompt: Any = None
    """What the model is given, for people to read: a document, text or picture."""
    expected: Any = None
    """The right answer or answers, if there are any."""
    group: str | None = None
    """Items of one group, such as the questions about a picture, are resampled together."""
    category: str = ""
    """Kind of the item, by which people's judgements are reported."""
    data: Any = None
    """What running and scoring need beside."""


@dataclass
class Scores:
    """What the outputs of a part are worth."""

    of_items: list[dict[str, Term]]
    """For each item its terms of the metrics that apply to it."""
    metrics: dict[str, Metric]
    figures: dict[str, Figure] = field(default_factory=dict)
    """Figures of the whole set, which are no function of sums over items."""
    items: list[Item] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    """Where an item of the part stands for many samples, as a task of a harness does: the samples."""

    def all_figures(self, items: Sequence[Item]) -> dict[str, Figure]:
        """Return the figures of all metrics, with their intervals."""
        result, items = {}, self.items or items
        for name, metric in self.metrics.items():
            chosen = [(item, terms[name]) for item, terms in zip(items, self.of_items, strict=True) if name in terms]
            if chosen:
                groups = None
                if any(item.group is not None for item, _ in chosen):
                    groups = [item.group or item.key for item, _ in chosen]
                result[name] = figure_of(metric, [terms for _, terms in chosen], groups)
        return result | self.figures


def answer_items(
    model: EvaluatedModel, items: Sequence[Item], first: int, examples: Sequence[Example], settings: Any
) -> list[Output]:
    """Return texts after the prompts of items, with a suite's max_new_tokens, temperature, top_p and seed."""
    sampling, start = Sampling(settings.temperature, settings.top_p), settings.seed + first
    seeds = range(start, start + len(items))
    return model.generate_texts([item.prompt for item in items], examples, settings.max_new_tokens, sampling, seeds)


def draw_items(model: EvaluatedModel, items: Sequence[Item], first: int, settings: Any) -> list[Output]:
    """Return drawings of the prompts of items, with a suite's guidance_scale, temperature, top_p and seed.

    Seeds are counted on, so that a prompt that is repeated gives different drawings.
    """
    return model.draw_batch(
        [item.prompt for item in items],
        seeds=range(settings.seed + first, settings.seed + first + len(items)),
        guidance_scale=settings.guidance_scale,
        sampling=Sampling(settings.temperature, settings.top_p),
    )


class Part(Protocol):
    """A part of a suite. Items, and the outputs of a batch of them, are functions of the suite and the model alone."""

    name: str
    batch_size: int
    """Items of a batch; it does not depend on the number of devices."""

    def items(self) -> Sequence[Item]:
        """Return all items, in order."""
        ...

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        """Return the model's outputs for a batch of items, the first of which has index `first` in the part."""
        ...

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        """Score all outputs."""
        ...
