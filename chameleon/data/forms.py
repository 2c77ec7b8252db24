"""What a record says: the forms in which the field writes documents, captions and conversations, told apart by their keys.

A form is a function from a record to a document or conversation, entered in `FORMS` with the keys it needs; the first
that fits is taken. Pictures are named relative to the file's folder, or to a folder that is given.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chameleon.document import Conversation, Document, Image, Message, Part, Role, Text, from_json, unicode
from chameleon.errors import BadInput

PLACEHOLDER = "<image>"
"""Where a picture stands in the text of LLaVA's conversations."""
SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
PICTURE_KEYS = ("image", "image_path", "img", "file_name", "jpg", "png", "webp")
CAPTION_KEYS = ("caption", "text", "sentence", "title", "alt_text", "prompt")


@dataclass(frozen=True)
class Place:
    """Where a record lies: how messages name it, and the folder that its pictures are named from."""

    key: str
    folder: Path

    def error(self, what: str) -> BadInput:
        return BadInput(what, where=self.key)

    def text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{name} is no text")
        return unicode(value, self.key)

    def picture(self, value: Any, name: str) -> Image:
        """A picture given as a path, a `data:` URL, bytes, or Hugging Face's `{"bytes": …, "path": …}`."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return Image(as_data_url(value))
        if not isinstance(value, str) or not value:
            raise self.error(f"{name} is no picture")
        if value.startswith(("http://", "https://")):
            raise self.error(f"{name} is an address; pictures have to be downloaded first")
        return Image(value if value.startswith("data:") else self.folder / value)


def as_data_url(data: bytes) -> str:
    return "data:image/*;base64," + base64.b64encode(data).decode()


def parts_form(record: dict[str, Any], place: Place) -> Document | Conversation:
    """Our own JSON form: `parts` or `messages`."""
    return from_json(record, where=place.key, folder=place.folder)


def llava_form(record: dict[str, Any], place: Place) -> Conversation:
    """LLaVA's: `conversations` of `{"from", "value"}` with `<image>` where the pictures of `image` stand."""
    found = record.get("image") if record.get("image") is not None else record.get("images")
    given = found if isinstance(found, list) else [] if found is None else [found]
    pictures = [place.picture(value, "image") for value in given]
    messages, used = [], 0
    if not isinstance(record["conversations"], list) or not record["conversations"]:
        raise place.error("conversations is no list with entries")
    for entry in record["conversations"]:
        if not isinstance(entry, dict) or entry.get("from") not in SPEAKERS:
            raise place.error('expected "from" (human or gpt) and "value" in conversations')
        parts: list[Part] = []
        for number, piece in enumerate(place.text(entry.get("value"), "value").split(PLACEHOLDER)):
            if number:
                if used == len(pictures):
                    raise place.error(f"more {PLACEHOLDER} than pictures")
                parts.append(pictures[used])
                used += 1
            if piece.strip():
                parts.append(Text(piece.strip()))
        messages.append(Message(SPEAKERS[entry["from"]], Document(tuple(parts))))
    if used < len(pictures):
        raise place.error(f"{len(pictures)} pictures, but {used} {PLACEHOLDER}")
    return Conversation(tuple(messages))


def obelics_form(record: dict[str, Any], place: Place) -> Document:
    """OBELICS': lists `texts` and `images` of one length, of which one has a value at each place."""
    texts, pictures = record["texts"], record["images"]
    if not isinstance(texts, list) or not isinstance(pictures, list) or len(texts) != len(pictures):
        raise place.error("texts and images are no lists of one length")
    parts: list[Part] = []
    for text, picture in zip(texts, pictures, strict=True):
        if text is not None and picture is not None:
            raise place.error("a text and a picture at one place")
        if picture is not None:
            parts.append(place.picture(picture, "images"))
        elif text is not None:
            parts.append(Text(place.text(text, "texts")))
    return Document(tuple(parts))


def mmc4_form(record: dict[str, Any], place: Place) -> Document:
    """MMC4's: sentences in `text_list`; each of `image_info` goes before the sentence of `matched_text_index`."""
    sentences, pictures = record["text_list"], record["image_info"]
    if not isinstance(sentences, list) or not isinstance(pictures, list):
        raise place.error("text_list and image_info are no lists")
    before: dict[int, list[Part]] = {}
    for entry in pictures:
        number = entry.get("matched_text_index") if isinstance(entry, dict) else None
        if type(number) is not int or not 0 <= number < len(sentences):
            raise place.error("matched_text_index names no sentence")
        before.setdefault(number, []).append(place.picture(entry.get("image_name"), "image_name"))
    parts: list[Part] = []
    for number, sentence in enumerate(sentences):
        parts += before.get(number, [])
        parts.append(Text(place.text(sentence, "text_list") + (" " if number + 1 < len(sentences) else "")))
    return Document(tuple(parts))


def pair_form(record: dict[str, Any], place: Place) -> Document:
    """A picture with a caption, under the names that people use."""
    name = next(name for name in PICTURE_KEYS if record.get(name) is not None)
    parts: list[Part] = [place.picture(record[name], name)]
    caption = next((key for key in CAPTION_KEYS if record.get(key) is not None), None)
    if caption is not None and (text := place.text(record[caption], caption).strip()):
        parts.append(Text(text))
    return Document(tuple(parts))


def text_form(record: dict[str, Any], place: Place) -> Document:
    """Text or code alone: `text` or `content`."""
    name = "text" if record.get("text") is not None else "content"
    return Document((Text(place.text(record[name], name)),))


Form = Callable[[dict[str, Any], Place], Document | Conversation]
FORMS: tuple[tuple[tuple[str, ...], Form], ...] = (
    (("messages",), parts_form),
    (("parts",), parts_form),
    (("conversations",), llava_form),
    (("texts", "images"), obelics_form),
    (("text_list", "image_info"), mmc4_form),
    *(((name,), pair_form) for name in PICTURE_KEYS),
    (("text",), text_form),
    (("content",), text_form),
)
"""The keys that tell a form, all of which must hold something, and the form; tried from the top."""


def content_of(record: Any, place: Place) -> Document | Conversation:
    """The document or conversation of a record. Raises `BadInput` where it has no known form, or is empty."""
    if not isinstance(record, dict):
        raise place.error("expected an object")
    for keys, form in FORMS:
        if all(record.get(key) is not None for key in keys):
            content = form(record, place)
            if isinstance(content, Document) and not content.images and not content.text:
                raise place.error("neither picture nor text")
            return content
    known = ", ".join(dict.fromkeys(" and ".join(keys) for keys, _ in FORMS))
    raise place.error(f"no known form; its keys are {', '.join(map(str, record)) or 'none'}, a form needs one of {known}")
