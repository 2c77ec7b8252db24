"""The embedded set: emoji in three openly licensed styles, with words, questions and a train/validation split.

A *concept* is an emoji without its skin tone and gender. Sampling goes by concept, since 58% of the pictures are
variants of people. For 15% of the concepts validation holds out one whole style, so each concept it asks about is
known, but not in that style. `build_emoji.py` made the shards and `embedded/ATTRIBUTIONS.md` says where all comes from.
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
from chameleon.tokenizers.image import moved

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
# Hue in degrees up to which a colour's name holds; the last wraps round to red.
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
    """One picture of the set and what is known of it."""

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
        """The name, and the skin tone of a variant that has one."""
        if self.skin_tone in (None, "mixed"):
            return self.name
        return f"{self.name}, {self.skin_tone} skin tone"

    @property
    def may_mirror(self) -> bool:
        """Whether the mirrored picture still shows what the name says."""
        if self.group in ("flags", "symbols"):
            return False
        return not any(word in self.name for word in FIXED_HANDEDNESS)


@cache
def load(split: str | None = None) -> tuple[Emoji, ...]:
    """All emoji of a split ("train", "validation"; None: both), in the order of the shards."""
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
    """The emoji of a split; with `concepts`, of that many concepts only, the same ones in both splits.

    A subset takes concepts that validation holds a style of and others half and half.
    """
    if concepts is None:
        return load(split)
    held = {entry.concept for entry in load("validation")}
    everything = sorted({entry.concept for entry in load()}, key=lambda concept: random.Random(concept).random())
    chosen = [c for c in everything if c in held][: concepts // 2]
    chosen += [c for c in everything if c not in held][: concepts - len(chosen)]
    return tuple(entry for entry in load(split) if entry.concept in set(chosen))


def by_concept(emoji: Sequence[Emoji]) -> dict[str, list[Emoji]]:
    """The emoji of each concept, concepts sorted."""
    groups: dict[str, list[Emoji]] = {}
    for entry in emoji:
        groups.setdefault(entry.concept, []).append(entry)
    return dict(sorted(groups.items()))


def representatives(emoji: Sequence[Emoji], seed: int = 0) -> list[Emoji]:
    """One picture for each concept, without skin tone where there is such a one."""
    result = []
    for concept, members in by_concept(emoji).items():
        neutral = [entry for entry in members if entry.skin_tone is None]
        result.append(random.Random(f"{seed} {concept}").choice(neutral or members))
    return result


def draw_by_concept(emoji: Sequence[Emoji], per_concept: int, seed: int) -> Iterator[tuple[Emoji, random.Random]]:
    """`per_concept` pictures for each concept in shuffled order, each with a random stream of its own.

    The styles of a concept take turns; within a style, half of the draws are the plain emoji and half any variant.
    """
    rounds = []
    for concept, members in by_concept(emoji).items():
        styles: dict[str, list[Emoji]] = {}
        for entry in members:
            styles.setdefault(entry.style, []).append(entry)
        for number in range(per_concept):
            stream = random.Random(f"{seed} {concept} {number}")
            variants = styles[sorted(styles)[number % len(styles)]]
            neutral = [entry for entry in variants if entry.skin_tone is None] or variants
            rounds.append((stream.choice(neutral if stream.random() < 0.5 else variants), stream))
    random.Random(seed).shuffle(rounds)
    yield from rounds


def augment(entry: Emoji, stream: random.Random) -> PILImage.Image:
    """The picture shifted by up to 5%, scaled by 0.85 to 1.1, and mirrored in half of the cases that allow it."""
    mirror = entry.may_mirror and stream.random() < 0.5
    zoom = stream.uniform(0.85, 1.1)
    return moved(entry.picture, zoom, (stream.uniform(-0.05, 0.05), stream.uniform(-0.05, 0.05)), mirror)


# --- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question about one picture. `family` names the figure under which its answers are counted."""

    family: str
    question: str
    answer: str


YES_NO = {"flags": "is it a flag?", "animals-nature": "is it an animal or plant?", "food-drink": "is it food or drink?"}


