"""Judges of drawings: which emoji one shows, in which style and colour, and how much drawings of one prompt differ.

What is drawn is recognised by nearest neighbours in the features of EfficientNet-Lite0, an ImageNet classifier that has
seen neither the model nor its tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor, nn

from chameleon.data import clipart, emoji, labelled
from chameleon.data.colours import TARGETS, main_colour
from chameleon.data.labelled import LabelledPicture
from chameleon.data.picture_tasks import colour_of, is_held_out_pair, thing_of
from chameleon.evaluation.pictures import EffNetLite0, nearest_names, on_square
from chameleon.generation.chameleon import GUIDANCE_SCALE, Chameleon
from chameleon.generation.sampling import IMAGE_SAMPLING, Sampling
from chameleon.tokenizers.image import to_tensor
from chameleon.tokenizers.vq_loss import ShiftTolerantLPIPS

BATCH_SIZE = 64
Hit = dict[str, float]
"""What is right about a drawing, 0 or 1 each."""
STYLE_STEPS, STYLE_LR, STYLE_WEIGHT_DECAY, STYLE_BLOCKS = 300, 0.01, 0.1, 3
COLOURED_THINGS = ("heart", "circle", "square", "book", "apple", "cat", "fish", "flower", "house", "car", "hat", "bird")
"""Things of the prompts "COLOUR THING", beside those of the training set."""


@dataclass(frozen=True)
class DrawingSettings:
    """How drawings are made."""

    seed: int = 0
    guidance_scale: float = GUIDANCE_SCALE
    sampling: Sampling = IMAGE_SAMPLING

    def draw(self, model: Chameleon, prompts: Sequence[str]) -> list[PILImage.Image]:
        """Draw each prompt; the seeds are counted from 0, so that a prompt that is repeated gives different drawings."""
        pictures: list[PILImage.Image] = []
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            pictures += model.draw_batch(
                batch,
                seeds=range(self.seed + start, self.seed + start + len(batch)),
                guidance_scale=self.guidance_scale,
                sampling=self.sampling,
            )
        return pictures


class StyleClassifier:
    """Logistic regression on means and deviations of the first feature maps of ST-LPIPS's AlexNet.

    It tells the style of five in six real pictures of held-out styles; that bounds what can be said of drawings.
    """

    def __init__(self, training_set: Sequence[LabelledPicture]) -> None:
        self.network = ShiftTolerantLPIPS.pretrained()
        features = self.features([entry.picture for entry in training_set])
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        self.layer = nn.Linear(features.shape[1], len(emoji.STYLES))
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        styles = torch.tensor([emoji.STYLES.index(entry.style) for entry in training_set])
        optimizer = torch.optim.AdamW(self.layer.parameters(), lr=STYLE_LR, weight_decay=STYLE_WEIGHT_DECAY)
        for _ in range(STYLE_STEPS):
            optimizer.zero_grad()
            F.cross_entropy(self.layer((features - self.mean) / self.std), styles).backward()
            optimizer.step()

    @torch.inference_mode()
    def features(self, pictures: Sequence[PILImage.Image]) -> Tensor:
        """Return means and standard deviations of the feature maps of pictures: [N, features]."""
        rows = []
        for start in range(0, len(pictures), BATCH_SIZE):
            batch = [at_side(picture, labelled.SIDE) for picture in pictures[start : start + BATCH_SIZE]]
            maps = (to_tensor(batch) - self.network.shift) / self.network.scale
            statistics = []
            for block in list(self.network.net.values())[:STYLE_BLOCKS]:
                maps = block(maps)
                statistics += [maps.mean((2, 3)), maps.std((2, 3))]
            rows.append(torch.cat(statistics, dim=1))
        return torch.cat(rows).clone()

    @torch.no_grad()
    def are_right(self, pictures: Sequence[PILImage.Image], wanted: Sequence[LabelledPicture]) -> list[bool]:
        """Return for each picture whether it has the style of `wanted`."""
        indices = self.layer((self.features(pictures) - self.mean) / self.std).argmax(1).tolist()
        return [emoji.STYLES[index] == entry.style for index, entry in zip(indices, wanted, strict=True)]


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
        self.held_out = [entry for entry in held_out if entry.hexcode == entry.base]
        self.gallery = self.drawable + self.held_out
        self.features = EffNetLite0(device)
        self.gallery_features = self.features([entry.picture for entry in self.gallery])
        self.gallery_names = [entry.caption for entry in self.gallery]

    def choose_names(self, count: int, seed: int = 0) -> list[str]:
        """Return `count` names to draw, or all where there are fewer."""
        names = sorted({entry.caption for entry in labelled.representatives(self.drawable, seed)})
        return random.Random(seed).sample(names, min(count, len(names)))

    def nearest(self, pictures: Sequence[PILImage.Image]) -> list[list[str]]:
        """Return the 10 nearest names of each picture."""
        return nearest_names(self.features(pictures), self.gallery_features, self.gallery_names)

    def hits(self, pictures: Sequence[PILImage.Image], names: Sequence[str]) -> list[Hit]:
        """Return for each picture that is to show a name whether the name is among the 10 nearest, and the nearest."""
        return [as_hit(name, near) for name, near in zip(names, self.nearest(pictures), strict=True)]

    def judge(self, pictures: Sequence[PILImage.Image], names: Sequence[str]) -> dict[str, float]:
        """Return the shares of pictures whose names are among their 10 nearest, and the nearest."""
        hits = self.hits(pictures, names)
        return {key: sum(hit[key] for hit in hits) / len(hits) for key in hits[0]}

    @cached_property
    def num_names(self) -> int:
        """Names that a drawing is told from."""
        return len(set(self.gallery_names))

    # --- styles ---

    @cached_property
    def style_classifier(self) -> StyleClassifier:
        return StyleClassifier(self.drawable)

    def unseen_hits(self, pictures: Sequence[PILImage.Image], wanted: Sequence[LabelledPicture]) -> list[Hit]:
        """Return the hits of drawings of pairs of concept and style that training had no picture of, and of their style.

        They are compared with pictures in other styles than the one asked for.
        """
        result = []
        styles = self.style_classifier.are_right(pictures, wanted)
        for row, entry, is_right_style in zip(self.features(pictures), wanted, styles, strict=True):
            others = [index for index, other in enumerate(self.gallery) if other.style != entry.style]
            names = [self.gallery_names[index] for index in others]
            near = nearest_names(row[None], self.gallery_features[others], names)[0]
            result.append({**as_hit(entry.caption, near), "right_style": float(is_right_style)})
        return result

    def real_style_accuracy(self) -> float:
        """Return the share of real held-out pictures whose style is told right, which bounds what is said of drawings."""
        real = [entry for entry in self.held_out if not entry.is_variant]
        results = self.style_classifier.are_right([entry.picture for entry in real], real)
        return sum(results) / len(results)

    # --- colours ---

    @cached_property
    def things(self) -> tuple[Tensor, list[str]]:
        """Features of grey pictures of all things that can be recoloured, and their names without colours."""
        named = [(entry, thing) for entry in self.gallery if (thing := thing_of(entry)) is not None]
        return self.features([grey(entry.picture) for entry, _ in named]), [thing for _, thing in named]

    def coloured_hits(self, pictures: Sequence[PILImage.Image], wanted: Sequence[tuple[str, str]]) -> list[Hit]:
        """Return whether drawings have the main colour that was asked for, show the thing (in grey), and both.

        wanted: pairs of colour and thing.
        """
        features, things = self.things
        nearest = nearest_names(self.features([grey(picture) for picture in pictures]), features, things)
        result = []
        for picture, (colour, thing), near in zip(pictures, wanted, nearest, strict=True):
            right_colour, right_thing = main_colour(picture) == colour, thing in near
            hit = {"right_colour": right_colour, "right_thing": right_thing, "right_both": right_colour and right_thing}
            result.append({name: float(value) for name, value in hit.items()})
        return result


def as_hit(name: str, nearest: Sequence[str]) -> Hit:
    """Return whether a name is among the nearest, and the nearest."""
    return {"right_among_10": float(name in nearest), "right_nearest": float(name == nearest[0])}


def at_side(picture: PILImage.Image, side: int) -> PILImage.Image:
    """Return a picture as a square at the resolution of the set's pictures."""
    square = on_square(picture)
    return square if square.width == side else square.resize((side, side), PILImage.Resampling.LANCZOS)


