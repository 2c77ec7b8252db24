"""Pictures with labels, as the embedded sets hold them: what is known of one, how they are sampled and augmented.

A *concept* is what a picture shows, whatever its style: for an emoji also whatever its skin tone and gender.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PILImage

from chameleon.data.augmentation import change_style, erase_part, shift_colours, stretch, warp
from chameleon.data.colours import WORD_ABOUT_COLOURS
from chameleon.data.webdataset import read_samples
from chameleon.tokenizers.image import affine_augment

EMBEDDED = Path(__file__).parent / "embedded"
SIDE = 64
"""Pixels of a picture."""
NO_TONE = "none"
FIXED_HANDEDNESS = ("left", "right", "arrow", "clock", "thirty", "east", "west", "letter", "button", "calendar", "text")
WITHOUT_MIRRORING = ("flags", "symbols")
"""Groups whose pictures may show letters, or mean something else when they are mirrored."""
WITHOUT_RECOLOURING = ("flags", "people-body")
"""Groups whose pictures have the colours that they must have."""


@dataclass(frozen=True)
class LabelledPicture:
    """A picture and what is known of it."""

    key: str
    webp: bytes
    concept: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    style: str
    colour: str | None
    """The dominant colour, where there is one."""
    split: str
    """`train` or `validation`."""
    skin_tone: str | None = None
    has_skin_tones: bool = False
    hexcode: str = ""
    """Code points of an emoji."""
    base: str = ""
    """Code points of the emoji without skin tone."""
    emoji: str = ""
    author: str = ""

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
        return self.group not in WITHOUT_MIRRORING and not any(word in self.name for word in FIXED_HANDEDNESS)

    @property
    def may_change_colours(self) -> bool:
        """Whether the caption is also true of the picture in other colours."""
        is_fixed = self.group in WITHOUT_RECOLOURING or self.has_skin_tones
        return not is_fixed and not WORD_ABOUT_COLOURS.search(self.name)

    @property
    def is_variant(self) -> bool:
        """Whether it has a skin tone, so that another picture of its concept is the plain one."""
        return self.skin_tone is not None


def hashed_share(*words: object) -> float:
    """Return a number in [0, 1) that depends on the words alone."""
    digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def read_labelled(pattern: str) -> tuple[LabelledPicture, ...]:
    """Return the pictures of the embedded shards that match a pattern, in their order."""
    result = []
    for shard in sorted(EMBEDDED.glob(pattern)):
        for sample in read_samples(shard):
            entry = json.loads(sample["json"])
            entry["tags"] = tuple(entry["tags"])
            result.append(LabelledPicture(key=str(sample["__key__"]), webp=sample["webp"], **entry))
    return tuple(result)


def choose_concepts(pictures: Sequence[LabelledPicture], num_concepts: int) -> set[str]:
    """Return that many concepts, the same ones each time; half of them have pictures held out for validation."""
    held_out = {entry.concept for entry in pictures if entry.split == "validation"}
    shuffled = sorted({entry.concept for entry in pictures}, key=lambda concept: random.Random(concept).random())
    chosen = [concept for concept in shuffled if concept in held_out][: num_concepts // 2]
    chosen += [concept for concept in shuffled if concept not in held_out][: num_concepts - len(chosen)]
    return set(chosen)


def by_concept(pictures: Iterable[LabelledPicture]) -> dict[str, list[LabelledPicture]]:
    """Return the pictures of each concept, sorted by concept."""
    groups: dict[str, list[LabelledPicture]] = {}
    for entry in pictures:
        groups.setdefault(entry.concept, []).append(entry)
    return dict(sorted(groups.items()))


def representatives(pictures: Sequence[LabelledPicture], seed: int = 0) -> list[LabelledPicture]:
    """Return one picture of each concept, without skin tone where there is one."""
    result = []
    for concept, members in by_concept(pictures).items():
        neutral = [entry for entry in members if not entry.is_variant]
        result.append(random.Random(f"{seed} {concept}").choice(neutral or members))
    return result


def sample_by_concept(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int
) -> Iterator[tuple[LabelledPicture, random.Random]]:
    """Yield `per_concept` pictures of each concept in shuffled order, each with a random generator of its own.

    The styles of a concept alternate; within a style, half of the pictures are without skin tone, half any variant.
    """
    sampled = []
    for concept, members in by_concept(pictures).items():
        styles: dict[str, list[LabelledPicture]] = {}
        for entry in members:
            styles.setdefault(entry.style, []).append(entry)
        for index in range(per_concept):
            rng = random.Random(f"{seed} {concept} {index}")
            variants = styles[sorted(styles)[index % len(styles)]]
            neutral = [entry for entry in variants if not entry.is_variant] or variants
            sampled.append((rng.choice(neutral if rng.random() < 0.5 else variants), rng))
    random.Random(seed).shuffle(sampled)
    yield from sampled


# --- views ----------------------------------------------------------------------------------------------------


def augment(entry: LabelledPicture, rng: random.Random) -> PILImage.Image:
    """Return the picture shifted by up to 5%, scaled by 0.85 to 1.1, and mirrored with probability ½ where allowed."""
    mirror = entry.may_mirror and rng.random() < 0.5
    zoom = rng.uniform(0.85, 1.1)
    return affine_augment(entry.picture, zoom, (rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)), mirror)


View = Callable[[LabelledPicture, random.Random], PILImage.Image]
"""How a task shows a picture."""


def plain_view(entry: LabelledPicture, rng: random.Random) -> PILImage.Image:
    """Return the picture itself."""
    return entry.picture


def near_view(entry: LabelledPicture, rng: random.Random) -> PILImage.Image:
    """Return the picture shifted by up to 3%, scaled by 0.93 to 1.04, and mirrored with probability ½ where allowed."""
    mirror = entry.may_mirror and rng.random() < 0.5
    zoom = rng.uniform(0.93, 1.04)
    return affine_augment(entry.picture, zoom, (rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03)), mirror)


def wide_view(entry: LabelledPicture, rng: random.Random) -> PILImage.Image:
    """Return the picture augmented, in half of the cases also in another style."""
    picture = augment(entry, rng)
    return change_style(picture, rng) if rng.random() < 0.5 else picture


def warped_view(entry: LabelledPicture, rng: random.Random) -> PILImage.Image:
    """Return the picture augmented and bent, its style unchanged."""
    return warp(augment(entry, rng), rng)


def far_view(entry: LabelledPicture, rng: random.Random) -> PILImage.Image:
    """Return the picture augmented and bent, in half of the cases also in another style."""
    picture = warped_view(entry, rng)
    return change_style(picture, rng) if rng.random() < 0.5 else picture


def strong_view(entry: LabelledPicture, rng: random.Random) -> PILImage.Image:
    """Return the picture bent, and each with some probability stretched, in any hue or grey, and partly erased.

    Hues change only where the caption says nothing of colours, and shows neither flags nor people. So the caption stays
    true; colour and style do not.
    """
    picture = far_view(entry, rng)
    if rng.random() < 0.5:
        picture = stretch(picture, rng)
    if entry.may_change_colours and rng.random() < 0.5:
        is_grey = rng.random() < 0.2
        picture = shift_colours(picture, rng.uniform(-180, 180), 0.0 if is_grey else rng.uniform(0.6, 1.3), 1.0)
    return erase_part(picture, rng) if rng.random() < 0.3 else picture
