"""The embedded emoji in three openly licensed styles, with words in twelve languages and a train/validation split.

Pictures are sampled by concept, since 58% of them are variants of people. For 15% of the concepts one whole style is held
out for validation, so each concept of the validation set occurs in training, but not in that style. The shards are written
by `build_emoji.py`; `embedded/ATTRIBUTIONS.md` names the sources.
"""

from __future__ import annotations

import gzip
import json
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from chameleon.data.labelled import EMBEDDED, LabelledPicture, choose_concepts, hashed_share, read_labelled
from chameleon.document import Document, Text

STYLES = ("fluent", "noto", "twemoji")
VALIDATION_SPACING = 20
"""One in so many emoji has words for validation, and one in so many modules is code for validation."""


@cache
def load(split: str | None = None) -> tuple[LabelledPicture, ...]:
    """Return all emoji of a split ("train", "validation"; None: both), in the order of the shards."""
    if split is not None:
        return tuple(entry for entry in load() if entry.split == split)
    return read_labelled("emoji-*.tar.gz")


def subset(split: str, concepts: int | None = None) -> tuple[LabelledPicture, ...]:
    """Return the emoji of a split; with `concepts`, of that many concepts only, the same ones in both splits."""
    if concepts is None:
        return load(split)
    chosen = choose_concepts(load(), concepts)
    return tuple(entry for entry in load(split) if entry.concept in chosen)


@cache
def words_of_languages() -> tuple[tuple[str, dict[str, list[str]]], ...]:
    """Return (hexcode, language → name and tags) of each emoji without skin tone, in the order of the hexcodes."""
    with gzip.open(EMBEDDED / "words.jsonl.gz", "rt", encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    return tuple((entry["hexcode"], entry["words"]) for entry in entries)


def words_of_split(split: str) -> Iterator[tuple[int, str, dict[str, list[str]]]]:
    """Yield (index, hexcode, language → name and tags) of a split. Every 20th emoji is for validation."""
    for index, (hexcode, words_of) in enumerate(words_of_languages()):
        if (index % VALIDATION_SPACING == 0) == (split == "validation"):
            yield index, hexcode, words_of


@cache
def names_in_languages() -> dict[str, dict[str, str]]:
    """Return hexcode without skin tone → language → name, of the emoji whose words are not for validation."""
    return {
        hexcode: {language: named[0] for language, named in words_of.items()}
        for _, hexcode, words_of in words_of_split("train")
    }


def words(split: str, seed: int = 0) -> Iterator[Document]:
    """Yield names and tags of emoji in twelve languages, one language a line."""
    for index, _, words_of in words_of_split(split):
        languages = sorted(words_of)
        random.Random(f"{seed} {index}").shuffle(languages)
        for start in range(0, len(languages), 3):
            shown = languages[start : start + 3]
            yield Document((Text("\n".join(f"{language}: {', '.join(words_of[language])}" for language in shown)),))


def code(split: str, limit_bytes: int | None = None) -> Iterator[Document]:
    """Yield modules of Python's standard library as text. A twentieth, by their names, is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    bytes_read = 0
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts)
    )
    for path in paths:
        # By name, so that a module is in the same split with any version of Python.
        is_for_validation = hashed_share("code", path.relative_to(root).as_posix()) < 1 / VALIDATION_SPACING
        if is_for_validation != (split == "validation"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if limit_bytes is not None and bytes_read >= limit_bytes:
            return
        bytes_read += len(text.encode())
        if text:
            yield Document((Text(text),))
