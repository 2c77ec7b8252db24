"""Tasks about one picture: documents and conversations that teach to caption, to answer and to draw.

Each task first draws its picture from the generator, so that with one seed all tasks show the same pictures, and those are
encoded once. `view` names how pictures are shown (`VIEWS`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache

from PIL import Image as PILImage

from chameleon.data.colours import COLOUR_WORD, TARGETS, main_colour, recolour
from chameleon.data.emoji import STYLES as EMOJI_STYLES
from chameleon.data.emoji import names_in_languages
from chameleon.data.labelled import (
    WITHOUT_RECOLOURING,
    LabelledPicture,
    View,
    augment,
    by_concept,
    far_view,
    hashed_share,
    near_view,
    plain_view,
    sample_by_concept,
    strong_view,
    warped_view,
    wide_view,
)
from chameleon.data.questions import (
    NAME_QUESTIONS,
    Neighbours,
    Question,
    choice_question,
    group_words,
    is_plain_name,
    questions_about,
    with_article,
    without_colour,
)
from chameleon.document import Conversation, Document, Image, Message, Part, Text

VIEWS: dict[str, View] = {
    "plain": plain_view,
    "near": near_view,
    "augmented": augment,
    "warped": warped_view,
    "wide": wide_view,
    "far": far_view,
    "strong": strong_view,
}
"""How pictures are shown: as they are, nearly so, augmented, also bent; augmented or bent and also in other styles; also in
other colours."""
CHANGED_BY_VIEW: dict[View, set[str]] = {wide_view: {"style"}, far_view: {"style"}, strong_view: {"style", "colour"}}
"""View → questions that are not asked about pictures that it shows."""
EMPTY_PROMPT_SHARE = 0.1
"""Share of drawings whose prompt is empty, for classifier-free guidance."""
HELD_OUT_PAIR_SHARE = 0.12
"""Share of the pairs of a colour and a thing for which pictures are not recoloured, neither to draw nor to ask about.

Pictures that have such a colour by themselves are shown ("green book"), and strong views show things in any colour.
"""
OTHER_WORD_SHARE = 0.2
"""Share of the prompts "COLOUR THING" that have a keyword or the last word of the name for the thing."""
DRAWING_PROMPTS = {
    "de": "zeichne: {}",
    "es": "dibuja: {}",
    "fr": "dessine : {}",
    "it": "disegna: {}",
    "ja": "{}を描いて",
    "ko": "{} 그려줘",
    "pl": "narysuj: {}",
    "pt": "desenhe: {}",
    "sv": "rita: {}",
    "uk": "намалюй: {}",
    "zh": "画{}",
}
"""Language → "draw NAME"."""
WITHOUT_HUE = (None, "black", "grey", "white")


def user(*content: Part) -> Message:
    return Message("user", Document(content))


def assistant(*content: Part) -> Message:
    return Message("assistant", Document(content))


def turn(prompt: Sequence[Part], *answer: Part) -> Conversation:
    return Conversation((user(*prompt), assistant(*answer)))


# --- captions and answers --------------------------------------------------------------------------------------------


def pairs(pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment) -> Iterator[Document]:
    """Yield pictures with captions; one in ten has no caption, so that the model also learns pictures alone."""
    for entry, rng in sample_by_concept(pictures, per_concept, seed):
        picture = Image(view(entry, rng))
        yield Document((picture,) if rng.random() < 0.1 else (picture, Text(entry.caption)))


def captioning(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield a picture as the prompt, and its caption as the answer."""
    for entry, rng in sample_by_concept(pictures, per_concept, seed):
        yield turn([Image(view(entry, rng))], Text(entry.caption))


