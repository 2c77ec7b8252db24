"""Answers of texts and pictures to a file of prompts: their form. Whether they are good, people say (`chameleon study`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chameleon.document import Document, Image, Text, from_json
from chameleon.errors import BadInput, check_seed
from chameleon.evaluation.part import EvaluatedModel, Item, Output, Part, Scores
from chameleon.evaluation.statistics import Metric, Term
from chameleon.evaluation.suite import existing_file, fingerprint_of, parse_json_line, read_lines
from chameleon.generation.chameleon import GUIDANCE_SCALE
from chameleon.generation.sampling import IMAGE_SAMPLING, TEXT_SAMPLING, Sampling
from chameleon.tokenizers.mixed import Content

FORMS = ("text", "images", "mixed", "any")


@dataclass
class MixedSuite:
    """Settings of prompts whose answers are documents."""

    prompts: str
    """JSON lines: `prompt` (a text, a document or a conversation), and if you like `id`, `category`, `form`."""
    max_new_tokens: int = 1024
    max_images: int = 4
    guidance_scale: float = GUIDANCE_SCALE
    text_temperature: float = TEXT_SAMPLING.temperature
    text_top_p: float = TEXT_SAMPLING.top_p
    repetition_penalty: float = TEXT_SAMPLING.repetition_penalty
    image_temperature: float = IMAGE_SAMPLING.temperature
    image_top_p: float = IMAGE_SAMPLING.top_p
    seed: int = 0
    batch_size: int = 16

    def build_parts(self) -> list[Part]:
        check_seed(self.seed)
        return [MixedDocuments(self)]

    def fingerprints(self) -> dict[str, str]:
        return {"prompts": fingerprint_of([existing_file(self.prompts, "a file of prompts")])}


@dataclass(frozen=True)
class OpenPrompt:
    """A prompt for an open answer."""

    key: str
    content: Content
    category: str = ""
    form: str = "any"
    """What the answer is to consist of: text, images, mixed (both) or any."""


def read_open_prompts(path: str) -> list[OpenPrompt]:
    """Return the prompts of a JSON lines file. Raise `BadInput` that names the line."""
    result = []
    folder = existing_file(path, "a file of prompts").parent
    for number, (where, line) in enumerate(read_lines(path, "a file of prompts"), start=1):
        entry = parse_json_line(line, where)
        if "prompt" not in entry:
            raise BadInput("no prompt", where=where, remedy='write {"prompt": "…", "category": "…"}')
        prompt = entry["prompt"]
        content = Document((Text(prompt),)) if isinstance(prompt, str) else from_json(prompt, where=where, folder=folder)
        form = entry.get("form", "any")
        if form not in FORMS:
            raise BadInput(f"form is {form!r}", where=where, remedy=f"use {', '.join(FORMS)}")
        result.append(OpenPrompt(str(entry.get("id", number)), content, str(entry.get("category", "")), form))
    return result


class MixedDocuments:
    """One answer to each prompt."""

    name = "answers"

    def __init__(self, suite: MixedSuite) -> None:
        self.suite, self.batch_size = suite, suite.batch_size
        self.prompts = read_open_prompts(suite.prompts)
        self.method: dict[str, Any] = {}

    def items(self) -> list[Item]:
        return [
            Item(prompt.key, readable_prompt(prompt.content), category=prompt.category, data=prompt)
            for prompt in self.prompts
        ]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        suite, start = self.suite, self.suite.seed + first
        return model.generate_batch(
            [item.data.content for item in items],
            max_new_tokens=suite.max_new_tokens,
            max_images=suite.max_images,
            guidance_scale=suite.guidance_scale,
            text_sampling=Sampling(suite.text_temperature, suite.text_top_p, 0, suite.repetition_penalty),
            image_sampling=Sampling(suite.image_temperature, suite.image_top_p),
            seeds=range(start, start + len(items)),
        )

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        rows: list[dict[str, Term]] = []
        for item, answer in zip(items, outputs, strict=True):
            row: dict[str, Term] = {"complete": float(answer.complete), "images": float(len(answer.images))}
            row["words"] = float(len(answer.text.split()))
            if item.data.form != "any":
                row["right_form"] = float(form_of(answer) == item.data.form)
            rows.append(row)
        metrics = {"complete": Metric(), "images": Metric(is_share=False), "words": Metric(is_share=False)}
        if any("right_form" in row for row in rows):
            metrics["right_form"] = Metric()
        return Scores(rows, metrics)


def readable_prompt(content: Content) -> Document:
    """Return a conversation's messages as one document."""
    if isinstance(content, Document):
        return content
    return Document(tuple(part for message in content.messages for part in message.content.parts))


def form_of(answer: Document) -> str:
    """Return whether an answer is text, images, mixed, or empty."""
    has_text = bool(answer.text.strip())
    has_images = any(isinstance(part, Image) for part in answer.parts)
    return "mixed" if has_text and has_images else "images" if has_images else "text" if has_text else "empty"
