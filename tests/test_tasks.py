"""The embedded sets, their augmentation, and the tasks over them: what they say is true, what is held out stays out."""

from __future__ import annotations

import colorsys
import random
from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageDraw

from chameleon.data import clipart, embedded_source, emoji, labelled, mixed_tasks, picture_tasks
from chameleon.data.augmentation import change_style, erase_part, stretch, warp
from chameleon.data.colours import COLOURS, HUES, TARGETS, colour_indices, from_hsv, hsv, main_colour, recolour
from chameleon.data.embedded_source import MIXED_TASKS, ONE_PICTURE_TASKS
from chameleon.data.labelled import LabelledPicture
from chameleon.data.questions import CATEGORIES, GROUP_WORDS, with_article, without_colour
from chameleon.document import Conversation, Document, Image, Text
from chameleon.errors import BadInput

components = st.tuples(*[st.integers(0, 255)] * 3)


@cache
def by_pixels() -> dict[bytes, LabelledPicture]:
    return {entry.picture.tobytes(): entry for entry in (*chosen_emoji(), *clipart.load("train"))}


@cache
def chosen_emoji() -> tuple[LabelledPicture, ...]:
    return emoji.subset("train", 300)


def shown(part: object) -> LabelledPicture:
    """The entry of a picture that is shown plainly."""
    assert isinstance(part, Image) and isinstance(part.image, PILImage.Image)
    return by_pixels()[part.image.tobytes()]


def sides(conversation: Conversation) -> tuple[Document, Document]:
    prompt, answer = conversation.messages
    return prompt.content, answer.content


# --- colours ---------------------------------------------------------------------------------------------------------


@given(components)
def test_hsv_equals_colorsys_and_comes_back(colour: tuple[int, int, int]) -> None:
    pixel = np.array(colour) / 255
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    np.testing.assert_allclose(hsv(pixel), (hue * 360 % 360, saturation, value), atol=1e-3)
    np.testing.assert_allclose(from_hsv(hsv(pixel)), pixel, atol=1e-4)


@given(components)
def test_colour_names_follow_the_table(colour: tuple[int, int, int]) -> None:
    hue, saturation, value = colorsys.rgb_to_hsv(*(component / 255 for component in colour))
    if value < 0.22:
        expected = "black"
    elif saturation < 0.16:
        expected = "white" if value > 0.85 else "grey"
    else:
        expected = next(name for limit, name in HUES if hue * 360 < limit)
        if (expected == "orange" and value < 0.72) or (expected == "red" and value < 0.5):
            expected = "brown"
    edges = [abs(hue * 360 - limit) for limit, _ in HUES] + [abs(v - e) for v, e in ((value, 0.22), (saturation, 0.16))]
    if min(edges) > 1e-3:  # at an edge float32 may round to either side
        assert COLOURS[int(colour_indices(np.array(colour) / 255))] == expected


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("colour", ["#d22", "#2a5", "#36c", "#e92"])
def test_a_recoloured_disc_has_the_colour(target: str, colour: str) -> None:
    picture = PILImage.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((8, 8, 56, 56), fill=colour)
    turned = recolour(picture, target)
    assert main_colour(turned) == target
    assert turned.getpixel((1, 1)) == (255, 255, 255)


def test_a_changed_style_keeps_size_background_and_colour() -> None:
    picture = PILImage.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((8, 8, 56, 56), fill="#36c")
    kept = [main_colour(change_style(picture, random.Random(seed))) for seed in range(60)]
    assert change_style(picture, random.Random(0)).size == (64, 64)
    assert kept.count("blue") >= 45  # thick outlines and tinted backgrounds may be larger than the disc
    assert len({change_style(picture, random.Random(seed)).tobytes() for seed in range(20)}) == 20
    any_hue = Counter(main_colour(change_style(picture, random.Random(seed), max_hue=180)) for seed in range(60))
    assert len(any_hue) >= 5


# --- the sets --------------------------------------------------------------------------------------------------------


