"""Accuracy of VQA (Agrawal et al., arXiv 1505.00468, section 3.2; Goyal et al., arXiv 1612.00837), as its official code.

An answer is right to min(1, n / 3) if n of nine people gave it, on average over leaving each of ten people out. Where not
all people agree, answers are normalised first: punctuation, articles, number words, contractions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

CONTRACTIONS = tuple(
    word
    for line in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd",
        "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've",
        "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll",
        "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd",
        "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll",
        "what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's",
        "won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've",
    )
    for word in line.split(" ")
)
"""Contractions that the official code restores where an apostrophe is missing."""
EXCEPTIONS = {
    "somebody'd": "somebodyd",  # so in the official code
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS_TO_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
MAX_PERIODS = int(re.UNICODE)
"""The official code passes the flag in the place of a count, so no more periods are removed."""


def without_apostrophes() -> dict[str, str]:
    """Return contraction without one of its apostrophes → contraction. One that has two is found with either missing."""
    table = dict(EXCEPTIONS)
    for word in CONTRACTIONS:
        places = [index for index, character in enumerate(word) if character == "'"]
        for kept in combinations(places, len(places) - 1):
            (dropped,) = set(places) - set(kept)
            table[word[:dropped] + word[dropped + 1 :]] = word
    return table


RESTORED = without_apostrophes()


def normalise(answer: str) -> str:
    """Return an answer as the official code normalises it."""
    text = answer
    for mark in PUNCTUATION:
        is_removed = f"{mark} " in answer or f" {mark}" in answer or COMMA_IN_NUMBER.search(answer) is not None
        text = text.replace(mark, "" if is_removed else " ")
    text = PERIOD.sub("", text, count=MAX_PERIODS)
    words = [WORDS_TO_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the accuracy of an answer, 0 to 1. people: the answers of people, ten in VQA."""
    answer, *given = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *people))
    if len(set(given)) > 1:
        answer, *given = (normalise(text) for text in (answer, *given))
    agreeing = given.count(answer)
    shares = [min(1.0, (agreeing - (other == answer)) / 3) for other in given]
    return sum(shares) / len(shares)
