"""Documents of interleaved text and images, conversations, and their JSON form.

A `Document` is an ordered list of parts, each a `Text` or an `Image`. An `Image` is a PIL image, the bytes of an image
file, a path or a `data:` URL; nothing here decodes it. The JSON form is that of chat APIs:

    {"parts": [{"type": "text", "text": "…"}, {"type": "image", "image": "picture.png"}]}
    {"messages": [{"role": "user", "content": [parts]}, {"role": "assistant", "content": [parts]}]}
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from chameleon.errors import BadInput

if TYPE_CHECKING:
    from PIL import Image as PILImage

ImageSource: TypeAlias = "PILImage.Image | bytes | str | Path"
Role = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Text:
    """A run of text."""

    text: str


@dataclass(frozen=True)
class Image:
    """An image: a PIL image, the bytes of an image file, a path, or a `data:` URL."""

    image: ImageSource


Part = Text | Image


@dataclass(frozen=True)
class Document:
    """Text and images in reading order. `complete` is False where decoding found a truncated image."""

    parts: Sequence[Part] = ()
    complete: bool = field(default=True, compare=False)

    @property
    def text(self) -> str:
        """The text of all parts, concatenated."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> list[ImageSource]:
        """The images of all parts, in order."""
        return [part.image for part in self.parts if isinstance(part, Image)]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; images in memory become `data:` URLs, PIL images as PNG."""
        return {"parts": [part_to_json(part) for part in self.parts]}

    @classmethod
    def from_json(cls, value: Any, *, where: object = "document", folder: Path | None = None) -> Document:
        """Read the JSON form. Relative paths are resolved against `folder`. Raises `BadInput` at `where`."""
        if not isinstance(value, Mapping) or "parts" not in value:
            raise BadInput('expected an object with "parts"', where=where, remedy='use {"parts": [{"type": "text", …}]}')
        return cls(parts_from_json(value["parts"], where=where, folder=folder))


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: Document


@dataclass(frozen=True)
class Conversation:
    """A list of messages; training takes its loss on those of the assistant only."""

    messages: Sequence[Message]

    def to_json(self) -> dict[str, Any]:
        return {
            "messages": [
                {"role": message.role, "content": [part_to_json(part) for part in message.content.parts]}
                for message in self.messages
            ]
        }

    @classmethod
    def from_json(cls, value: Any, *, where: object = "conversation", folder: Path | None = None) -> Conversation:
        """Read the chat form, in which `content` may also be a string. Raises `BadInput` at `where`."""
        if not isinstance(value, Mapping) or not isinstance(value.get("messages"), list) or not value["messages"]:
            raise BadInput('expected an object with a non-empty list "messages"', where=where)
        messages = []
        for index, entry in enumerate(value["messages"]):
            where_message = f"{where}, message {index}"
            if not isinstance(entry, Mapping) or entry.get("role") not in ROLES or "content" not in entry:
                raise BadInput(f'expected "role" (one of {", ".join(ROLES)}) and "content"', where=where_message)
            content = entry["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            parts = parts_from_json(content, where=where_message, folder=folder)
            messages.append(Message(entry["role"], Document(parts)))
        return cls(tuple(messages))


def from_json(value: Any, *, where: object = "document", folder: Path | None = None) -> Document | Conversation:
    """Read a document or a conversation, whichever form `value` has."""
    kind: type[Document] | type[Conversation] = Document
    if isinstance(value, Mapping) and "messages" in value:
        kind = Conversation
    return kind.from_json(value, where=where, folder=folder)


def read_json_document(path: Path) -> Document | Conversation:
    """Read the document or conversation in a JSON file. Raises `BadInput` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("no such file", where=path) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"not JSON in UTF-8 ({error})", where=path) from None
    return from_json(value, where=path, folder=path.parent)


def check_unicode(text: str, where: object) -> str:
    """Return the text. Raise `BadInput` for a lone surrogate, which JSON can spell but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"lone surrogate at character {error.start}", where=where) from None
    return text


def part_to_json(part: Part) -> dict[str, Any]:
    """Return the JSON form of one part."""
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    image = part.image
    if isinstance(image, (str, Path)):
        return {"type": "image", "image": str(image)}
    kind = "*"
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image, kind = buffer.getvalue(), "png"
    return {"type": "image", "image": f"data:image/{kind};base64," + base64.b64encode(image).decode()}


def parts_from_json(value: Any, *, where: object, folder: Path | None) -> tuple[Part, ...]:
    """Read the JSON form of a list of parts."""
    if not isinstance(value, list):
        raise BadInput("expected a list of parts", where=where)
    parts: list[Part] = []
    for index, entry in enumerate(value):
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        content = entry.get(kind) if kind in ("text", "image") else None
        if not isinstance(content, str):
            raise BadInput(
                'expected {"type": "text", "text": …} or {"type": "image", "image": …}', where=f"{where}, part {index}"
            )
        if kind == "text":
            parts.append(Text(check_unicode(content, f"{where}, part {index}")))
        elif content.startswith("data:") or folder is None or Path(content).is_absolute():
            parts.append(Image(content))
        else:
            parts.append(Image(folder / content))
    return tuple(parts)