def test_warping_moves_things_by_little() -> None:
    """A mark moves by at most a tenth of the side; only white comes in from outside; it depends on the seed."""
    marked = PILImage.new("RGB", (64, 64), "white")
    marked.paste((0, 0, 0), (30, 30, 34, 34))
    moved = set()
    for seed in range(30):
        bent = np.asarray(warp(marked, random.Random(seed)).convert("L"), dtype=np.float64)
        darkness = 255 - bent
        rows, columns = np.mgrid[:64, :64]
        centre = [float((axis * darkness).sum() / darkness.sum()) for axis in (rows, columns)]
        assert max(abs(value - 31.5) for value in centre) < 6.4
        assert darkness.sum() == pytest.approx(16 * 255, rel=0.6) and (bent[[0, -1]] == 255).all()
        moved.add(tuple(round(value, 3) for value in centre))
    assert len(moved) == 30
    black = np.asarray(warp(PILImage.new("RGB", (64, 64), "black"), random.Random(0)))
    assert (black[24:40, 24:40] == 0).all()


def test_stretching_and_erasing_stay_within_their_limits() -> None:
    """Of a black square one side shrinks by a quarter at most; one white rectangle of up to 40% is erased."""
    black, shapes = PILImage.new("RGB", (64, 64), "black"), []
    for seed in range(40):
        dark = np.asarray(stretch(black, random.Random(seed)).convert("L")) < 128
        shapes.append((int(dark.any(0).sum()), int(dark.any(1).sum())))
        sides = sorted(shapes[-1])
        assert sides[1] == 64 and 48 <= sides[0] <= 64 and dark.sum() == sides[0] * 64
        erased = np.asarray(erase_part(black, random.Random(seed)).convert("L")) > 128
        height, width = int(erased.any(1).sum()), int(erased.any(0).sum())
        assert erased.sum() == height * width and 9 <= min(height, width) <= max(height, width) <= 26
    assert min(width for width, _ in shapes) < 52 and min(height for _, height in shapes) < 52


def test_strong_views_keep_the_colours_of_what_is_called_by_them() -> None:
    """Colours of flags, of people and of names with a colour stay; those of other things become all sorts."""
    everything = {entry.name: entry for entry in emoji.load("train") if entry.style == "twemoji" and not entry.is_variant}
    names = ("red heart", "green salad", "flag: Japan", "thumbs up", "family: man, girl, boy", "rainbow")
    fixed = [everything[name] for name in names]
    fixed += [entry for entry in clipart.load() if entry.name in ("gold heart", "violet folder", "bald man head")]
    assert len({entry.name for entry in fixed}) == 9 and not any(entry.may_change_colours for entry in fixed)
    assert everything["strawberry"].may_change_colours and everything["credit card"].may_change_colours
    hues = [main_colour(labelled.strong_view(everything["strawberry"], random.Random(seed))) for seed in range(60)]
    red = [main_colour(labelled.strong_view(everything["red heart"], random.Random(seed))) for seed in range(60)]
    assert len(set(hues)) >= 6 and red.count("red") >= 45
    asked = {"strong": set(), "warped": set()}
    for view, families in asked.items():
        for conversation in picture_tasks.answering(chosen_emoji(), 4, 0, picture_tasks.VIEWS[view]):
            families.update(message.content.text for message in conversation.messages[::2])
    assert not any("style" in question or "colour" in question for question in asked["strong"])
    assert {"which style is it?", "which colour is it?"} <= asked["warped"]


def test_clip_art_is_complete_and_labelled() -> None:
    everything = clipart.load()
    assert len(everything) == 3706 and {entry.picture.size for entry in everything[:50]} == {(64, 64)}
    assert {entry.style for entry in everything} == set(clipart.STYLES)
    assert all(entry.name and entry.author and entry.group in GROUP_WORDS for entry in everything)
    assert len({entry.key for entry in everything}) == len(everything)
    held_out, seen = ({entry.name for entry in clipart.load(split)} for split in ("validation", "train"))
    assert not held_out & seen and 0.03 < len(held_out) / len(held_out | seen) < 0.07


def test_names_in_sentences() -> None:
    names = {"owl": "an owl", "unicorn": "a unicorn", "grapes": "grapes", "bus": "a bus", "Saturn": "Saturn"}
    assert {name: with_article(name) for name in names} == names
    assert [without_colour(name) for name in ("red heart", "light blue heart", "redwood")] == ["heart", "heart", "redwood"]


