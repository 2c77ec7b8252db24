"""Record schemas: how datasets write documents, captions and conversations. A record's schema is detected by its keys.

A form is a function from a record to a document or conversation, listed in `FORMS` with the keys it needs; the first that
matches is used. Paths of images are relative to the file's folder, or to a folder that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chameleon.document import Conversation, Document, Image, Message, Part, Role, Text, check_unicode, from_json
from chameleon.errors import BadInput

PLACEHOLDER = "<image>"
"""Stands for an image in the text of LLaVA's conversations."""
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
class RecordContext:
    """Where a record is: how messages name it, and the folder that its image paths are relative to."""

    key: str
    folder: Path
    allow_paths: bool = False
    """Whether images outside the folder may be named."""

    def error(self, what: str) -> BadInput:
        return BadInput(what, where=self.key)

    def text(self, value: Any, name: str) -> str:
        """Return a field that must be a text."""
        if not isinstance(value, str):
            raise self.error(f"{name} is not a text")
        return check_unicode(value, self.key)

    def image(self, value: Any, name: str) -> Image:
        """Return an image given as a path, a `data:` URL, bytes, or Hugging Face's `{"bytes": …, "path": …}`."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return Image(value)
        if not isinstance(value, str) or not value:
            raise self.error(f"{name} is not an image")
        if value.startswith(("http://", "https://")):
            raise self.error(f"{name} is a URL; images have to be downloaded first")
        return Image(value) if value.startswith("data:") else Image(self.checked_path(self.folder / value))

    def checked_path(self, path: Path) -> Path:
        """Return the path. Raise `BadInput` where it leaves the folder and that is not allowed."""
        try:
            is_inside = self.allow_paths or path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name that is too long, a loop of links
            raise self.error(f"not a path ({error})") from None
        if not is_inside:
            raise BadInput(
                f"names an image outside {self.folder}: {path}", where=self.key, remedy="--allow-paths permits that"
            )
        return path

    def checked_content(self, content: Document | Conversation) -> Document | Conversation:
        """Return a document or conversation. Raise `BadInput` where one of its image paths leaves the folder."""
        documents = [content] if isinstance(content, Document) else [message.content for message in content.messages]
        for image in (image for document in documents for image in document.images):
            if isinstance(image, Path) or (isinstance(image, str) and not image.startswith("data:")):
                self.checked_path(Path(image))
        return content


def native_form(record: dict[str, Any], context: RecordContext) -> Document | Conversation:
    """Read the project's own JSON form: `parts` or `messages`."""
    return context.checked_content(from_json(record, where=context.key, folder=context.folder))


def llava_form(record: dict[str, Any], context: RecordContext) -> Conversation:
    """Read LLaVA's form: `conversations` of `{"from", "value"}`, with `<image>` for the images of `image`."""
    value = record.get("image") if record.get("image") is not None else record.get("images")
    values = value if isinstance(value, list) else [] if value is None else [value]
    images = [context.image(value, "image") for value in values]
    messages, num_used = [], 0
    if not isinstance(record["conversations"], list) or not record["conversations"]:
        raise context.error("conversations is not a list with entries")
    for entry in record["conversations"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("from"), str) or entry["from"] not in SPEAKERS:
            raise context.error('expected "from" (human or gpt) and "value" in conversations')
        parts: list[Part] = []
        for index, text in enumerate(context.text(entry.get("value"), "value").split(PLACEHOLDER)):
            if index:
                if num_used == len(images):
                    raise context.error(f"more {PLACEHOLDER} than images")
                parts.append(images[num_used])
                num_used += 1
            if text.strip():
                parts.append(Text(text.strip()))
        messages.append(Message(SPEAKERS[entry["from"]], Document(tuple(parts))))
    if num_used < len(images):
        raise context.error(f"{len(images)} images, but {num_used} {PLACEHOLDER}")
    return Conversation(tuple(messages))


def obelics_form(record: dict[str, Any], context: RecordContext) -> Document:
    """Read OBELICS' form: lists `texts` and `images` of equal length, one of which has a value at each index."""
    texts, images = record["texts"], record["images"]
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise context.error("texts and images are not lists of equal length")
    parts: list[Part] = []
    for text, image in zip(texts, images, strict=True):
        if text is not None and image is not None:
            raise context.error("a text and an image at the same index")
        if image is not None:
            parts.append(context.image(image, "images"))
        elif text is not None:
            parts.append(Text(context.text(text, "texts")))
    return Document(tuple(parts))


