"""The evaluation suite on the embedded set: reconstruction, captions, questions, drawings, mixed documents, likelihood."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from math import sqrt
from statistics import NormalDist
from typing import Any

from chameleon.data import emoji, labelled
from chameleon.data.labelled import LabelledPicture
from chameleon.data.questions import NAME_QUESTIONS, Question, questions_about
from chameleon.errors import BadInput, check_seed
from chameleon.evaluation.captions import cider_d, exact_match, words
from chameleon.evaluation.drawings import (
    BATCH_SIZE,
    DrawingJudge,
    DrawingSettings,
    Progress,
    colour_accuracy,
    drawing_accuracy,
    no_progress,
    unseen_accuracy,
    variety,
)
from chameleon.evaluation.likelihood import bits_per_byte
from chameleon.evaluation.mixed import mixed_accuracy
from chameleon.evaluation.pictures import reconstruction
from chameleon.generation.chameleon import GUIDANCE_SCALE, Chameleon
from chameleon.generation.sampling import IMAGE_SAMPLING, Sampling

NAMED_LANGUAGES = ("de", "es", "fr", "ja", "zh")
"""Languages in which names are asked for."""
NORMAL_QUANTILE = NormalDist().inv_cdf(0.975)
"""Of the standard normal distribution, for intervals of 95%."""


def interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` independent trials (Wilson, 1927)."""
    z2 = NORMAL_QUANTILE**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_QUANTILE * sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


class Suite:
    """The parts of the suite for one model. Each is a method that returns its metrics."""

    def __init__(self, model: Chameleon, concepts: int | None, num_drawings: int, settings: DrawingSettings) -> None:
        self.model, self.num_drawings, self.settings = model, num_drawings, settings
        self.training_set, self.held_out = (emoji.subset(split, concepts) for split in ("train", "validation"))
        if not self.held_out:
            raise BadInput(f"no style is held out of {concepts} concepts", where="evaluate", remedy="use more")
        self.shown = labelled.representatives(self.held_out, settings.seed)

    @cached_property
    def judge(self) -> DrawingJudge:
        return DrawingJudge(self.training_set, self.held_out, self.model.engine.device)

    def reconstruction(self) -> dict[str, Any]:
        tokenizer = self.model.tokenizer.image
        return reconstruction(tokenizer, [entry.picture for entry in self.held_out])

    def recognition(self) -> dict[str, Any]:
        tokenizer, pictures = self.model.tokenizer.image, [entry.picture for entry in self.shown]
        names = [entry.caption for entry in self.shown]
        return self.judge.judge(tokenizer.decode(tokenizer.encode(pictures)), names)

    def captions(self) -> dict[str, Any]:
        return captions(self.model, self.shown, self.settings.progress)

    def languages(self) -> dict[str, Any]:
        return name_accuracy(self.model, self.shown, self.settings.progress)

    def questions(self) -> dict[str, Any]:
        return question_accuracy(self.model, self.held_out, self.settings.seed, self.settings.progress)

    def drawings(self) -> dict[str, Any]:
        return drawing_accuracy(self.model, self.judge, self.num_drawings, self.settings, self.settings.seed)

    def unseen(self) -> dict[str, Any]:
        return unseen_accuracy(self.model, self.judge, self.settings)

    def colours(self) -> dict[str, Any]:
        return colour_accuracy(self.model, self.judge, self.settings)

    def variety(self) -> dict[str, Any]:
        return variety(self.model, self.judge, self.settings)

    def mixed(self) -> dict[str, Any]:
        return mixed_accuracy(self.model, self.judge, self.settings)

    def likelihood(self) -> dict[str, Any]:
        return {
            "text_bits_per_byte": bits_per_byte(self.model, emoji.words("validation")),
            "code_bits_per_byte": bits_per_byte(self.model, emoji.code("validation")),
        }


PARTS: dict[str, Callable[[Suite], dict[str, Any]]] = {
    "reconstruction": Suite.reconstruction,
    "captions": Suite.captions,
    "questions": Suite.questions,
    "drawings": Suite.drawings,
    "likelihood": Suite.likelihood,
    "recognition": Suite.recognition,
    "languages": Suite.languages,
    "unseen": Suite.unseen,
    "colours": Suite.colours,
    "variety": Suite.variety,
    "mixed": Suite.mixed,
}
QUICK_PARTS = ("reconstruction", "captions", "questions", "drawings", "likelihood")
"""Parts that take minutes on a CPU."""