def grey(picture: PILImage.Image) -> PILImage.Image:
    """Return the picture in grey with full contrast."""
    return ImageOps.autocontrast(picture.convert("L")).convert("RGB")


def drawing_accuracy(
    model: Chameleon, judge: DrawingJudge, num_drawings: int, settings: DrawingSettings, names_seed: int = 0
) -> dict[str, float]:
    """Draw names of training concepts and judge the drawings."""
    names = judge.choose_names(num_drawings, names_seed)
    return judge.judge(settings.draw(model, names), names)


def coloured_prompts(count: int, seed: int) -> list[tuple[str, str]]:
    """Return `count` pairs of colour and thing, of all colours and many things, none of them held out."""
    things = sorted({thing for entry in emoji.load("train") if (thing := thing_of(entry)) is not None})
    rng = random.Random(seed)
    chosen = [*COLOURED_THINGS, *rng.sample(things, min(len(things), count // 4))]
    pairs = [(colour, thing) for thing in chosen for colour in sorted(TARGETS) if not is_held_out_pair(colour, thing)]
    return rng.sample(pairs, min(count, len(pairs)))


def unseen_colours(count: int, seed: int) -> list[tuple[str, str]]:
    """Return `count` held-out pairs of colour and thing: no training picture is called by both or, among the emoji that are
    called by the thing, has that main colour.

    Strong views of training pictures, which are only read, may have it.
    """
    named = {entry.name for training_set in (emoji, clipart) for entry in training_set.load("train")}
    of_thing: dict[str, list[LabelledPicture]] = {}
    for entry in emoji.load("train"):
        if (thing := thing_of(entry)) is not None:
            of_thing.setdefault(thing, []).append(entry)
    pairs = [(colour, thing) for thing in sorted(of_thing) for colour in sorted(TARGETS) if is_held_out_pair(colour, thing)]
    random.Random(seed).shuffle(pairs)
    chosen: list[tuple[str, str]] = []
    for colour, thing in pairs:
        if len(chosen) == count:
            break
        if f"{colour} {thing}" not in named and all(colour_of(entry) != colour for entry in of_thing[thing]):
            chosen.append((colour, thing))
    return chosen


def differing_codes(codes: Tensor) -> list[float]:
    """Return for each of several drawings of one prompt by how many of its codes [N, L] it differs from the others."""
    flat = codes.flatten(1)
    shares = (flat[:, None] != flat[None]).float().mean(2)  # [N, N], 0 on the diagonal
    return (shares.sum(1) / (len(flat) - 1)).tolist()
