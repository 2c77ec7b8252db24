"""Tasks whose prompts and answers are texts and pictures by turns: lists, the same in another style or colour, rebuses,
what does not belong, comparisons, stories, pages, pictures that are changed as an instruction says.

A task yields `count` conversations over random pictures. The combinations of a tenth of the prompts are kept for evaluation
(`is_for_evaluation`): in the training split they do not occur, in the validation split only they do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

from PIL import Image as PILImage

from chameleon.data.colours import TARGETS, main_colour, recolour
from chameleon.data.emoji import STYLES as EMOJI_STYLES
from chameleon.data.labelled import NO_TONE, LabelledPicture, View, augment, by_concept, hashed_share
from chameleon.data.picture_tasks import is_held_out_pair, thing_of, turn
from chameleon.data.questions import CATEGORIES, categories_of, group_words, is_plain_name, with_article
from chameleon.document import Conversation, Image, Part, Text
from chameleon.errors import BadInput

Made = TypeVar("Made")
EVALUATION_SHARE = 0.1
NUMBERS = ("two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")
MAX_TRIES = 200
STORIES: tuple[tuple[str, ...], ...] = (
    ("Once there was {animal}.", " One morning it found {food}.", " It ate it all and slept until evening."),
    ("{Animal} met {animal}.", " They became friends and shared {food}."),
    ("{Animal} lived in {building}.", " Every night it looked for {food}."),
    ("A girl opened a box.", " In it was {object}.", " Under it lay {object}."),
    ("We went by {vehicle} to see {building}.", " On the way we ate {food}."),
    ("On Monday I saw {animal}.", " On Tuesday I saw {animal}.", " On Wednesday I stayed at home."),
    ("My grandmother gave me {clothes}.", " I gave her {object}."),
    ("The cook took {food} and {food}.", " It tasted wonderful."),
    ("{Animal} wanted to travel.", " It bought {vehicle} and drove away."),
    ("In the garden grows {plant}.", " Beneath it sits {animal}."),
    ("For the party we need {food}, {drink} and {object}.",),
    ("{Animal} played {sport} with {animal}.", " After that they were hungry and ate {food}."),
)
"""Sentences; each name in braces is a kind of thing, whose picture follows its sentence."""
STORY_KINDS = {
    "animal": ("animal-",),
    "food": ("food-",),
    "drink": ("drink",),
    "building": ("place-building",),
    "vehicle": ("transport-ground", "transport-air", "transport-water"),
    "object": ("tool", "household", "musical-instrument", "light-video", "book-paper", "office", "lock"),
    "clothes": ("clothing",),
    "plant": ("plant-",),
    "sport": ("sport",),
}
REBUSES = (
    "I see {} and {}",
    "{} likes {}",
    "{} and {} are in the garden",
    "where is {}?",
    "{} is bigger than {}",
    "today we eat {} with {}",
    "give me {}",
    "I would like {} and {}",
    "{}, {} and {}",
    "{} dreams of {}",
)


@dataclass
class Shelf:
    """Pictures by concept, style and kind, as the mixed tasks look for them."""

    pictures: Sequence[LabelledPicture]
    view: View
    split: str
    shown: Sequence[LabelledPicture] | None = None
    """Pictures that edits start from, whatever the combination; None: all, in the combinations of the split."""
    concepts: dict[str, dict[str, list[LabelledPicture]]] = field(init=False)
    """Concept → style → pictures without skin tone."""

    def __post_init__(self) -> None:
        neutral = [entry for entry in self.pictures if not entry.is_variant]
        self.concepts = {}
        for concept, members in by_concept(neutral).items():
            styles: dict[str, list[LabelledPicture]] = {}
            for entry in members:
                styles.setdefault(entry.style, []).append(entry)
            self.concepts[concept] = styles
        self.names = sorted(self.concepts)
        self.picture_names = {entry.name for entry in neutral}
        self.tones: dict[tuple[str, str], dict[str, LabelledPicture]] = {}
        """(style, emoji without skin tone) → skin tone → picture."""
        for entry in self.pictures:
            if entry.skin_tone not in (None, NO_TONE, "mixed"):
                self.tones.setdefault((entry.style, entry.base), {})[str(entry.skin_tone)] = entry
        with_tones = {base for _, base in self.tones}
        self.with_tones = [
            name for name in self.names if any(e.base in with_tones for of in self.concepts[name].values() for e in of)
        ]
        self.of_category: dict[int, list[str]] = {}
        self.of_story_kind: dict[str, list[str]] = {}
        self.of_group: dict[str, list[str]] = {}
        for concept, styles in self.concepts.items():
            entry = next(iter(styles.values()))[0]
            self.of_group.setdefault(entry.group, []).append(concept)
            for category in categories_of(entry):
                self.of_category.setdefault(category, []).append(concept)
            for kind, starts in STORY_KINDS.items():
                if entry.subgroup.startswith(starts) and is_plain_name(entry.name):
                    self.of_story_kind.setdefault(kind, []).append(concept)
        self.of_category = {category: members for category, members in self.of_category.items() if len(members) >= 6}
        self.of_story_kind = {kind: members for kind, members in self.of_story_kind.items() if len(members) >= 3}
        self.plain = [name for name in self.names if is_plain_name(self.any_of(name, random.Random(0)).name)]

    def any_of(self, concept: str, rng: random.Random, style: str | None = None) -> LabelledPicture:
        """Return a picture of a concept, in a style if there is one in it."""
        styles = self.concepts[concept]
        chosen = style if style in styles else rng.choice(sorted(styles))
        return rng.choice(styles[chosen])

    def other_styles(self, entry: LabelledPicture) -> dict[str, LabelledPicture]:
        """Return the same emoji in other styles: style → picture."""
        styles = {style: members for style, members in self.concepts[entry.concept].items() if style != entry.style}
        same = {style: [one for one in members if one.base == entry.base] for style, members in styles.items()}
        return {style: members[0] for style, members in same.items() if members and style in EMOJI_STYLES}

    def picture_to_edit(self, kind: str, rng: random.Random) -> LabelledPicture:
        """Return a random picture without skin tone; for the kind "tone" one that exists with others."""
        if self.shown is None:
            return self.any_of(rng.choice(self.with_tones if kind == "tone" else self.names), rng)
        neutral = [entry for entry in self.shown if not entry.is_variant]
        return rng.choice([entry for entry in neutral if kind != "tone" or (entry.style, entry.base) in self.tones])

    def show(self, entry: LabelledPicture, rng: random.Random) -> Image:
        return Image(self.view(entry, rng))

    def is_used(self, *words: object) -> bool:
        """Whether the combination belongs to this split."""
        if self.shown is not None:
            return True
        return is_for_evaluation(*words) == (self.split == "validation")


def is_for_evaluation(*words: object) -> bool:
    """Whether prompts of this combination are kept for evaluation."""
    return hashed_share("mixed", *words) < EVALUATION_SHARE


Maker = Callable[[Shelf, random.Random], Conversation | None]
"""Makes one conversation, or None where the random choices make none of this split."""


def make_list(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """ "three fruits" → name, picture, name, picture …"""
    category, number = rng.choice(sorted(shelf.of_category)), rng.randint(2, 4)
    style = rng.choice([*EMOJI_STYLES, "", ""])
    if not shelf.is_used("list", category, number, style):
        return None
    things = f"{NUMBERS[number - 2]} {CATEGORIES[category][1]}"
    if things in shelf.picture_names:
        return None  # "two hearts" is an emoji
    prompt = things + (f", {style} style" if style else "")
    style = style or rng.choice(EMOJI_STYLES)
    parts: list[Part] = []
    for concept in rng.sample(shelf.of_category[category], number):
        entry = shelf.any_of(concept, rng, style)
        parts += [Text(entry.name), shelf.show(entry, rng)]
    return turn([Text(prompt)], *parts)


def make_restyled(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """A picture and "in noto style" → its name and the picture in that style."""
    concept = rng.choice(shelf.names)
    styles = shelf.concepts[concept]
    others = [style for style in styles if style in EMOJI_STYLES]
    if len(others) < 2:
        return None
    before, after = rng.sample(sorted(others), 2)
    if not shelf.is_used("style", concept, after):
        return None
    shown, wanted = (rng.choice(styles[style]) for style in (before, after))
    wording = rng.choice(("in {} style", "the same in {} style", "{} style")).format(after)
    return turn([shelf.show(shown, rng), Text(wording)], Text(wanted.name), shelf.show(wanted, rng))


def make_recoloured(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """A picture and "in blue" → "blue book" and the picture in that colour."""
    entry = shelf.any_of(rng.choice(shelf.names), rng)
    thing = thing_of(entry)
    colour = rng.choice(sorted(TARGETS))
    if thing is None or is_held_out_pair(colour, thing) or not shelf.is_used("colour", thing, colour):
        return None
    picture = shelf.view(entry, rng)
    turned = recolour(picture, colour)
    if main_colour(turned) != colour:
        return None
    wording = rng.choice(("in {}", "the same in {}", "make it {}")).format(colour)
    return turn([Image(picture), Text(wording)], Text(f"{colour} {thing}"), Image(turned))


class Rebus(NamedTuple):
    """A sentence with gaps, the pictures that fill them, and the sentence with their names in the gaps."""

    template: str
    entries: list[LabelledPicture]
    sentence: str


def make_rebus(shelf: Shelf, rng: random.Random) -> Rebus | None:
    """Return a random rebus, or None where its pictures belong to the other split."""
    template = rng.choice(REBUSES)
    concepts = rng.sample(shelf.plain, template.count("{}"))
    entries = [shelf.any_of(concept, rng) for concept in concepts]
    if not shelf.is_used("rebus", *(entry.name for entry in entries)):
        return None
    return Rebus(template, entries, template.format(*(with_article(entry.name) for entry in entries)))


def fill_with_pictures(rebus: Rebus, shelf: Shelf, rng: random.Random) -> list[Part]:
    """Return the sentence with the pictures in its gaps."""
    parts: list[Part] = []
    for index, text in enumerate(rebus.template.split("{}")):
        if text:
            parts.append(Text(text))
        if index < len(rebus.entries):
            parts.append(shelf.show(rebus.entries[index], rng))
    return parts


def make_read_rebus(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """A sentence in which pictures stand for words → the sentence in words."""
    rebus = make_rebus(shelf, rng)
    return rebus and turn([Text("read: "), *fill_with_pictures(rebus, shelf, rng)], Text(rebus.sentence))


def make_written_rebus(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """A sentence → the same with pictures for some words."""
    rebus = make_rebus(shelf, rng)
    return rebus and turn([Text(f"as a rebus: {rebus.sentence}")], *fill_with_pictures(rebus, shelf, rng))


def make_odd_one_out(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """Three or four pictures, one of another kind → which, its name, and the picture again."""
    number = rng.randint(3, 4)
    common, other = rng.sample(sorted(group for group, members in shelf.of_group.items() if len(members) >= number), 2)
    concepts = rng.sample(shelf.of_group[common], number - 1)
    odd, place = rng.choice(shelf.of_group[other]), rng.randrange(number)
    if not shelf.is_used("odd", odd, common):
        return None
    concepts.insert(place, odd)
    entries = [shelf.any_of(concept, rng) for concept in concepts]
    pictures = [shelf.show(entry, rng) for entry in entries]
    answer = f"the {ORDINALS[place]}: {entries[place].name}. The others are {group_words(entries[place - 1])}."
    return turn([*pictures, Text("which does not belong?")], Text(answer), pictures[place])


def make_comparison(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """Two pictures and a question about both."""
    kind = rng.choice(("same", "which", "common"))
    first = shelf.any_of(rng.choice(shelf.names), rng)
    if kind == "same":
        concept = first.concept if rng.random() < 0.5 else rng.choice(shelf.of_group[first.group])
        second = shelf.any_of(concept, rng)
        question, answer = "do both show the same?", "yes" if second.name == first.name else "no"
    elif kind == "which":
        second = shelf.any_of(rng.choice(shelf.names), rng)
        if second.name == first.name:
            return None
        place = rng.randrange(2)
        question = f"which is {with_article((first, second)[place].name)}?"
        answer = f"the {ORDINALS[place]}"
    else:
        second = shelf.any_of(rng.choice(shelf.names if rng.random() < 0.5 else shelf.of_group[first.group]), rng)
        question = "are both of one kind?"
        kinds = [group_words(entry) for entry in (first, second)]
        answer = f"yes: {kinds[0]}" if kinds[0] == kinds[1] else f"no: {kinds[0]}; {kinds[1]}"
    if not shelf.is_used("comparison", first.name, second.name):
        return None
    return turn([shelf.show(first, rng), shelf.show(second, rng), Text(question)], Text(answer))


def make_story(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """ "a story about a fox" → sentences, each followed by the picture of what it tells of."""
    template = rng.choice(STORIES)
    parts: list[Part] = []
    names: list[str] = []
    for sentence in template:
        pictures: list[Part] = []
        for kind in [piece.split("}")[0] for piece in sentence.split("{")[1:]]:
            if kind.lower() not in shelf.of_story_kind:
                return None
            entry = shelf.any_of(rng.choice(shelf.of_story_kind[kind.lower()]), rng)
            name = entry.name if kind.lower() == "sport" else with_article(entry.name)
            sentence = sentence.replace(f"{{{kind}}}", name[0].upper() + name[1:] if kind[0].isupper() else name, 1)
            names.append(entry.name)
            pictures.append(shelf.show(entry, rng))
        parts += [Text(sentence), *pictures]
    if len(names) > 4 or not shelf.is_used("story", names[0], len(names)):
        return None
    return turn([Text(f"a story about {with_article(names[0])}")], *parts)


def make_page(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """ "tell me about a fox" → kind and keywords, the picture, its name and style.

    In training the prompt is sometimes the name alone, for requests that fix the form of the answer.
    """
    entry = shelf.any_of(rng.choice(shelf.names), rng)
    if not shelf.is_used("page", entry.name):
        return None
    is_asked = shelf.split == "validation" or rng.random() < 0.8
    prompt = f"tell me about {with_article(entry.name)}" if is_asked else entry.name
    about = f"{entry.name}: {group_words(entry)}" + (f" ({', '.join(entry.tags[:3])})" if entry.tags else "")
    return turn([Text(prompt)], Text(about), shelf.show(entry, rng), Text(f"{entry.name}, {entry.style} style"))


class Edit(NamedTuple):
    """Pictures, what is to be done to them, and the picture that this makes."""

    kind: str
    """colour, tone, style or together."""
    pictures: list[PILImage.Image]
    instruction: str
    result: PILImage.Image
    names: tuple[str, ...]
    """What the pictures show."""
    attribute: str = ""
    """The colour, tone or style that the result is to have."""


EDIT_WORDINGS = {
    "colour": ("paint it {}", "change its colour to {}", "turn it {}"),
    "tone": ("give it {} skin", "change the skin tone to {}"),
    "style": ("redraw it in {} style", "change it to {} style"),
    "together": ("put them side by side", "show both in one picture"),
}


def make_edit(shelf: Shelf, rng: random.Random) -> Edit | None:
    """Return a random edit, or None where the random choices make none of this split.

    Before and after have the same shift, zoom and mirroring, so that nothing else changes.
    """
    kind = rng.choice(sorted(EDIT_WORDINGS))
    entry = shelf.picture_to_edit(kind, rng)
    seed, wording = rng.random(), rng.choice(EDIT_WORDINGS[kind])
    before = shelf.view(entry, random.Random(seed))
    if kind == "together":
        other = shelf.picture_to_edit(kind, rng)
        pictures, both = [before, shelf.view(other, random.Random(seed))], (entry.name, other.name)
        return Edit(kind, pictures, wording, side_by_side(*pictures), both) if shelf.is_used("edit", *both) else None
    if kind == "colour":
        thing, attribute = thing_of(entry), rng.choice(sorted(TARGETS))
        after = recolour(before, attribute)
        if thing is None or is_held_out_pair(attribute, thing) or main_colour(after) != attribute:
            return None
    else:
        others = shelf.other_styles(entry) if kind == "style" else shelf.tones.get((entry.style, entry.base), {})
        if not others:
            return None
        attribute = rng.choice(sorted(others))
        after = shelf.view(others[attribute], random.Random(seed))
    if not shelf.is_used("edit", entry.name, attribute):
        return None
    return Edit(kind, [before], wording.format(attribute), after, (entry.name,), attribute)


def side_by_side(left: PILImage.Image, right: PILImage.Image) -> PILImage.Image:
    """Return two pictures of one size beside each other on white, in the size of one."""
    width, height = left.size
    both = PILImage.new("RGB", (width, height), "white")
    for index, picture in enumerate((left, right)):
        half = picture.resize((width // 2, height // 2), PILImage.Resampling.LANCZOS)
        both.paste(half, (index * (width // 2), height // 4))
    return both


def make_edited(shelf: Shelf, rng: random.Random) -> Conversation | None:
    """Pictures and an instruction → the changed picture alone."""
    edit = make_edit(shelf, rng)
    return edit and turn([*map(Image, edit.pictures), Text(edit.instruction)], Image(edit.result))


DOCUMENT_MAKERS: dict[str, Maker] = {
    "lists": make_list,
    "restyling": make_restyled,
    "recolouring": make_recoloured,
    "rebus_reading": make_read_rebus,
    "rebus_writing": make_written_rebus,
    "odd_one_out": make_odd_one_out,
    "comparing": make_comparison,
    "stories": make_story,
    "pages": make_page,
}


MAKERS: dict[str, Maker] = {**DOCUMENT_MAKERS, "editing": make_edited}


def first_made(make: Callable[[random.Random], Made | None], key: str) -> Made | None:
    """Return what a maker gives at the first of `MAX_TRIES` random choices that make anything; else None.

    Raises `BadInput` where there are too few pictures to choose from.
    """
    results = (make(random.Random(f"{key} {attempt}")) for attempt in range(MAX_TRIES))
    try:
        return next((result for result in results if result is not None), None)
    except BadInput:
        raise
    except (IndexError, ValueError) as error:  # of `random`
        raise BadInput(f"too few concepts ({error})", where=key, remedy="ask for more") from error


def edits(
    pictures: Sequence[LabelledPicture],
    count: int,
    seed: int,
    view: View,
    split: str = "train",
    shown: Sequence[LabelledPicture] | None = None,
) -> Iterator[Edit]:
    """Yield `count` edits of a split, or of the pictures `shown`; fewer where `MAX_TRIES` random choices make none."""
    shelf = Shelf(pictures, view, split, shown)
    for index in range(count):
        edit = first_made(partial(make_edit, shelf), f"{seed} edit {index}")
        if edit is not None:
            yield edit


def conversations(
    name: str, pictures: Sequence[LabelledPicture], count: int, seed: int, view: View = augment, split: str = "train"
) -> Iterator[Conversation]:
    """Yield `count` conversations of the task `name`; fewer where `MAX_TRIES` random choices make none."""
    shelf = Shelf(pictures, view, split)
    for index in range(count):
        conversation = first_made(partial(MAKERS[name], shelf), f"{seed} {name} {index}")
        if conversation is not None:
            yield conversation
