"""Documents of text and pictures, conversations of documents, and their JSON form.

A `Document` is an ordered list of parts, each a `Text` or an `Image`. An `Image` holds a PIL picture or says where
one lies (a path or a `data:` URL); nothing here opens it. The JSON form is that of the chat ecosystem:

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
from typing import TYPE_CHECKING, Any, Literal

from chameleon.errors import BadInput

if TYPE_CHECKING:
    from PIL import Image as PILImage

Role = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Text:
    """A run of text."""

    text: str


@dataclass(frozen=True)
class Image:
    """A picture: a PIL image, a path, or a `data:` URL."""

    image: PILImage.Image | str | Path


Part = Text | Image


@dataclass(frozen=True)
class Document:
    """Text and pictures in reading order. `complete` is False where decoding met a truncated picture."""

    parts: Sequence[Part] = ()
    complete: bool = field(default=True, compare=False)

    @property
    def text(self) -> str:
        """All text of the document, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> list[PILImage.Image | str | Path]:
        """All pictures of the document, in order."""
        return [part.image for part in self.parts if isinstance(part, Image)]

    def to_json(self) -> dict[str, Any]:
        """The JSON form; PIL pictures become PNG `data:` URLs."""
        return {"parts": [part_to_json(part) for part in self.parts]}

    @classmethod
    def from_json(cls, value: Any, *, where: object = "document", folder: Path | None = None) -> Document:
        """Reads the JSON form. Relative paths are taken from `folder`. Raises `BadInput` naming `where`."""
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
    """Turns of user and assistant; training takes its loss on the assistant's turns only."""

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
        """Reads the chat form; `content` may also be a plain string. Raises `BadInput` naming `where`."""
        if not isinstance(value, Mapping) or not isinstance(value.get("messages"), list) or not value["messages"]:
            raise BadInput('expected an object with a non-empty list "messages"', where=where)
        messages = []
        for number, entry in enumerate(value["messages"]):
            place = f"{where}, message {number}"
            if not isinstance(entry, Mapping) or entry.get("role") not in ROLES or "content" not in entry:
                raise BadInput(f'expected "role" (one of {", ".join(ROLES)}) and "content"', where=place)
            content = entry["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            messages.append(Message(entry["role"], Document(parts_from_json(content, where=place, folder=folder))))
        return cls(tuple(messages))


def from_json(value: Any, *, where: object = "document", folder: Path | None = None) -> Document | Conversation:
    """A document or a conversation, by which of the two forms `value` has."""
    kind: type[Document] | type[Conversation] = Document
    if isinstance(value, Mapping) and "messages" in value:
        kind = Conversation
    return kind.from_json(value, where=where, folder=folder)


def read_json_document(path: Path) -> Document | Conversation:
    """The document or conversation in the JSON file at `path`. Raises `BadInput` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("no such file", where=path) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"not JSON in UTF-8 ({error})", where=path) from None
    return from_json(value, where=path, folder=path.parent)


def unicode(text: str, where: object) -> str:
    """The text, which JSON may spell with half a surrogate pair. Raises `BadInput` for that."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"half a surrogate pair at character {error.start}", where=where) from None
    return text


def part_to_json(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    image = part.image
    if isinstance(image, (str, Path)):
        return {"type": "image", "image": str(image)}
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"type": "image", "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


def parts_from_json(value: Any, *, where: object, folder: Path | None) -> tuple[Part, ...]:
    if not isinstance(value, list):
        raise BadInput("expected a list of parts", where=where)
    parts: list[Part] = []
    for number, entry in enumerate(value):
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        content = entry.get(kind) if kind in ("text", "image") else None
        if not isinstance(content, str):
            raise BadInput(
                'expected {"type": "text", "text": …} or {"type": "image", "image": …}', where=f"{where}, part {number}"
            )
        if kind == "text":
            parts.append(Text(unicode(content, f"{where}, part {number}")))
        elif content.startswith("data:") or folder is None or Path(content).is_absolute():
            parts.append(Image(content))
        else:
            parts.append(Image(folder / content))
    return tuple(parts)
