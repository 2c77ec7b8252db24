"""Figures for captions: exact match and CIDEr-D (Vedantam et al., arXiv 1411.5726)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+")
NGRAMS = 4
SIGMA = 6.0

Grams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return WORD.findall(text.lower())


def exact_match(captions: Sequence[str], references: Sequence[str]) -> float:
    """Share of captions whose words are those of the reference."""
    pairs = list(zip(captions, references, strict=True))
    return sum(words(caption) == words(reference) for caption, reference in pairs) / max(1, len(pairs))


def grams(tokens: Sequence[str], size: int) -> Grams:
    return Counter(tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean CIDEr-D of captions against their references, each a list of texts; document frequencies from all references.

    Clipped tf-idf cosine of 1- to 4-grams, a Gaussian penalty on the difference in length, times 10.
    """
    rows = [[words(text) for text in texts] for texts in references]
    scores = []
    log_count = math.log(max(1, len(rows)))
    tables = []
    for size in range(1, NGRAMS + 1):
        frequency: Counter[tuple[str, ...]] = Counter()
        for texts in rows:
            frequency.update({gram for text in texts for gram in grams(text, size)})
        tables.append({gram: log_count - math.log(count) for gram, count in frequency.items()})

    def vector(tokens: Sequence[str], size: int) -> dict[tuple[str, ...], float]:
        table = tables[size - 1]
        return {gram: count * table.get(gram, log_count) for gram, count in grams(tokens, size).items()}

    for caption, texts in zip(captions, rows, strict=True):
        tokens = words(caption)
        total = 0.0
        for text in texts:
            penalty = math.exp(-((len(tokens) - len(text)) ** 2) / (2 * SIGMA**2))
            for size in range(1, NGRAMS + 1):
                a, b = vector(tokens, size), vector(text, size)
                norm = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
                if norm:
                    total += penalty * sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / norm
        scores.append(10 * total / NGRAMS / max(1, len(texts)))
    return sum(scores) / max(1, len(scores))
