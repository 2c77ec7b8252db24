"""The outputs of a part on disk, batch by batch, so that an evaluation that was killed goes on where it was.

    DIR/outputs/SUITE/PART/RANK.jsonl     one line for each batch: {"batch": index, "outputs": [...]}
    DIR/images/SUITE/PART/KEY.png         pictures, which the outputs name by their path

Each of several processes appends to a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from chameleon.document import Document, Image, Text
from chameleon.evaluation.part import Output
from chameleon.files import atomic_file, read_events
from chameleon.tokenizers.image import load_picture

UNSAFE = re.compile(r"[^\w.-]+")
MAX_NAME = 80


def safe_name(key: str) -> str:
    """Return a key as a file name; other keys get other names."""
    name = UNSAFE.sub("_", key)[:MAX_NAME]
    return name if name == key else f"{name}-{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:12]}"


def to_json(value: Output, save: Callable[[PILImage.Image], str]) -> Any:
    """Return an output as JSON. `save` writes a picture and returns its path."""
    if isinstance(value, PILImage.Image):
        return {"image": save(value)}
    if isinstance(value, Document):
        parts = [
            {"type": "text", "text": part.text}
            if isinstance(part, Text)
            else {"type": "image", **to_json(load_picture(part.image), save)}
            for part in value.parts
        ]
        return {"parts": parts, "complete": value.complete}
    if isinstance(value, (list, tuple)):
        return [to_json(element, save) for element in value]
    if isinstance(value, dict):
        return {key: to_json(element, save) for key, element in value.items()}
    return value


def from_json(value: Any, folder: Path) -> Output:
    """Return the output that `to_json` wrote, pictures as paths in `folder`."""
    if isinstance(value, list):
        return [from_json(element, folder) for element in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"image"}:
        return folder / value["image"]
    if set(value) == {"parts", "complete"}:
        parts = [Text(part["text"]) if part["type"] == "text" else Image(folder / part["image"]) for part in value["parts"]]
        return Document(tuple(parts), value["complete"])
    return {key: from_json(element, folder) for key, element in value.items()}


class Journal:
    """The outputs of one part."""

    def __init__(self, folder: Path, suite: str, part: str, rank: int = 0) -> None:
        self.folder, self.suite, self.part = folder, suite, part
        self.path = folder / "outputs" / suite / safe_name(part) / f"{rank}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def batches(self) -> dict[int, list[Any]]:
        """Return the outputs of all batches that are complete, as JSON, of all processes."""
        found: dict[int, list[Any]] = {}
        for path in sorted(self.path.parent.glob("*.jsonl")):
            for entry in read_events(path):
                found[entry["batch"]] = entry["outputs"]
        return found

    def append(self, batch: int, keys: list[str], outputs: list[Output]) -> None:
        """Add the outputs of a batch. A process killed here leaves a line that `batches` does not see."""
        lines = []
        for key, output in zip(keys, outputs, strict=True):
            count = 0

            def save(picture: PILImage.Image, key: str = key) -> str:
                nonlocal count
                name = Path(
                    "images", self.suite, safe_name(self.part), f"{safe_name(key)}{f'-{count}' if count else ''}.png"
                )
                count += 1
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(self.folder / name) as partial:
                    picture.save(partial, "PNG")
                return str(name)

            lines.append(to_json(output, save))
        text = json.dumps({"batch": batch, "outputs": lines}, ensure_ascii=False)
        needs_newline = self.path.is_file() and self.path.stat().st_size > 0
        if needs_newline:
            with open(self.path, "rb") as written:
                written.seek(-1, 2)
                needs_newline = written.read(1) != b"\n"  # the line before was cut off by a killed process
        with open(self.path, "ab") as file:
            file.write((("\n" if needs_newline else "") + text + "\n").encode("utf-8", "backslashreplace"))

    def outputs(self) -> list[Output]:
        """Return all outputs, in order of the items."""
        batches = self.batches()
        return [from_json(output, self.folder) for index in sorted(batches) for output in batches[index]]

    def raw_outputs(self) -> list[Any]:
        """Return all outputs as JSON, pictures as paths."""
        batches = self.batches()
        return [output for index in sorted(batches) for output in batches[index]]
