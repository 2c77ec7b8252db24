"""The evaluation suite on the embedded set: reconstruction, captions, questions, drawings, likelihood of text and code."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image as PILImage

from chameleon.data import emoji, labelled
from chameleon.data.labelled import LabelledPicture
from chameleon.data.questions import Question, questions_about
from chameleon.errors import BadInput, check_seed
from chameleon.evaluation.captions import cider_d, exact_match, words
from chameleon.evaluation.likelihood import bits_per_byte
from chameleon.evaluation.pictures import EffNetLite0, nearest_names, reconstruction
from chameleon.generation.chameleon import GUIDANCE_SCALE, Chameleon
from chameleon.generation.sampling import IMAGE_SAMPLING, Sampling

BATCH_SIZE = 64
Progress = Callable[[str, int, int], None]
"""Called as (part of the suite, number done, total)."""
PARTS = ("reconstruction", "captions", "questions", "drawings", "likelihood")


def no_progress(part: str, num_done: int, total: int) -> None:
    """Report nothing."""


def evaluate(
    model: Chameleon,
    *,
    concepts: int | None = None,
    drawings: int = 200,
    seed: int = 0,
    parts: Sequence[str] = PARTS,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return all metrics of the suite, as nested dictionaries.

    concepts: evaluate on a subset of so many concepts. drawings: number of drawings. parts: of `PARTS`.
    """
    check_seed(seed)
    held_out = emoji.subset("validation", concepts)
    if not held_out:
        raise BadInput(f"no style is held out of {concepts} concepts", where="evaluate", remedy="use more")
    result: dict[str, Any] = {}
    if "reconstruction" in parts:
        result["reconstruction"] = reconstruction(model.tokenizer.image, [entry.picture for entry in held_out])
    if "captions" in parts:
        result["captions"] = captions(model, labelled.representatives(held_out, seed), progress)
    if "questions" in parts:
        result["questions"] = question_accuracy(model, held_out, seed, progress)
    if "drawings" in parts and drawings:
        judge = DrawingJudge(emoji.subset("train", concepts), held_out)
        result["drawings"] = drawing_accuracy(model, judge, drawings, seed, progress)
    if "likelihood" in parts:
        result["text_bits_per_byte"] = bits_per_byte(model, emoji.words("validation"))
        result["code_bits_per_byte"] = bits_per_byte(model, emoji.code("validation"))
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


def suite_questions(held_out: Sequence[LabelledPicture], seed: int) -> list[tuple[LabelledPicture, Question]]:
    """Return the questions of the suite: about one picture of each concept; about skin tone, one of each tone."""
    pairs = []
    for entry in labelled.representatives(held_out, seed):
        pairs += [(entry, question) for question in questions_about(entry) if question.family != "skin tone"]
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


class DrawingJudge:
    """Recognises drawings by their nearest base emoji in EffNet-Lite0 features.

    A drawing is right if its emoji is among the 10 nearest; an emoji is as near as the nearest of its styles.
    """

    def __init__(
        self,
        training_set: Sequence[LabelledPicture],
        held_out: Sequence[LabelledPicture],
        device: str | torch.device = "cpu",
    ) -> None:
        """Names to draw are those of the training set; drawings are compared with the base emoji of both sets."""
        self.drawable = [entry for entry in training_set if entry.hexcode == entry.base]
        gallery = self.drawable + [entry for entry in held_out if entry.hexcode == entry.base]
        self.features = EffNetLite0(device)
        self.gallery_features = self.features([entry.picture for entry in gallery])
        self.gallery_names = [entry.caption for entry in gallery]

    def choose_names(self, count: int, seed: int = 0) -> list[str]:
        """Return `count` names to draw, or all where there are fewer."""
        names = sorted({entry.caption for entry in labelled.representatives(self.drawable, seed)})
        return random.Random(seed).sample(names, min(count, len(names)))

    def judge(self, pictures: Sequence[PILImage.Image], names: Sequence[str]) -> dict[str, float]:
        """Return the metrics of pictures that are to show `names`."""
        nearest = nearest_names(self.features(pictures), self.gallery_features, self.gallery_names)
        pairs = list(zip(names, nearest, strict=True))
        return {
            "drawings": len(pairs),
            "right_among_10": sum(name in near for name, near in pairs) / len(pairs),
            "right_nearest": sum(name == near[0] for name, near in pairs) / len(pairs),
            "base_emoji": len(set(self.gallery_names)),
        }


def drawing_accuracy(
    model: Chameleon,
    judge: DrawingJudge,
    num_drawings: int,
    seed: int = 0,
    progress: Progress = no_progress,
    *,
    guidance_scale: float = GUIDANCE_SCALE,
    sampling: Sampling = IMAGE_SAMPLING,
) -> dict[str, float]:
    """Draw names of training concepts and judge the drawings."""
    names, pictures = judge.choose_names(num_drawings, seed), []
    for start in range(0, len(names), BATCH_SIZE):
        prompts = names[start : start + BATCH_SIZE]
        seeds = range(start, start + len(prompts))
        pictures += model.draw_batch(prompts, seeds=seeds, guidance_scale=guidance_scale, sampling=sampling)
        progress("drawings", len(pictures), len(names))
    return judge.judge(pictures, names)
