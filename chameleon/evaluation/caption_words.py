"""How captions become words: as by the Penn Treebank tokenizer of coco-caption, by its Java or by rules in Python.

coco-caption lower-cases captions, splits them by Stanford's PTBTokenizer and removes punctuation. That program reads a
file of captions, and the beginning of one may decide about a period at the end of the one before, so references and outputs
are split as two files, as coco-caption does. The rules here follow the Penn Treebank's conventions for what occurs in
captions: contractions in two words; numbers, abbreviations and hyphenated words whole. `benchmarks/caption_words.py` tells
on how many captions both agree, and how figures differ.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal

from chameleon.errors import BadInput
from chameleon.evaluation.caption_metrics import Words, has_java

WordSplitter = Literal["auto", "java", "python"]
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""Words that coco-caption removes. It means to remove brackets too, but has them in capitals, after lower-casing."""
ABBREVIATIONS = {
    *(
        "mr",
        "mrs",
        "ms",
        "dr",
        "st",
        "jr",
        "sr",
        "vs",
        "etc",
        "inc",
        "co",
        "corp",
        "ltd",
        "prof",
        "gen",
        "sgt",
        "ft",
        "ave",
    ),
    *(
        "blvd",
        "rd",
        "mt",
        "sq",
        "dept",
        "est",
        "jan",
        "feb",
        "mar",
        "apr",
        "aug",
        "sept",
        "oct",
        "nov",
        "dec",
        "mon",
        "tue",
    ),
    *(
        "wed",
        "thu",
        "fri",
        "rev",
        "hon",
        "capt",
        "lt",
        "col",
        "maj",
        "gov",
        "sen",
        "rep",
        "pres",
        "assn",
        "bros",
        "cf",
        "al",
    ),
}
"""Words that keep the period after them. A single letter does too, unless a sentence begins after it."""
SENTENCE_START = re.compile(r"\.\s+[A-Z]")
SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
TOKEN = re.compile(
    r"""
      (?:https?://|www\.)\S+
    | (?:[a-z]\.)+[a-z]\.(?!\w)                                   # u.s.
    | '(?:tis|twas|em|n)(?!\w)
    | [+-]?\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s|'s)?(?!\w|-\w)       # 1,000  3.5  10:30  1st  1960s  +1
    | \w+(?:[-'’&.@/_]\w+)*                                      # words with hyphens, apostrophes and slashes inside
    | \.\.\.+ | --+ | ``|'' | \*+ | [!?]{2,} | \S
    """,
    re.VERBOSE,
)
CONTRACTION = re.compile(r"(.+?)(n['’]t|['’](?:s|m|d|re|ve|ll))$")
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def split_caption(text: str) -> Words:
    """Return the words of a caption, by the rules in Python."""
    words: Words = []
    text = text.replace("\n", " ")
    lowered = text.lower()
    tokens = list(TOKEN.finditer(lowered))
    for match, follower in zip_longest(tokens, tokens[1:]):
        token = match.group()
        has_period = follower is not None and follower.group() == "." and follower.start() == match.end()
        is_initial = len(token) == 1 and token.isalpha() and not SENTENCE_START.match(text, match.end())
        if has_period and (token in ABBREVIATIONS or is_initial):
            words.append(f"{token}.")
        else:
            words += split_token(token)
    return [word for word in words if word not in PUNCTUATION and not re.fullmatch(r"\.\.+|--+", word)]


def split_token(token: str) -> Words:
    """Return the words of one run of characters."""
    if token in BRACKETS:
        return [BRACKETS[token]]
    if token in ('"', "“", "”"):
        return []
    if token in SPLIT_WORDS:
        return SPLIT_WORDS[token].split()
    match = CONTRACTION.match(token)
    if match:
        return [*split_token(match.group(1)), match.group(2).replace("’", "'")]
    return [token]


def caption_words(texts: Sequence[Sequence[str]], splitter: WordSplitter = "auto") -> tuple[list[list[Words]], str]:
    """Return the words of lists of captions, and which splitter made them: java or python.

    auto is Java's where Java and pycocoevalcap are installed. Raises `BadInput` where java is asked for and missing.
    """
    if splitter == "java" and not has_java():
        raise BadInput("the PTB tokenizer needs Java and pycocoevalcap", where="words", remedy="use words=python")
    if splitter == "python" or not has_java():
        return [[split_caption(text) for text in of_picture] for of_picture in texts], "python"
    tokenizer: Any = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    keyed = {index: [{"caption": text} for text in of_picture] for index, of_picture in enumerate(texts)}
    tokenized = tokenizer.tokenize(keyed)
    return [[text.split() for text in tokenized[index]] for index in range(len(texts))], "java"