def mmc4_form(record: dict[str, Any], context: RecordContext) -> Document:
    """Read MMC4's form: sentences in `text_list`; each of `image_info` precedes the sentence `matched_text_index`."""
    sentences, images = record["text_list"], record["image_info"]
    if not isinstance(sentences, list) or not isinstance(images, list):
        raise context.error("text_list and image_info are not lists")
    images_before: dict[int, list[Part]] = {}
    for entry in images:
        index = entry.get("matched_text_index") if isinstance(entry, dict) else None
        if type(index) is not int or not 0 <= index < len(sentences):
            raise context.error("matched_text_index is not the index of a sentence")
        images_before.setdefault(index, []).append(context.image(entry.get("image_name"), "image_name"))
    parts: list[Part] = []
    for index, sentence in enumerate(sentences):
        parts += images_before.get(index, [])
        parts.append(Text(context.text(sentence, "text_list") + (" " if index + 1 < len(sentences) else "")))
    return Document(tuple(parts))


def pair_form(record: dict[str, Any], context: RecordContext) -> Document:
    """Read an image with a caption, under the usual names."""
    image_key = next(key for key in PICTURE_KEYS if record.get(key) is not None)
    parts: list[Part] = [context.image(record[image_key], image_key)]
    caption_key = next((key for key in CAPTION_KEYS if record.get(key) is not None), None)
    if caption_key is not None and (caption := context.text(record[caption_key], caption_key).strip()):
        parts.append(Text(caption))
    return Document(tuple(parts))


def edit_form(record: dict[str, Any], context: RecordContext, source: str, instruction: str, target: str) -> Conversation:
    """Read a picture, an instruction, and the picture that it makes: a question and its answer."""
    text = context.text(record[instruction], instruction).strip()
    if not text:
        raise context.error(f"{instruction} is empty")
    question = Document((context.image(record[source], source), Text(text)))
    answer = Document((context.image(record[target], target),))
    return Conversation((Message("user", question), Message("assistant", answer)))


def magicbrush_form(record: dict[str, Any], context: RecordContext) -> Conversation:
    """Read an entry of MagicBrush's edit_turns.json, whose pictures are in `images/ID/`; their names start with ID."""
    paths = {}
    for key in ("input", "output"):
        name = context.text(record[key], key)
        paths[key] = name if "/" in name else f"images/{name.partition('-')[0]}/{name}"
    return edit_form({**record, **paths}, context, "input", "instruction", "output")


EDIT_KEYS = (
    ("original_image", "edit_prompt", "edited_image"),  # InstructPix2Pix's
    ("source_img", "instruction", "target_img"),  # MagicBrush's
)
"""Columns of a picture, an instruction, and the picture that it makes."""


def text_form(record: dict[str, Any], context: RecordContext) -> Document:
    """Read text or code alone: `text` or `content`."""
    key = "text" if record.get("text") is not None else "content"
    return Document((Text(context.text(record[key], key)),))


Form = Callable[[dict[str, Any], RecordContext], Document | Conversation]
FORMS: tuple[tuple[tuple[str, ...], Form], ...] = (
    (("messages",), native_form),
    (("parts",), native_form),
    (("conversations",), llava_form),
    (("texts", "images"), obelics_form),
    (("text_list", "image_info"), mmc4_form),
    *((keys, partial(edit_form, source=keys[0], instruction=keys[1], target=keys[2])) for keys in EDIT_KEYS),
    (("input", "mask", "output", "instruction"), magicbrush_form),
    *(((name,), pair_form) for name in PICTURE_KEYS),
    (("text",), text_form),
    (("content",), text_form),
)
"""(keys that must all have a value, form), tried in this order."""


def content_of(record: Any, context: RecordContext) -> Document | Conversation:
    """Return the document or conversation of a record. Raise `BadInput` where it has no known form, or is empty."""
    if not isinstance(record, dict):
        raise context.error("expected an object")
    for keys, form in FORMS:
        if all(record.get(key) is not None for key in keys):
            content = form(record, context)
            if isinstance(content, Document) and not content.images and not content.text:
                raise context.error("neither image nor text")
            return content
    known = ", ".join(dict.fromkeys(" and ".join(keys) for keys, _ in FORMS))
    raise context.error(f"unknown form; its keys are {', '.join(map(str, record)) or 'none'}, a form needs one of {known}")