def answering(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield questions about one picture as one conversation, the format of LLaVA-1.5's VQA data (arXiv 2310.03744).

    Their order is random, so that each kind of question also occurs without others before it. The name comes last, if at
    all, since it would give the other answers away. What a view changes is not asked for.
    """
    for entry, rng in sample_by_concept(pictures, per_concept, seed):
        picture = Image(view(entry, rng))
        name_question, *others = questions_about(entry, rng)
        others = [question for question in others if question.family not in CHANGED_BY_VIEW.get(view, ())]
        rng.shuffle(others)
        if rng.random() < 0.25:
            others = [*others, name_question] if rng.random() < 0.5 else [name_question]
        yield interview(picture, [question.reworded(rng) for question in others])


def interview(picture: Part, asked: Sequence[Question]) -> Conversation:
    """Return questions about one picture as one conversation."""
    messages = []
    for index, question in enumerate(asked):
        content = (picture, Text(question.question)) if index == 0 else (Text(question.question),)
        messages += [user(*content), assistant(Text(question.answer))]
    return Conversation(tuple(messages))


def choosing(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield questions between what is shown and what is easily mistaken for it: "is it a wolf?", "fox or wolf?"."""
    neighbours = Neighbours(pictures)
    for entry, rng in sample_by_concept(pictures, per_concept, seed):
        picture = Image(view(entry, rng))
        asked: list[Question] = []
        while len(asked) < 3 and all(question.answer == "no" for question in asked):  # other answers give the name away
            asked.append(choice_question(entry, neighbours, rng))
        yield interview(picture, asked)


def translating(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield "what is it?" in eleven languages, answered in the same language."""
    names = names_in_languages()
    for entry, rng in sample_by_concept(pictures, per_concept, seed):
        picture = Image(view(entry, rng))
        named = names.get(entry.base, {})
        languages = [language for language in NAME_QUESTIONS if language in named]
        if languages:
            language = rng.choice(languages)
            yield turn([picture, Text(NAME_QUESTIONS[language])], Text(named[language]))


def toning(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield questions about the skin tone of pictures that have one, all tones equally often."""
    for concept, members in by_concept(entry for entry in pictures if entry.has_skin_tones).items():
        tones: dict[str, list[LabelledPicture]] = {}
        for entry in members:
            if entry.skin_tone != "mixed":
                tones.setdefault(entry.skin_tone or "", []).append(entry)
        for index in range(per_concept):
            rng = random.Random(f"{seed} {concept} {index}")
            entry = rng.choice(tones[rng.choice(sorted(tones))])
            asked = next(question for question in questions_about(entry) if question.family == "skin tone")
            yield interview(Image(view(entry, rng)), [asked.reworded(rng)])


# --- drawings --------------------------------------------------------------------------------------------------------


def drawing(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield a caption as the prompt, in half of the cases with the style, and the picture as the answer.

    The style of clip art is always named. One prompt in ten is empty, for classifier-free guidance.
    """
    for entry, rng in sample_by_concept(pictures, per_concept, seed):
        picture = Image(view(entry, rng))
        prompt = with_style(entry.caption, entry, rng)
        yield turn([] if rng.random() < EMPTY_PROMPT_SHARE else [Text(prompt)], picture)


def with_style(words: str, entry: LabelledPicture, rng: random.Random) -> str:
    """Return the words with the picture's style: always for clip art, else in half of the cases."""
    is_named = entry.style not in EMOJI_STYLES or rng.random() < 0.5
    return f"{words}, {entry.style} style" if is_named else words


def wording(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield drawings by prompts in other wordings: sentences, keywords, kinds, other languages."""
    names = names_in_languages()
    for entry, rng in sample_by_concept(pictures, per_concept, seed):
        picture = Image(view(entry, rng))
        yield turn([Text(other_prompt(entry, names.get(entry.base, {}), rng))], picture)


def other_prompt(entry: LabelledPicture, named: dict[str, str], rng: random.Random) -> str:
    """Return a prompt for a picture that is not its caption."""
    languages = [language for language in DRAWING_PROMPTS if language in named]
    kind = rng.random()
    if kind < 0.3 and languages and not entry.is_variant:
        language = rng.choice(languages)
        template = DRAWING_PROMPTS[language] if rng.random() < 0.5 else "{}"
        return template.format(named[language])
    if kind < 0.45 and entry.tags:
        tags = rng.sample(entry.tags, min(len(entry.tags), rng.randint(1, 3)))
        return with_style(", ".join([*tags, entry.name] if rng.random() < 0.5 else tags), entry, rng)
    if kind < 0.5:
        return with_style(f"{group_words(entry)}: {entry.caption}", entry, rng)
    article_name = with_article(entry.name) + entry.caption.removeprefix(entry.name)
    template = rng.choice(("draw {}", "a picture of {}", "show me {}", "please draw {}", "{}"))
    return with_style(template.format(article_name), entry, rng)


def styling(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield drawings by prompts that name the style: after the name, after the kind, or alone.

    What a style looks like is then learned apart from what is drawn in it.
    """
    for entry, rng in sample_by_concept(pictures, per_concept, seed):
        picture = Image(view(entry, rng))
        named = rng.choice((f"{entry.caption}, ", f"{entry.caption}, ", f"{group_words(entry)}, ", ""))
        yield turn([Text(f"{named}{entry.style} style")], picture)


# --- colours ---------------------------------------------------------------------------------------------------------


def thing_of(entry: LabelledPicture) -> str | None:
    """Return what the picture shows, without its colour; None where it cannot be shown in another colour."""
    thing = without_colour(entry.name)
    has_fixed_colour = entry.group in WITHOUT_RECOLOURING or entry.is_variant or entry.colour in WITHOUT_HUE
    return None if has_fixed_colour or not is_plain_name(thing) else thing


@cache
def colour_of(entry: LabelledPicture) -> str | None:
    return main_colour(entry.picture)


def is_held_out_pair(colour: str, thing: str) -> bool:
    """Whether no picture of the thing is given this colour, to be drawn or to be asked for its colour."""
    return hashed_share("colour and thing", colour, thing) < HELD_OUT_PAIR_SHARE


def recoloured(entry: LabelledPicture, rng: random.Random, view: View) -> tuple[PILImage.Image, str] | None:
    """Return the picture in a random colour that it may have, and that colour; None where it takes none.

    In one case of four it keeps its own.
    """
    thing = thing_of(entry)
    if thing is None:
        return None
    picture = view(entry, rng)
    own = colour_of(entry)
    if own is not None and rng.random() < 0.25:
        return (picture, own) if main_colour(picture) == own else None  # a view may change colours, or what is visible
    colour = rng.choice([name for name in TARGETS if name == own or not is_held_out_pair(name, thing)])
    turned = recolour(picture, colour)
    return (turned, colour) if main_colour(turned) == colour else None


def colouring(
    pictures: Sequence[LabelledPicture], per_concept: int, seed: int, view: View = augment
) -> Iterator[Conversation]:
    """Yield drawings of "COLOUR THING" in any colour, and the question for the colour about them."""
    for entry, rng in sample_by_concept([entry for entry in pictures if thing_of(entry)], per_concept, seed):
        shown = recoloured(entry, rng, view)
        if shown is None:
            continue
        picture, colour = shown
        if rng.random() < 0.4:
            yield interview(Image(picture), [Question("colour", "which colour is it?", colour).reworded(rng)])
        else:
            thing = other_word(entry, colour, rng) if rng.random() < OTHER_WORD_SHARE else thing_of(entry)
            yield turn([Text(with_style(f"{colour} {thing}", entry, rng))], Image(picture))


def other_word(entry: LabelledPicture, colour: str, rng: random.Random) -> str:
    """Return the last word of a thing's name, or a keyword: "hat" for "top hat"; the thing itself where there is none.

    Words that are kept out of training in this colour, or name a colour, are not among them.
    """
    thing = str(thing_of(entry))
    words = sorted({thing.split(" ")[-1], *entry.tags} - {thing})
    usable = [word for word in words if is_plain_name(word) and not COLOUR_WORD.search(word)]
    return rng.choice([word for word in usable if not is_held_out_pair(colour, word)] or [thing])
