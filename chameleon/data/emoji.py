"""The embedded set: emoji in three openly licensed styles, with words, questions and a train/validation split.

A *concept* is an emoji without its skin tone and gender. Pictures are sampled by concept, since 58% of them are variants of
people. For 15% of the concepts one whole style is held out for validation, so each concept of the validation set occurs in
training, but not in that style. The shards are written by `build_emoji.py`; `embedded/ATTRIBUTIONS.md` names the sources.
"""

from __future__ import annotations

import colorsys
import gzip
import io
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from chameleon.data.webdataset import read_samples
from chameleon.document import Conversation, Document, Image, Message, Part, Text
from chameleon.tokenizers.image import affine_augment

EMBEDDED = Path(__file__).parent / "embedded"
STYLES = ("fluent", "noto", "twemoji")
GROUP_WORDS = {
    "smileys-emotion": "smileys and emotion",
    "people-body": "people and body",
    "animals-nature": "animals and nature",
    "food-drink": "food and drink",
    "travel-places": "travel and places",
    "activities": "activities",
    "objects": "objects",
    "symbols": "symbols",
    "flags": "flags",
}
NO_TONE = "none"
# (hue in degrees below which a colour has this name, name)
HUES = (
    (14, "red"),
    (42, "orange"),
    (68, "yellow"),
    (165, "green"),
    (255, "blue"),
    (290, "purple"),
    (340, "pink"),
    (361, "red"),
)
FIXED_HANDEDNESS = ("left", "right", "arrow", "clock", "thirty", "east", "west", "letter", "button", "calendar", "text")


@dataclass(frozen=True)
class Emoji:
    """One picture of the set and its metadata."""

    key: str
    webp: bytes
    hexcode: str
    base: str
    concept: str
    emoji: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    skin_tone: str | None
    has_skin_tones: bool
    style: str
    colour: str | None
    split: str

    @property
    def picture(self) -> PILImage.Image:
        """The picture, 64×64 RGB."""
        return PILImage.open(io.BytesIO(self.webp)).convert("RGB")

    @property
    def caption(self) -> str:
        """The name, followed by the skin tone where there is one."""
        if self.skin_tone in (None, "mixed"):
            return self.name
        return f"{self.name}, {self.skin_tone} skin tone"

    @property
    def may_mirror(self) -> bool:
        """Whether the caption is also true of the mirrored picture."""
        if self.group in ("flags", "symbols"):
            return False
        return not any(word in self.name for word in FIXED_HANDEDNESS)


@cache
def load(split: str | None = None) -> tuple[Emoji, ...]:
    """Return all emoji of a split ("train", "validation"; None: both), in the order of the shards."""
    result = []
    for shard in sorted(EMBEDDED.glob("emoji-*.tar.gz")):
        for sample in read_samples(shard):
            entry = json.loads(sample["json"])
            entry["tags"] = tuple(entry["tags"])
            emoji = Emoji(key=str(sample["__key__"]), webp=sample["webp"], **entry)
            if split in (None, emoji.split):
                result.append(emoji)
    return tuple(result)