def evaluate(
    model: Chameleon,
    *,
    concepts: int | None = None,
    drawings: int = 200,
    seed: int = 0,
    parts: Sequence[str] = QUICK_PARTS,
    guidance_scale: float = GUIDANCE_SCALE,
    sampling: Sampling = IMAGE_SAMPLING,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return all metrics of the suite, as nested dictionaries.

    concepts: evaluate on a subset of so many concepts. drawings: number of drawings. parts: of `PARTS`. guidance_scale and
    sampling: of drawings.
    """
    check_seed(seed)
    suite = Suite(model, concepts, drawings, DrawingSettings(seed, guidance_scale, sampling, progress))
    result: dict[str, Any] = {}
    for part in parts:
        if part == "likelihood":
            result |= suite.likelihood()
        elif part != "drawings" or drawings:
            result[part] = PARTS[part](suite)
    return result


def captions(model: Chameleon, held_out: Sequence[LabelledPicture], progress: Progress = no_progress) -> dict[str, float]:
    """Evaluate greedy captions of the pictures against their names and tags."""
    generated: list[str] = []
    for start in range(0, len(held_out), BATCH_SIZE):
        generated += model.caption_batch([entry.picture for entry in held_out[start : start + BATCH_SIZE]])
        progress("captions", len(generated), len(held_out))
    references = [[entry.caption, " ".join(entry.tags)] for entry in held_out]
    return {
        "pictures": len(held_out),
        "exact_name": exact_match(generated, [entry.caption for entry in held_out]),
        "commonest_name": Counter(entry.caption for entry in held_out).most_common(1)[0][1] / len(held_out),
        "cider_d": cider_d(generated, references),
    }


def name_accuracy(
    model: Chameleon, held_out: Sequence[LabelledPicture], progress: Progress = no_progress
) -> dict[str, dict[str, float]]:
    """Return for each of `NAMED_LANGUAGES` how often the name is given exactly when it is asked for in that language."""
    names, result = emoji.names_in_languages(), {}
    for language in NAMED_LANGUAGES:
        asked = [entry for entry in held_out if language in names.get(entry.base, {})]
        answers: list[str] = []
        for start in range(0, len(asked), BATCH_SIZE):
            batch = asked[start : start + BATCH_SIZE]
            answers += model.answer_batch([(entry.picture, NAME_QUESTIONS[language]) for entry in batch])
            progress(f"names ({language})", len(answers), len(asked))
        expected = [names[entry.base][language] for entry in asked]
        result[language] = {"asked": len(asked), "exact_name": exact_match(answers, expected)}
    return result


def suite_questions(held_out: Sequence[LabelledPicture], seed: int) -> list[tuple[LabelledPicture, Question]]:
    """Return the questions of the suite: about one picture of each concept; about skin tone, one of each tone.

    Of yes-no questions as many are asked whose answer is yes as whose answer is no.
    """
    pairs: list[tuple[LabelledPicture, Question]] = []
    yes_no: dict[str, dict[str, list[tuple[LabelledPicture, Question]]]] = {}
    for entry in labelled.representatives(held_out, seed):
        for question in questions_about(entry):
            if question.family.endswith("yes-no"):
                yes_no.setdefault(question.family, {}).setdefault(question.answer, []).append((entry, question))
            elif question.family != "skin tone":
                pairs.append((entry, question))
    for family, by_answer in yes_no.items():
        size = min(len(by_answer.get(answer, [])) for answer in ("yes", "no"))
        for answer in ("yes", "no"):
            pairs += random.Random(f"{seed} {family} {answer}").sample(by_answer.get(answer, []), size)
    for concept, members in labelled.by_concept(held_out).items():
        tones: dict[str, list[tuple[LabelledPicture, Question]]] = {}
        for entry in members:
            for question in questions_about(entry):
                if question.family == "skin tone":
                    tones.setdefault(question.answer, []).append((entry, question))
        pairs += [random.Random(f"{seed} {concept} {tone}").choice(tones[tone]) for tone in sorted(tones)]
    return pairs


def question_accuracy(
    model: Chameleon, held_out: Sequence[LabelledPicture], seed: int = 0, progress: Progress = no_progress
) -> dict[str, dict[str, float]]:
    """Return, for each family, the number of questions, the accuracy, and the base rate (that of the commonest answer)."""
    pairs = suite_questions(held_out, seed)
    answers: list[str] = []
    for start in range(0, len(pairs), BATCH_SIZE):
        batch = pairs[start : start + BATCH_SIZE]
        answers += model.answer_batch([(entry.picture, question.question) for entry, question in batch])
        progress("questions", len(answers), len(pairs))
    families: dict[str, list[tuple[str, str]]] = {}
    for (_, question), answer in zip(pairs, answers, strict=True):
        families.setdefault(question.family, []).append((answer, question.answer))
    result = {}
    for family, rows in families.items():
        num_right = sum(words(answer) == words(expected) for answer, expected in rows)
        commonest = Counter(expected for _, expected in rows).most_common(1)[0][1]
        result[family] = {"asked": len(rows), "right": num_right / len(rows), "commonest_answer": commonest / len(rows)}
    return result
