"""Questions about one picture, with their answers, in several wordings; and the words for kinds of things."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chameleon.data.colours import COLOURS
from chameleon.data.labelled import NO_TONE, LabelledPicture

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
YES_NO = {"flags": "is it a flag?", "animals-nature": "is it an animal or plant?", "food-drink": "is it food or drink?"}
WORDINGS = {
    "what is it?": ("what is this?", "what does the picture show?", "name it"),
    "what kind of thing is it?": ("what kind of thing is this?", "which kind?"),
    "which style is it?": ("which style is this?", "in which style is it drawn?", "style?"),
    "which skin tone?": ("which skin tone is it?", "skin tone?"),
    "which colour is it?": ("what colour is it?", "which colour?", "colour?"),
    "is it a flag?": ("a flag?", "does it show a flag?"),
    "is it an animal or plant?": ("an animal or a plant?", "does it show an animal or a plant?"),
    "is it food or drink?": ("food or drink?", "can one eat or drink it?"),
}
"""A question → other wordings of it."""
OTHER_WORDING_SHARE = 0.3
NAME_QUESTIONS = {
    "de": "was ist das?",
    "es": "¿qué es?",
    "fr": "qu'est-ce que c'est ?",
    "it": "che cos'è?",
    "ja": "これは何ですか?",
    "ko": "이것은 무엇입니까?",
    "pl": "co to jest?",
    "pt": "o que é isto?",
    "sv": "vad är det?",
    "uk": "що це?",
    "zh": "这是什么?",
}
"""Language → "what is it?"."""
CATEGORIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("animal", "animals", ("animal-",)),
    ("mammal", "mammals", ("animal-mammal",)),
    ("bird", "birds", ("animal-bird",)),
    ("insect or other bug", "insects and other bugs", ("animal-bug",)),
    ("sea animal", "sea animals", ("animal-marine",)),
    ("reptile", "reptiles", ("animal-reptile",)),
    ("plant", "plants", ("plant-",)),
    ("flower", "flowers", ("plant-flower",)),
    ("food", "foods", ("food-",)),
    ("fruit", "fruits", ("food-fruit",)),
    ("vegetable", "vegetables", ("food-vegetable",)),
    ("sweet", "sweets", ("food-sweet",)),
    ("drink", "drinks", ("drink",)),
    ("flag", "flags", ("country-flag",)),
    ("face", "faces", ("face-",)),
    ("heart", "hearts", ("heart",)),
    ("vehicle", "vehicles", ("transport-ground", "transport-air", "transport-water", "vehicle")),
    ("building", "buildings", ("place-building", "place-religious", "building")),
    ("piece of clothing", "pieces of clothing", ("clothing",)),
    ("tool", "tools", ("tool",)),
    ("sport", "sports", ("sport",)),
    ("musical instrument", "musical instruments", ("musical-instrument", "music")),
    ("game", "games", ("game",)),
    ("household thing", "household things", ("household",)),
    ("zodiac sign", "zodiac signs", ("zodiac",)),
    ("arrow", "arrows", ("arrow",)),
    ("shape", "shapes", ("geometric",)),
    ("profession", "professions", ("person-role",)),
    ("fantasy figure", "fantasy figures", ("person-fantasy",)),
    ("thing in the sky", "things in the sky", ("sky-weather",)),
)
"""(singular, plural, beginnings of the subgroups) of kinds of things that documents ask for."""
LEADING_COLOUR = re.compile(rf"(?:light |dark )?(?:{'|'.join(COLOURS)}) ")


@dataclass(frozen=True)
class Question:
    """A question about one picture. `family` names the metric that its answer counts towards."""

    family: str
    question: str
    answer: str

    def reworded(self, rng: random.Random) -> Question:
        """Return it in another wording in `OTHER_WORDING_SHARE` of the cases."""
        others = WORDINGS.get(self.question)
        if others is None or rng.random() >= OTHER_WORDING_SHARE:
            return self
        return Question(self.family, rng.choice(others), self.answer)


def with_article(name: str) -> str:
    """Return "a name" or "an name"; a plural, or a name that begins with a capital, as it is."""
    last_word = name.split(" ")[-1]
    is_plural = last_word.endswith("s") and not last_word.endswith(("ss", "us", "is"))
    if is_plural or name[:1].isupper():
        return name
    sounds_like_vowel = name[0] in "aeiou" and not name.startswith(("uni", "uk", "one"))
    return f"{'an' if sounds_like_vowel else 'a'} {name}"


def is_plain_name(name: str) -> bool:
    """Whether a name fits into a sentence: up to three words of letters."""
    return bool(re.fullmatch(r"[a-z-]+( [a-z-]+){0,2}", name))


def without_colour(name: str) -> str:
    """Return a name without the colour that it begins with: "heart" for "red heart"."""
    match = LEADING_COLOUR.match(name)
    return name[match.end() :] if match else name


def categories_of(entry: LabelledPicture) -> list[int]:
    """Return the indices in `CATEGORIES` of the kinds that a picture is of."""
    return [index for index, (_, _, starts) in enumerate(CATEGORIES) if entry.subgroup.startswith(starts)]


def group_words(entry: LabelledPicture) -> str:
    """Return the answer to "what kind of thing is it?"."""
    return GROUP_WORDS[entry.group]


def questions_about(entry: LabelledPicture, rng: random.Random | None = None) -> list[Question]:
    """Return the questions that can be asked about the picture.

    With a random generator they include one random yes-no question, whose answers are balanced where the group allows;
    without, all of them.
    """
    result = [
        Question("name", "what is it?", entry.name),
        Question("group", "what kind of thing is it?", group_words(entry)),
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


class Neighbours:
    """Pictures that are easily mistaken for one another: those of the same subgroup."""

    def __init__(self, pictures: Sequence[LabelledPicture]) -> None:
        names: dict[str, set[str]] = {}
        for entry in pictures:
            names.setdefault(entry.subgroup, set()).add(entry.name)
        self.names: Mapping[str, list[str]] = {subgroup: sorted(members) for subgroup, members in names.items()}
        self.all_names = sorted({entry.name for entry in pictures})

    def other_name(self, entry: LabelledPicture, rng: random.Random) -> str:
        """Return the name of something else, of the same subgroup in three quarters of the cases."""
        near = self.names.get(entry.subgroup, [])
        choices = near if len(near) > 1 and rng.random() < 0.75 else self.all_names
        while True:
            name = rng.choice(choices)
            if name != entry.name:
                return name


def choice_question(entry: LabelledPicture, neighbours: Neighbours, rng: random.Random) -> Question:
    """Return "is it NAME?" with answers that are balanced, or "NAME or OTHER NAME?"."""
    other = neighbours.other_name(entry, rng)
    if rng.random() < 0.5:
        is_yes = rng.random() < 0.5
        return Question("choice", f"is it {with_article(entry.name if is_yes else other)}?", "yes" if is_yes else "no")
    pair = [entry.name, other]
    rng.shuffle(pair)
    return Question("choice", f"{pair[0]} or {pair[1]}?", entry.name)