def subset(split: str, concepts: int | None = None) -> tuple[Emoji, ...]:
    """Return the emoji of a split; with `concepts`, of that many concepts only, the same ones in both splits.

    Half of the concepts of a subset have a style that is held out for validation.
    """
    if concepts is None:
        return load(split)
    held_out = {entry.concept for entry in load("validation")}
    shuffled = sorted({entry.concept for entry in load()}, key=lambda concept: random.Random(concept).random())
    chosen = [concept for concept in shuffled if concept in held_out][: concepts // 2]
    chosen += [concept for concept in shuffled if concept not in held_out][: concepts - len(chosen)]
    return tuple(entry for entry in load(split) if entry.concept in set(chosen))


def by_concept(emoji: Sequence[Emoji]) -> dict[str, list[Emoji]]:
    """Return the emoji of each concept, sorted by concept."""
    groups: dict[str, list[Emoji]] = {}
    for entry in emoji:
        groups.setdefault(entry.concept, []).append(entry)
    return dict(sorted(groups.items()))


def representatives(emoji: Sequence[Emoji], seed: int = 0) -> list[Emoji]:
    """Return one picture of each concept, without skin tone where there is one."""
    result = []
    for concept, members in by_concept(emoji).items():
        neutral = [entry for entry in members if entry.skin_tone is None]
        result.append(random.Random(f"{seed} {concept}").choice(neutral or members))
    return result


def sample_by_concept(emoji: Sequence[Emoji], per_concept: int, seed: int) -> Iterator[tuple[Emoji, random.Random]]:
    """Yield `per_concept` pictures of each concept in shuffled order, each with a random generator of its own.

    The styles of a concept alternate; within a style, half of the pictures are without skin tone, half any variant.
    """
    sampled = []
    for concept, members in by_concept(emoji).items():
        styles: dict[str, list[Emoji]] = {}
        for entry in members:
            styles.setdefault(entry.style, []).append(entry)
        for index in range(per_concept):
            rng = random.Random(f"{seed} {concept} {index}")
            variants = styles[sorted(styles)[index % len(styles)]]
            neutral = [entry for entry in variants if entry.skin_tone is None] or variants
            sampled.append((rng.choice(neutral if rng.random() < 0.5 else variants), rng))
    random.Random(seed).shuffle(sampled)
    yield from sampled


def augment(entry: Emoji, rng: random.Random) -> PILImage.Image:
    """Return the picture shifted by up to 5%, scaled by 0.85 to 1.1, and mirrored with probability ½ where allowed."""
    mirror = entry.may_mirror and rng.random() < 0.5
    zoom = rng.uniform(0.85, 1.1)
    return affine_augment(entry.picture, zoom, (rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)), mirror)


# --- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question about one picture. `family` names the metric that its answer counts towards."""

    family: str
    question: str
    answer: str


YES_NO = {"flags": "is it a flag?", "animals-nature": "is it an animal or plant?", "food-drink": "is it food or drink?"}


def questions(entry: Emoji, rng: random.Random | None = None) -> list[Question]:
    """Return the questions that can be asked about the picture.

    With a random generator they include one random yes-no question, whose answers are balanced where the group allows;
    without, all of them.
    """
    result = [
        Question("name", "what is it?", entry.name),
        Question("group", "what kind of thing is it?", GROUP_WORDS[entry.group]),
        Question("style", "which style is it?", entry.style),
    ]
    if entry.has_skin_tones and entry.skin_tone != "mixed":
        result.append(Question("skin tone", "which skin tone?", entry.skin_tone or NO_TONE))
    if entry.colour is not None:
        result.append(Question("colour", "which colour is it?", entry.colour))
    asked_groups = list(YES_NO)
    if rng is not None:
        is_yes = entry.group in YES_NO and rng.random() < 0.5
        asked_groups = [entry.group] if is_yes else [rng.choice([group for group in YES_NO if group != entry.group])]
    for group in asked_groups:
        answer = "yes" if entry.group == group else "no"
        result.append(Question(f"{GROUP_WORDS[group].split(' ')[0]} yes-no", YES_NO[group], answer))
    return result


def dominant_colour(rgba: PILImage.Image) -> str | None:
    """Return the name of the colour of at least 60% of the visible pixels (alpha > 128), or None."""
    pixels = np.asarray(rgba.convert("RGBA"), dtype=np.float32).reshape(-1, 4)
    visible = pixels[pixels[:, 3] > 128][:, :3] / 255
    if len(visible) < 100:
        return None
    counts: dict[str, int] = {}
    for red, green, blue in visible.tolist():
        name = colour_name(red, green, blue)
        counts[name] = counts.get(name, 0) + 1
    name, count = max(counts.items(), key=lambda item: item[1])
    return name if count >= 0.6 * len(visible) else None


def colour_name(red: float, green: float, blue: float) -> str:
    """Return the everyday name of a colour with components in [0, 1]; dark orange and red are brown."""
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if value < 0.22:
        return "black"
    if saturation < 0.16:
        return "white" if value > 0.85 else "grey"
    name = next(name for limit, name in HUES if hue * 360 < limit)
    if (name == "orange" and value < 0.72) or (name == "red" and value < 0.5):
        return "brown"
    return name