# --- tasks about one picture -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(ONE_PICTURE_TASKS))
def test_tasks_repeat_themselves(task: str) -> None:
    function = ONE_PICTURE_TASKS[task]
    pictures = emoji.subset("train", 40)
    first, again, other = (list(function(pictures, 2, seed, labelled.plain_view)) for seed in (1, 1, 2))
    assert first == again and first != other


def test_choices_are_true_and_balanced() -> None:
    answers = Counter()
    for conversation in picture_tasks.choosing(chosen_emoji(), 2, 0, labelled.plain_view):
        entry = shown(conversation.messages[0].content.parts[0])
        for asked, given_answer in zip(conversation.messages[::2], conversation.messages[1::2], strict=True):
            question, answer = asked.content.text, given_answer.content.text
            if question.startswith("is it "):
                assert (answer == "yes") == (question == f"is it {with_article(entry.name)}?")
                answers[answer] += 1
            else:
                assert answer == entry.name and entry.name in question
    assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_tones_are_asked_equally_often() -> None:
    conversations = picture_tasks.toning(emoji.load("train"), 3, 0, labelled.plain_view)
    answers = Counter(conversation.messages[1].content.text for conversation in conversations)
    assert set(answers) == {"none", "light", "medium-light", "medium", "medium-dark", "dark"}
    assert min(answers.values()) > 0.7 * max(answers.values())


@pytest.mark.parametrize("view", [labelled.plain_view, labelled.strong_view])
def test_colouring_shows_the_colour_and_never_a_held_out_pair(view: labelled.View) -> None:
    seen = set()
    for conversation in picture_tasks.colouring(chosen_emoji(), 12, 0, view):
        prompt, answer = sides(conversation)
        if answer.images:
            colour, _, thing = prompt.text.partition(",")[0].partition(" ")
            assert main_colour(answer.images[0]) == colour  # type: ignore[arg-type]
            seen.add((colour, thing))
        else:
            assert main_colour(prompt.images[0]) == answer.text  # type: ignore[arg-type]
    own = {(picture_tasks.colour_of(entry), picture_tasks.thing_of(entry)) for entry in chosen_emoji()}
    held_out = {pair for pair in seen if picture_tasks.is_held_out_pair(*pair)}
    assert len(seen) > 300 and held_out <= own


def test_things_in_colours_are_also_called_by_other_words() -> None:
    hat = next(entry for entry in emoji.load("train") if entry.name == "top hat")
    for colour in TARGETS:
        words = {picture_tasks.other_word(hat, colour, random.Random(seed)) for seed in range(90)}
        assert ("hat" in words) != picture_tasks.is_held_out_pair(colour, "hat")
        assert not any(picture_tasks.is_held_out_pair(colour, word) for word in words)
        assert "top hat" not in words and words - {"hat"} <= set(hat.tags)
    assert not all(picture_tasks.is_held_out_pair(colour, "hat") for colour in TARGETS)


def test_prompts_name_the_style_of_clip_art() -> None:
    drawings = [*picture_tasks.drawing(clipart.load("train")[:200], 1, 0, labelled.plain_view)]
    prompts = [prompt.text for prompt, _ in map(sides, drawings)]
    assert all(prompt == "" or prompt.endswith(("clip art style", "line art style")) for prompt in prompts)
    assert 0 < prompts.count("") < 0.2 * len(prompts)


# --- mixed tasks -----------------------------------------------------------------------------------------------------


def mixed(name: str, count: int = 60, split: str = "train") -> list[tuple[Document, Document]]:
    made = MIXED_TASKS[name](chosen_emoji(), count=count, seed=0, view=labelled.plain_view, split=split)
    return [sides(conversation) for conversation in made]


@pytest.mark.parametrize("task", sorted(MIXED_TASKS))
def test_prompts_for_evaluation_are_not_in_training(task: str) -> None:
    def key(pair: tuple[Document, Document]) -> tuple[str, ...]:
        prompt, answer = pair
        pictures = [shown(part).name for part in prompt.parts if isinstance(part, Image)]
        return (prompt.text, *pictures, *([answer.text] if task in ("restyling", "stories") else []))

    training, evaluation = ({key(pair) for pair in mixed(task, 80, split)} for split in ("train", "validation"))
    assert training and evaluation and not training & evaluation


