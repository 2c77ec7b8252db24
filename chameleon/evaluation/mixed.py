"""Mixed documents: whether answers of texts and pictures have the form that was asked for, and whether both are true.

Prompts are those that the tasks of `chameleon.data.mixed_tasks` keep out of training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from PIL import Image as PILImage

from chameleon.data import mixed_tasks
from chameleon.data.labelled import LabelledPicture, plain_view
from chameleon.data.questions import CATEGORIES, categories_of, without_colour
from chameleon.document import Conversation, Document, Image, Text
from chameleon.evaluation.drawings import DrawingJudge
from chameleon.tokenizers.image import load_picture

MAX_NEW_TOKENS, MAX_IMAGES = 360, 5
"""Of an answer."""
TEXT_ANSWERS = ("rebus_reading", "comparing")
"""Tasks whose answers are text alone, with one right answer."""
FIXED_TEXTS = ("restyling", "recolouring", "rebus_writing", "odd_one_out", *TEXT_ANSWERS)
"""Tasks each text of whose answers is determined by the prompt."""


def form(document: Document) -> list[str]:
    """Return the kinds of a document's parts."""
    return ["text" if isinstance(part, Text) else "image" for part in document.parts]


def has_right_form(task: str, answer: Document, expected: Document) -> bool:
    """Whether an answer has the form that its prompt asks for.

    A story may have any number of sentences, but begins with a text and has a picture.
    """
    if task == "stories":
        kinds = form(answer)
        return answer.complete and kinds[:1] == ["text"] and "image" in kinds
    return answer.complete and form(answer) == form(expected)


class Truth:
    """Decides whether texts and pictures of answers are true."""

    def __init__(self, judge: DrawingJudge) -> None:
        self.judge = judge
        self.names = sorted({entry.name for entry in judge.gallery}, key=len, reverse=True)
        self.of_name: dict[str, LabelledPicture] = {entry.name: entry for entry in judge.gallery}

    def named(self, text: str) -> list[str]:
        """Return the names of emoji in a text, in order; of overlapping ones the longest."""
        found: dict[int, str] = {}
        rest = text.lower()
        for name in self.names:
            for match in re.finditer(rf"(?<!\w){re.escape(name.lower())}(?!\w)", rest):
                found[match.start()] = name
                rest = rest[: match.start()] + "\0" * len(name) + rest[match.end() :]
        return [found[position] for position in sorted(found)]

    def texts(self, task: str, prompt: Document, answer: Document, expected: Document) -> list[bool]:
        """Return for each text of an answer whether it is true of what the prompt asks for or shows."""
        got = [part.text.strip() for part in answer.parts if isinstance(part, Text)]
        wanted = [part.text.strip() for part in expected.parts if isinstance(part, Text)]
        if task in FIXED_TEXTS:
            return [index < len(got) and got[index] == text for index, text in enumerate(wanted)]
        if task == "lists":
            category = next(index for index, (_, plural, _) in enumerate(CATEGORIES) if f" {plural}" in f"{prompt.text},")
            return [text in self.of_name and category in categories_of(self.of_name[text]) for text in got]
        if task == "pages":
            name = wanted[0].partition(":")[0]
            return [text.startswith(name) for text in got]
        return [bool(self.named(text)) for text in got if text]

    def pictures(self, task: str, answer: Document, expected: Document) -> list[bool]:
        """Return for each picture of an answer whether it shows what the text before it says (in a rebus: the prompt)."""
        pictures: list[PILImage.Image] = []
        names: list[str] = []
        pending: list[str] = []
        expected_images = iter(self.expected_names(expected)) if task == "rebus_writing" else None
        for part in answer.parts:
            if isinstance(part, Text):
                pending = [part.text] if task in ("recolouring",) else self.named(part.text)
                continue
            if expected_images is not None:
                pending = [next(expected_images, "")]
            pictures.append(load_picture(part.image))
            names.append(pending.pop(0) if pending else "")
        if not pictures:
            return []
        if task == "recolouring":
            pairs = [(name.partition(" ")[0], without_colour(name)) for name in names]
            return [
                bool(self.judge.coloured_hits([picture], [pair])[0]["right_both"])
                for picture, pair in zip(pictures, pairs, strict=True)
            ]
        nearest = self.judge.nearest(pictures)
        return [name in near for name, near in zip(names, nearest, strict=True)]

    def expected_names(self, expected: Document) -> list[str]:
        """Return the names that are nearest to the pictures of an expected answer."""
        pictures = [part.image for part in expected.parts if isinstance(part, Image)]
        return [near[0] for near in self.judge.nearest([load_picture(picture) for picture in pictures])]


def held_out_prompts(pictures: Sequence[LabelledPicture], per_task: int, seed: int) -> list[tuple[str, Conversation]]:
    """Return (task, conversation) of prompts that are kept out of training, their pictures unchanged."""
    return [
        (task, conversation)
        for task in mixed_tasks.DOCUMENT_MAKERS
        for conversation in mixed_tasks.conversations(task, pictures, per_task, seed, plain_view, "validation")
    ]
