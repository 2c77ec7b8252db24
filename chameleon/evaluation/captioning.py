"""Captions of the user's pictures, as COCO and Flickr30k are evaluated (arXiv 2405.09818, section 5.2)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from chameleon.document import Document, Image, Part, Text
from chameleon.errors import BadInput, check_seed
from chameleon.evaluation.caption_metrics import CiderD, bleu_terms, has_java, meteor, rouge_l
from chameleon.evaluation.caption_words import WordSplitter, caption_words
from chameleon.evaluation.coco import CaptionedImage, has_splits, read_captions
from chameleon.evaluation.part import EvaluatedModel, Item, Output, Scores, answer_items
from chameleon.evaluation.part import Part as SuitePart
from chameleon.evaluation.statistics import BLEU_ORDERS, Figure, Metric, Term, figure_of
from chameleon.evaluation.suite import existing_file, existing_folder, file_fingerprints, listing_fingerprint
from chameleon.generation.prompting import Example


@dataclass
class CaptionSuite:
    """Settings of a set of captions."""

    annotations: str
    """COCO's annotation file, or Karpathy's split file."""
    images: str
    """Folder with the images, or with the folders that the split file names."""
    split: str | None = None
    """Of Karpathy's file: test, val, train or restval."""
    shots: int = 0
    """Examples before each picture."""
    example_annotations: str = ""
    """Where examples come from; by default the split `train` of `annotations`."""
    example_images: str = ""
    example_split: str | None = None
    """By default `train` of a file that has splits."""
    prompt: str = ""
    """Text after each picture."""
    max_new_tokens: int = 30
    temperature: float = 0.0
    top_p: float = 1.0
    words: WordSplitter = "auto"
    """How captions become words for the metrics: java (coco-caption's PTB tokenizer), python, or java where it is there."""
    meteor: bool | None = None
    """METEOR, which needs Java; by default where Java and pycocoevalcap are there."""
    limit: int = 0
    """Pictures, chosen by `seed`; 0 is all."""
    seed: int = 0
    batch_size: int = 64

    def build_parts(self) -> list[SuitePart]:
        check_seed(self.seed)
        existing_file(self.annotations, "the annotation file")
        existing_folder(self.images, "the folder of the images")
        if (self.words == "java" or self.meteor) and not has_java():
            raise BadInput("words=java and meteor=true need Java and pycocoevalcap", where="captions")
        return [Captioning(self)]

    @cached_property
    def entries(self) -> list[CaptionedImage]:
        """The pictures that are captioned."""
        return choose(read_captions(self.annotations, self.images, self.split), self.limit, self.seed)

    def fingerprints(self) -> dict[str, str]:
        files = {"annotations": self.annotations, "example_annotations": self.example_annotations}
        return file_fingerprints(files) | {"images": listing_fingerprint(entry.path for entry in self.entries)}


def choose(entries: Sequence[Any], limit: int, seed: int) -> list[Any]:
    """Return `limit` entries in their order, chosen by a seed; 0 is all."""
    if not limit or limit >= len(entries):
        return list(entries)
    chosen = set(random.Random(f"{seed} limit").sample(range(len(entries)), limit))
    return [entry for index, entry in enumerate(entries) if index in chosen]


class Captioning:
    """One caption for each picture, against its references."""

    name = "captions"

    def __init__(self, suite: CaptionSuite) -> None:
        self.suite, self.batch_size = suite, suite.batch_size
        self.entries = suite.entries
        self.examples, self.method = self.choose_examples()

    def choose_examples(self) -> tuple[list[Example], dict[str, Any]]:
        """Return the few-shot examples, none of which is evaluated, and what a scorecard says of them."""
        suite = self.suite
        if not suite.shots:
            return [], {}
        source = suite.example_annotations or suite.annotations
        split = suite.example_split or ("train" if has_splits(source) else None)
        entries = read_captions(source, suite.example_images or suite.images, split)
        evaluated = {entry.path.resolve() for entry in self.entries}
        pool = [entry for entry in entries if entry.path.resolve() not in evaluated]
        if len(pool) < suite.shots:
            raise BadInput(f"{len(pool)} examples, shots is {suite.shots}", where=source, remedy="give example_annotations")
        rng = random.Random(f"{suite.seed} examples")
        chosen = [(entry, rng.choice(entry.captions)) for entry in rng.sample(pool, suite.shots)]
        shown = [{"key": entry.key, "caption": caption} for entry, caption in chosen]
        return [(self.prompt_of(entry.path), caption) for entry, caption in chosen], {"examples": shown}

    def prompt_of(self, path: Path) -> Document:
        parts: list[Part] = [Image(path)]
        return Document((*parts, Text(self.suite.prompt)) if self.suite.prompt else tuple(parts))

    def items(self) -> list[Item]:
        return [Item(entry.key, self.prompt_of(entry.path), list(entry.captions)) for entry in self.entries]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        return answer_items(model, items, first, self.examples, self.suite)

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        references, splitter = caption_words([item.expected for item in items], self.suite.words)
        captions = [of[0] for of in caption_words([[output] for output in outputs], self.suite.words)[0]]
        self.method["words"] = splitter
        return score_captions(captions, references, self.suite.meteor)


def score_captions(
    captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]], with_meteor: bool | None
) -> Scores:
    """Return CIDEr-D, BLEU-1 to -4, ROUGE-L and METEOR of captions that are words already."""
    cider = CiderD(references)
    rows: list[dict[str, Term]] = []
    for index, (caption, known) in enumerate(zip(captions, references, strict=True)):
        bleu = bleu_terms(caption, known)
        row: dict[str, Term] = {"cider_d": cider.score(caption, index), "rouge_l": rouge_l(caption, known)}
        rows.append(row | {f"bleu_{order}": bleu for order in range(1, BLEU_ORDERS + 1)})
    metrics = {"cider_d": Metric(is_share=False), **{f"bleu_{n}": Metric(f"bleu-{n}") for n in range(1, BLEU_ORDERS + 1)}}
    metrics["rouge_l"] = Metric(is_share=False)
    figures = {}
    if has_java() if with_meteor is None else with_meteor:
        value, values = meteor(captions, references)
        of_mean = figure_of(
            Metric(is_share=False), values
        )  # METEOR of a set is nearly the mean, whose spread stands for its own
        shift = value - of_mean.value
        low, high = (None if bound is None else bound + shift for bound in (of_mean.low, of_mean.high))
        figures["meteor"] = Figure(value, low, high, len(values))
    return Scores(rows, metrics, figures)