def test_lists_are_not_asked_for_by_the_name_of_a_picture() -> None:
    """ "two hearts" is an emoji."""
    names = {entry.name for entry in chosen_emoji()} | {"two hearts"}
    every = MIXED_TASKS["lists"](emoji.load("train"), count=1500, seed=0, view=labelled.plain_view, split="train")
    prompts = {sides(conversation)[0].text.partition(",")[0] for conversation in every}
    assert {"three hearts", "two fruits"} <= prompts and not prompts & names


def test_lists_have_the_number_and_kind() -> None:
    for prompt, answer in mixed("lists"):
        number = 2 + mixed_tasks.NUMBERS.index(prompt.text.split(" ")[0])
        plural = prompt.text.partition(",")[0].partition(" ")[2]
        category = next(index for index, (_, name, _) in enumerate(CATEGORIES) if name == plural)
        assert [type(part) for part in answer.parts] == [Text, Image] * number
        for text, picture in zip(answer.parts[::2], answer.parts[1::2], strict=True):
            entry = shown(picture)
            assert isinstance(text, Text) and entry.name == text.text
            assert entry.subgroup.startswith(CATEGORIES[category][2])
        assert len({part.text for part in answer.parts[::2]}) == number  # type: ignore[union-attr]


def test_restyling_shows_the_same_in_the_style() -> None:
    for prompt, answer in mixed("restyling"):
        before, after = shown(prompt.parts[0]), shown(answer.parts[1])
        assert before.concept == after.concept and before.style != after.style
        assert after.style in prompt.text and answer.text == after.name


def test_rebuses_say_what_they_show() -> None:
    for prompt, answer in mixed("rebus_reading"):
        read = "".join(part.text if isinstance(part, Text) else with_article(shown(part).name) for part in prompt.parts)
        assert read == f"read: {answer.text}"
    for prompt, answer in mixed("rebus_writing"):
        written = "".join(part.text if isinstance(part, Text) else with_article(shown(part).name) for part in answer.parts)
        assert prompt.text == f"as a rebus: {written}"


def test_the_odd_one_is_of_another_group() -> None:
    for prompt, answer in mixed("odd_one_out"):
        entries = [shown(part) for part in prompt.parts if isinstance(part, Image)]
        groups = Counter(entry.group for entry in entries)
        odd = next(index for index, entry in enumerate(entries) if groups[entry.group] == 1)
        assert answer.text.startswith(f"the {mixed_tasks.ORDINALS[odd]}: {entries[odd].name}.")
        assert shown(answer.parts[-1]).key == entries[odd].key


def test_comparisons_are_true() -> None:
    for prompt, answer in mixed("comparing", 120):
        first, second = (shown(part) for part in prompt.parts[:2])
        if "both show" in prompt.text:
            assert (answer.text == "yes") == (first.name == second.name)
        elif "one kind" in prompt.text:
            assert answer.text.startswith("yes") == (first.group == second.group)
        else:
            place = mixed_tasks.ORDINALS.index(answer.text.removeprefix("the "))
            assert with_article((first, second)[place].name) in prompt.text


def test_stories_show_what_they_tell() -> None:
    for prompt, answer in mixed("stories"):
        told = ""
        pending: list[str] = []
        for part in answer.parts:
            if isinstance(part, Text):
                told = part.text.lower()
            else:
                pending.append(shown(part).name)
                assert pending[-1].lower() in told
        assert pending and with_article(pending[0]) in prompt.text


@pytest.mark.parametrize("name", ["lists", "rebus_reading", "rebus_writing", "odd_one_out", "editing"])
def test_a_subset_that_is_too_small_is_refused(name: str) -> None:
    (shard,) = embedded_source.expand("emoji", f"{name}?concepts=1&count=3&view=plain")
    with pytest.raises(BadInput, match="too few concepts"):
        list(embedded_source.bind_task(shard)())
