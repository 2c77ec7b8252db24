"""Suites: YAML files that say what is evaluated, on which files, with which prompts and seeds.

    kind: captions
    description: …
    settings: {shots: 2, …}

`kind` names a dataclass with the settings; its parts run and score. Data are files of the user, given by path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from chameleon.config_reader import apply_override, check_keys, load_yaml, parse_config
from chameleon.errors import BadInput
from chameleon.evaluation.part import Part

SHIPPED = Path(__file__).parent / "suites"
KINDS = {
    "emoji": "chameleon.evaluation.emoji:EmojiSuite",
    "captions": "chameleon.evaluation.captioning:CaptionSuite",
    "questions": "chameleon.evaluation.visual_questions:QuestionSuite",
    "tokenizer": "chameleon.evaluation.tokenizer_suite:TokenizerSuite",
    "images": "chameleon.evaluation.image_suite:ImageSuite",
    "prompt-folders": "chameleon.evaluation.prompt_folders:PromptFolderSuite",
    "text": "chameleon.evaluation.text_suite:TextSuite",
    "mixed": "chameleon.evaluation.mixed_suite:MixedSuite",
}
"""Kinds of suites, and the dataclasses of their settings."""
MAX_HASHED_BYTES = 1 << 20
"""Of a file of pictures or other large data, for its fingerprint: its size and this much at each end."""


class Suite(Protocol):
    """The settings of a suite: a dataclass."""

    def build_parts(self) -> list[Part]:
        """Return the parts. Raise `BadInput` for files that are missing or cannot be read."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """Return name → fingerprint of the data."""
        ...


@dataclass(frozen=True)
class NamedSuite:
    """A suite with its name and kind."""

    name: str
    kind: str
    settings: Suite

    def plain_settings(self) -> dict[str, Any]:
        """Return the settings as values of JSON."""
        return dataclasses.asdict(self.settings)  # type: ignore[call-overload]


def shipped_suites() -> list[str]:
    """Return the names of the suites in this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def suite_class(kind: Any, where: object) -> type[Any]:
    """Return the dataclass of a kind."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise BadInput(f"kind is {kind!r}", where=where, remedy=f"use {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def read_suite(source: str, overrides: Sequence[str] = ()) -> NamedSuite:
    """Return a suite of this package by its name, or one in a YAML file, with `key=value` settings."""
    path = SHIPPED / f"{source}.yaml" if source in shipped_suites() else Path(source)
    if not path.is_file():
        raise BadInput("no such suite", where=source, remedy=f"give a YAML file, or {', '.join(shipped_suites())}")
    values = load_yaml(path)
    unknown = set(values) - {"kind", "description", "settings"}
    if unknown:
        raise BadInput(f"unknown key {sorted(unknown)[0]}", where=path, remedy="use kind, description, settings")
    settings = values.get("settings") or {}
    if not isinstance(settings, dict):
        raise BadInput("settings are no keys and values", where=path)
    for override in overrides:
        apply_override(settings, override)
    return make_suite(path.stem, values.get("kind"), settings, path)


def make_suite(name: str, kind: Any, settings: dict[str, Any], where: object) -> NamedSuite:
    """Return a suite from its settings. Raise `BadInput` that names what is unknown, missing or of the wrong type."""
    config_class = suite_class(kind, where)
    check_keys(config_class, settings, where)
    for field in dataclasses.fields(config_class):
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and field.name not in settings:
            raise BadInput(f"{field.name} is not given", where=name, remedy=f"add {field.name}=…")
    config = parse_config(config_class, settings, where)
    for field in dataclasses.fields(config_class):
        value, least = getattr(config, field.name), 1 if field.name in ("batch_size", "max_new_tokens") else 0
        if isinstance(value, int) and value < least:
            raise BadInput(f"{field.name} is {value}", where=name, remedy=f"use {least} or more")
    return NamedSuite(name, kind, config)


def read_suites(words: Sequence[str], seed: int = 0) -> list[NamedSuite]:
    """Return the suites of a command line: names or files, and `key=value` or `SUITE.key=value` settings.

    A setting without a suite's name is for the one suite that is given. seed: of all suites, unless it is 0.
    """
    sources = [word for word in words if "=" not in word]
    if len(set(sources)) < len(sources):
        raise BadInput("a suite is given twice", where="command line")
    stems = [Path(source).stem for source in sources]
    if len(set(stems)) < len(stems):
        raise BadInput("two suites have one name", where="command line", remedy="rename a file")
    names = {Path(source).stem if source.endswith((".yaml", ".yml")) else source: source for source in sources}
    overrides: dict[str, list[str]] = {name: [] for name in names}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign:
            continue
        prefix, dot, rest = key.partition(".")
        if dot and prefix in names:
            overrides[prefix].append(f"{rest}={value}")
        elif len(names) == 1:
            overrides[next(iter(names))].append(word)
        else:
            raise BadInput(f"{key} of which suite?", where="command line", remedy=f"write SUITE.{key}=…")
    if seed:
        overrides = {name: [f"seed={seed}", *of_suite] for name, of_suite in overrides.items()}
    return [read_suite(source, overrides[name]) for name, source in names.items()]


# --- fingerprints of data ---


def fingerprint_of(paths: Sequence[Path]) -> str:
    """Return 12 hexadecimal digits of files, in the order given: of their names, sizes, and first and last MiB."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(MAX_HASHED_BYTES))
            if size > MAX_HASHED_BYTES:
                file.seek(max(MAX_HASHED_BYTES, size - MAX_HASHED_BYTES))
                digest.update(file.read())
    return digest.hexdigest()[:12]


def read_lines(path: str, what: str) -> list[tuple[str, str]]:
    """Return (where, line) of the lines of a text file that are not empty. Raise `BadInput` if there are none.

    Lines end with a line feed alone: a text may hold other separators of Unicode.
    """
    file = existing_file(path, what)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 ({error})", where=path) from None
    lines = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    if not any(line for _, line in lines):
        raise BadInput("empty", where=path, remedy=f"give {what}")
    return [(where, line) for where, line in lines if line]


def parse_json_line(line: str, where: str) -> dict[str, Any]:
    """Return the object on a line. Raise `BadInput` where it is none."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON ({error})", where=where) from None
    if not isinstance(value, dict):
        raise BadInput("not a JSON object", where=where)
    return value


def listing_fingerprint(paths: Iterable[Path]) -> str:
    """Return 12 hexadecimal digits of many files, of their names and sizes alone."""
    digest = hashlib.sha256()
    for path in dict.fromkeys(paths):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:12]


def file_fingerprints(files: Mapping[str, str]) -> dict[str, str]:
    """Return name → fingerprint of the files that are given: name → path, empty where there is none."""
    return {name: fingerprint_of([existing_file(path, "a file")]) for name, path in files.items() if path}


def existing_file(path: str, what: str) -> Path:
    """Return the path of a file. Raise `BadInput` where there is none."""
    if not Path(path).is_file():
        raise BadInput("no such file", where=path, remedy=f"give {what}")
    return Path(path)


def existing_folder(path: str, what: str) -> Path:
    """Return the path of a folder. Raise `BadInput` where there is none."""
    if not Path(path).is_dir():
        raise BadInput("no such folder", where=path, remedy=f"give {what}")
    return Path(path)
