"""The suite over the embedded set: reconstruction, captions, questions, drawings, likelihood of text and code."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image as PILImage

from chameleon.data import emoji
from chameleon.data.emoji import Emoji, Question
from chameleon.errors import BadInput
from chameleon.evaluation.captions import cider_d, exact_match, words
from chameleon.evaluation.likelihood import bits_per_byte
from chameleon.evaluation.pictures import EffNetLite0, nearest_names, reconstruction
from chameleon.generation.chameleon import Chameleon

BATCH = 64
Progress = Callable[[str, int, int], None]
PARTS = ("reconstruction", "captions", "questions", "drawings", "likelihood")


def quiet(part: str, done: int, total: int) -> None:
    """Reports nothing."""


def evaluate(
    model: Chameleon,
    *,
    concepts: int | None = None,
    drawings: int = 200,
    seed: int = 0,
    parts: Sequence[str] = PARTS,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """All figures of the suite, as nested dictionaries. `concepts` restricts the set to a subset, as a demo trains on."""
    held_out = emoji.subset("validation", concepts)
    if not held_out:
        raise BadInput(f"no style is held out of {concepts} concepts", where="evaluate", remedy="take more")
    result: dict[str, Any] = {}
    if "reconstruction" in parts:
        result["reconstruction"] = reconstruction(model.tokenizer.image, [entry.picture for entry in held_out])
    if "captions" in parts:
        result["captions"] = captions(model, emoji.representatives(held_out, seed), progress)
    if "questions" in parts:
        result["questions"] = question_accuracy(model, held_out, seed, progress)
    if "drawings" in parts and drawings:
        judge = DrawingJudge(emoji.subset("train", concepts), held_out)
        result["drawings"] = drawn(model, judge, drawings, seed, progress)
    if "likelihood" in parts:
        result["text_bits_per_byte"] = bits_per_byte(model, emoji.words("validation"))
        result["code_bits_per_byte"] = bits_per_byte(model, emoji.code("validation"))
    return result


def captions(model: Chameleon, held_out: Sequence[Emoji], progress: Progress = quiet) -> dict[str, float]:
    """Greedy captions of one picture of each held-out concept, against its name and its tags."""
    made: list[str] = []
    for start in range(0, len(held_out), BATCH):
        made += model.caption_batch([entry.picture for entry in held_out[start : start + BATCH]])
        progress("captions", len(made), len(held_out))
    references = [[entry.caption, " ".join(entry.tags)] for entry in held_out]
    return {
        "pictures": len(held_out),
        "exact_name": exact_match(made, [entry.caption for entry in held_out]),
        "cider_d": cider_d(made, references),
    }


def asked(held_out: Sequence[Emoji], seed: int) -> list[tuple[Emoji, Question]]:
    """The questions of the suite: of each held-out concept one picture; skin tones one of each tone."""
    pairs = []
    for entry in emoji.representatives(held_out, seed):
        pairs += [(entry, question) for question in emoji.questions(entry) if question.family != "skin tone"]
    for concept, members in emoji.by_concept(held_out).items():
        tones: dict[str, list[tuple[Emoji, Question]]] = {}
        for entry in members:
            for question in emoji.questions(entry):
                if question.family == "skin tone":
                    tones.setdefault(question.answer, []).append((entry, question))
        pairs += [random.Random(f"{seed} {concept} {tone}").choice(tones[tone]) for tone in sorted(tones)]
    return pairs


def question_accuracy(
    model: Chameleon, held_out: Sequence[Emoji], seed: int = 0, progress: Progress = quiet
) -> dict[str, dict[str, float]]:
    """For each family of questions: how many, the share answered right, and that of the commonest answer."""
    pairs = asked(held_out, seed)
    answers: list[str] = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        answers += model.answer_batch([(entry.picture, question.question) for entry, question in batch])
        progress("questions", len(answers), len(pairs))
    families: dict[str, list[tuple[str, str]]] = {}
    for (_, question), answer in zip(pairs, answers, strict=True):
        families.setdefault(question.family, []).append((answer, question.answer))
    result = {}
    for family, rows in families.items():
        right = sum(words(given) == words(wanted) for given, wanted in rows)
        commonest = Counter(wanted for _, wanted in rows).most_common(1)[0][1]
        result[family] = {"asked": len(rows), "right": right / len(rows), "commonest_answer": commonest / len(rows)}
    return result


class DrawingJudge:
    """Recognises drawings by their nearest base emoji in EffNet-Lite0 features.

    A drawing is right where its emoji is among the 10 nearest; an emoji is as near as the nearest of its styles.
    """

    def __init__(self, known: Sequence[Emoji], held_out: Sequence[Emoji]) -> None:
        """Names to draw are those of `known`; drawings are compared with the base emoji of both."""
        self.known = [entry for entry in known if entry.hexcode == entry.base]
        gallery = self.known + [entry for entry in held_out if entry.hexcode == entry.base]
        self.features = EffNetLite0()
        self.places = self.features([entry.picture for entry in gallery])
        self.names = [entry.caption for entry in gallery]

    def choose(self, count: int, seed: int = 0) -> list[str]:
        """`count` names to draw, or all where there are fewer."""
        names = sorted({entry.caption for entry in emoji.representatives(self.known, seed)})
        return random.Random(seed).sample(names, min(count, len(names)))

    def judge(self, pictures: Sequence[PILImage.Image], names: Sequence[str]) -> dict[str, float]:
        """The figures of pictures that were to show `names`."""
        found = nearest_names(self.features(pictures), self.places, self.names)
        pairs = list(zip(names, found, strict=True))
        return {
            "drawings": len(pairs),
            "right_among_10": sum(name in near for name, near in pairs) / len(pairs),
            "right_nearest": sum(name == near[0] for name, near in pairs) / len(pairs),
            "base_emoji": len(set(self.names)),
        }


def drawn(
    model: Chameleon, judge: DrawingJudge, count: int, seed: int = 0, progress: Progress = quiet, **sampling: Any
) -> dict[str, float]:
    """Drawings of `count` names of training concepts, judged. `sampling`: options of `Chameleon.draw_batch`."""
    names, pictures = judge.choose(count, seed), []
    for start in range(0, len(names), BATCH):
        prompts = names[start : start + BATCH]
        pictures += model.draw_batch(prompts, seeds=range(start, start + len(prompts)), **sampling)
        progress("drawings", len(pictures), len(names))
    return judge.judge(pictures, names)