def questions(entry: Emoji, stream: random.Random | None = None) -> list[Question]:
    """Every question that can be asked of the picture.

    With a `stream` the yes-or-no question is one at random, "yes" and "no" equally often where the group allows;
    without, each of them is asked.
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
    asked = list(YES_NO)
    if stream is not None:
        true = entry.group in YES_NO and stream.random() < 0.5
        asked = [entry.group] if true else [stream.choice([group for group in YES_NO if group != entry.group])]
    for group in asked:
        answer = "yes" if entry.group == group else "no"
        result.append(Question(f"{GROUP_WORDS[group].split(' ')[0]} yes-no", YES_NO[group], answer))
    return result


def dominant_colour(rgba: PILImage.Image) -> str | None:
    """The colour's name that at least 60% of the visible pixels share, or None.

    Pixels count where alpha > 128. Value and saturation tell black, grey, white; dark orange is brown.
    """
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
    """The everyday name of a colour, components in [0, 1]."""
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
# Each task takes its picture from the stream first, so that with one seed all tasks show the same pictures, and those
# are encoded once. `augmented` 0 shows the pictures as they are.


def show(entry: Emoji, stream: random.Random, augmented: int) -> Image:
    return Image(augment(entry, stream) if augmented else entry.picture)


def ask(*content: Part) -> Message:
    return Message("user", Document(content))


def reply(*content: Part) -> Message:
    return Message("assistant", Document(content))


def pairs(emoji: Sequence[Emoji], per_concept: int, seed: int, augmented: int = 1) -> Iterator[Document]:
    """Pictures with captions; one in ten has no caption, so that the model also learns pictures alone."""
    for entry, stream in draw_by_concept(emoji, per_concept, seed):
        picture = show(entry, stream, augmented)
        yield Document((picture,) if stream.random() < 0.1 else (picture, Text(entry.caption)))


def captioning(emoji: Sequence[Emoji], per_concept: int, seed: int, augmented: int = 1) -> Iterator[Conversation]:
    """A picture, answered by its caption."""
    for entry, stream in draw_by_concept(emoji, per_concept, seed):
        yield Conversation((ask(show(entry, stream, augmented)), reply(Text(entry.caption))))


def answering(emoji: Sequence[Emoji], per_concept: int, seed: int, augmented: int = 1) -> Iterator[Conversation]:
    """Questions about one picture in one conversation, as LLaVA-1.5 (arXiv 2310.03744) lays out its VQA data.

    The order is random, so that each kind of question is also met without answers before it. The name comes last if at
    all: it would give the others away.
    """
    for entry, stream in draw_by_concept(emoji, per_concept, seed):
        picture = show(entry, stream, augmented)
        asked = questions(entry, stream)
        name, rest = asked[0], asked[1:]
        stream.shuffle(rest)
        if stream.random() < 0.25:
            rest = [*rest, name] if stream.random() < 0.5 else [name]
        messages = []
        for number, question in enumerate(rest):
            content = (picture, Text(question.question)) if number == 0 else (Text(question.question),)
            messages += [ask(*content), reply(Text(question.answer))]
        yield Conversation(tuple(messages))


def drawing(emoji: Sequence[Emoji], per_concept: int, seed: int, augmented: int = 1) -> Iterator[Conversation]:
    """A caption, in a quarter of the cases with the style, answered by the picture; one in ten prompts is empty."""
    for entry, stream in draw_by_concept(emoji, per_concept, seed):
        picture = show(entry, stream, augmented)
        prompt = entry.caption
        if stream.random() < 0.25:
            prompt = f"{prompt}, {entry.style} style"
        content = () if stream.random() < 0.1 else (Text(prompt),)
        yield Conversation((ask(*content), reply(picture)))


def words(split: str, seed: int = 0) -> Iterator[Document]:
    """Names and tags of emoji in twelve languages, a line each. Validation holds every 20th emoji."""
    with gzip.open(EMBEDDED / "words.jsonl.gz", "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if (number % 20 == 0) != (split == "validation"):
                continue
            row = json.loads(line)["words"]
            languages = sorted(row)
            random.Random(f"{seed} {number}").shuffle(languages)
            for start in range(0, len(languages), 3):
                text = "\n".join(f"{code}: {', '.join(row[code])}" for code in languages[start : start + 3])
                yield Document((Text(text),))


def code(split: str, limit_bytes: int | None = None) -> Iterator[Document]:
    """Modules of Python's standard library as text. Validation holds every 20th module, training the others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    taken = 0
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts)
    )
    for number, path in enumerate(paths):
        if (number % 20 == 0) != (split == "validation"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if limit_bytes is not None and taken >= limit_bytes:
            return
        taken += len(text.encode())
        if text:
            yield Document((Text(text),))