# --- documents -------------------------------------------------------------------------------------------------------
# Each task first draws its picture from the generator, so that with one seed all tasks show the same pictures, and those
# are encoded once. `augmented` 0 leaves the pictures unchanged.


def picture_part(entry: Emoji, rng: random.Random, augmented: int) -> Image:
    return Image(augment(entry, rng) if augmented else entry.picture)


def user_message(*content: Part) -> Message:
    return Message("user", Document(content))


def assistant_message(*content: Part) -> Message:
    return Message("assistant", Document(content))


def pairs(emoji: Sequence[Emoji], per_concept: int, seed: int, augmented: int = 1) -> Iterator[Document]:
    """Yield pictures with captions; one in ten has no caption, so that the model also learns pictures alone."""
    for entry, rng in sample_by_concept(emoji, per_concept, seed):
        picture = picture_part(entry, rng, augmented)
        yield Document((picture,) if rng.random() < 0.1 else (picture, Text(entry.caption)))


def captioning(emoji: Sequence[Emoji], per_concept: int, seed: int, augmented: int = 1) -> Iterator[Conversation]:
    """Yield a picture as the prompt, and its caption as the answer."""
    for entry, rng in sample_by_concept(emoji, per_concept, seed):
        picture = picture_part(entry, rng, augmented)
        yield Conversation((user_message(picture), assistant_message(Text(entry.caption))))


def answering(emoji: Sequence[Emoji], per_concept: int, seed: int, augmented: int = 1) -> Iterator[Conversation]:
    """Yield questions about one picture as one conversation, the format of LLaVA-1.5's VQA data (arXiv 2310.03744).

    Their order is random, so that each kind of question also occurs without others before it. The name comes last, if at
    all, since it would give the other answers away.
    """
    for entry, rng in sample_by_concept(emoji, per_concept, seed):
        picture = picture_part(entry, rng, augmented)
        name_question, *others = questions(entry, rng)
        rng.shuffle(others)
        if rng.random() < 0.25:
            others = [*others, name_question] if rng.random() < 0.5 else [name_question]
        messages = []
        for index, question in enumerate(others):
            content = (picture, Text(question.question)) if index == 0 else (Text(question.question),)
            messages += [user_message(*content), assistant_message(Text(question.answer))]
        yield Conversation(tuple(messages))


def drawing(emoji: Sequence[Emoji], per_concept: int, seed: int, augmented: int = 1) -> Iterator[Conversation]:
    """Yield a caption as the prompt, in a quarter of the cases with the style, and the picture as the answer.

    One prompt in ten is empty, for classifier-free guidance.
    """
    for entry, rng in sample_by_concept(emoji, per_concept, seed):
        picture = picture_part(entry, rng, augmented)
        prompt = entry.caption
        if rng.random() < 0.25:
            prompt = f"{prompt}, {entry.style} style"
        content = () if rng.random() < 0.1 else (Text(prompt),)
        yield Conversation((user_message(*content), assistant_message(picture)))


def words(split: str, seed: int = 0) -> Iterator[Document]:
    """Yield names and tags of emoji in twelve languages, one language a line. Every 20th emoji is for validation."""
    with gzip.open(EMBEDDED / "words.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line_index, line in enumerate(lines):
            if (line_index % 20 == 0) != (split == "validation"):
                continue
            words_of = json.loads(line)["words"]
            languages = sorted(words_of)
            random.Random(f"{seed} {line_index}").shuffle(languages)
            for start in range(0, len(languages), 3):
                shown = languages[start : start + 3]
                text = "\n".join(f"{language}: {', '.join(words_of[language])}" for language in shown)
                yield Document((Text(text),))


def code(split: str, limit_bytes: int | None = None) -> Iterator[Document]:
    """Yield modules of Python's standard library as text. Every 20th module is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    bytes_read = 0
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts)
    )
    for path_index, path in enumerate(paths):
        if (path_index % 20 == 0) != (split == "validation"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if limit_bytes is not None and bytes_read >= limit_bytes:
            return
        bytes_read += len(text.encode())
        if text:
            yield Document((Text(text),))
