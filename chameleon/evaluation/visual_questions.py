"""Questions about the user's pictures, as VQAv2, OK-VQA and VizWiz are evaluated (arXiv 2405.09818, section 5.2)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput, check_seed
from chameleon.evaluation.captioning import choose
from chameleon.evaluation.coco import AskedImage, commonest_answer, read_questions
from chameleon.evaluation.part import EvaluatedModel, Item, Output, Part, Scores, answer_items
from chameleon.evaluation.statistics import Metric, Term
from chameleon.evaluation.suite import existing_file, existing_folder, file_fingerprints, listing_fingerprint
from chameleon.evaluation.vqa_accuracy import normalise, vqa_accuracy
from chameleon.generation.prompting import Example


@dataclass
class QuestionSuite:
    """Settings of a set of questions about pictures."""

    questions: str
    """VQA's file of questions, or VizWiz's file of both."""
    images: str
    annotations: str = ""
    """VQA's file of answers; empty for VizWiz, whose questions have them."""
    shots: int = 0
    example_questions: str = ""
    """Where examples come from, such as the training set; needed for shots."""
    example_annotations: str = ""
    example_images: str = ""
    prompt: str = "{question}"
    """Text after each picture."""
    max_new_tokens: int = 10
    temperature: float = 0.0
    top_p: float = 1.0
    limit: int = 0
    """Questions, chosen by `seed`; 0 is all."""
    seed: int = 0
    batch_size: int = 64

    def build_parts(self) -> list[Part]:
        check_seed(self.seed)
        existing_file(self.questions, "the file of questions")
        existing_folder(self.images, "the folder of the images")
        if "{question}" not in self.prompt:
            raise BadInput(f"{self.prompt!r} has no {{question}}", where="prompt")
        return [VisualQuestions(self)]

    @cached_property
    def entries(self) -> list[AskedImage]:
        """The questions that are asked."""
        return choose(read_questions(self.questions, self.annotations, self.images), self.limit, self.seed)

    def fingerprints(self) -> dict[str, str]:
        files = {"questions": self.questions, "annotations": self.annotations}
        files |= {"example_questions": self.example_questions, "example_annotations": self.example_annotations}
        return file_fingerprints(files) | {"images": listing_fingerprint(entry.path for entry in self.entries)}


class VisualQuestions:
    """One answer to each question, against those of people."""

    name = "questions"

    def __init__(self, suite: QuestionSuite) -> None:
        self.suite, self.batch_size = suite, suite.batch_size
        self.entries = suite.entries
        self.examples, self.method = self.choose_examples()

    def choose_examples(self) -> tuple[list[Example], dict[str, Any]]:
        """Return the few-shot examples, none about an evaluated picture, and what a scorecard says of them."""
        suite = self.suite
        if not suite.shots:
            return [], {}
        if not suite.example_questions:
            raise BadInput("shots need example_questions", where="questions", remedy="give the files of the training set")
        evaluated = {entry.path.resolve() for entry in self.entries}
        pool = [
            entry
            for entry in read_questions(
                suite.example_questions, suite.example_annotations, suite.example_images or suite.images
            )
            if entry.answers and entry.path.resolve() not in evaluated
        ]
        if len(pool) < suite.shots:
            raise BadInput(f"{len(pool)} examples, shots is {suite.shots}", where=suite.example_questions)
        chosen = random.Random(f"{suite.seed} examples").sample(pool, suite.shots)
        answered = [(entry, commonest_answer(entry.answers)) for entry in chosen]
        shown = [{"key": entry.key, "question": entry.question, "answer": answer} for entry, answer in answered]
        return [(self.prompt_of(entry), answer) for entry, answer in answered], {"examples": shown}

    def prompt_of(self, entry: AskedImage) -> Document:
        return Document((Image(entry.path), Text(self.suite.prompt.replace("{question}", entry.question))))

    def items(self) -> list[Item]:
        return [
            Item(entry.key, self.prompt_of(entry), list(entry.answers), group=entry.path.name, data=entry.answer_type)
            for entry in self.entries
        ]

    def run(self, model: EvaluatedModel, items: Sequence[Item], first: int) -> list[Output]:
        return answer_items(model, items, first, self.examples, self.suite)

    def score(self, model: EvaluatedModel, items: Sequence[Item], outputs: Sequence[Output]) -> Scores:
        """Return the accuracy, in all and by type of answer; exact match with the commonest answer beside it.

        The base rate is that of the answer that is commonest over all questions.
        """
        answered = [item for item in items if item.expected]
        if not answered:
            return Scores([{} for _ in items], {})  # a test set, whose answers are not published
        common = Counter(normalise(commonest_answer(item.expected)) for item in answered).most_common(1)[0][0]
        base_rate = sum(vqa_accuracy(common, item.expected) for item in answered) / len(answered)
        rows: list[dict[str, Term]] = []
        for item, output in zip(items, outputs, strict=True):
            row: dict[str, Term] = {}
            if item.expected:
                row["accuracy"] = vqa_accuracy(output, item.expected)
                row["exact_match"] = float(normalise(output) == normalise(commonest_answer(item.expected)))
                if item.data:
                    row[f"accuracy, {item.data}"] = row["accuracy"]
            rows.append(row)
        names = sorted({name for row in rows for name in row if "," in name})
        metrics = {"accuracy": Metric(base_rate=base_rate), "exact_match": Metric(), **{name: Metric() for name in names}}
        return Scores(rows, metrics)
