"""Metrics of captions: exact match and CIDEr-D (Vedantam et al., arXiv 1411.5726)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+")
MAX_NGRAM = 4
LENGTH_SIGMA = 6.0

NGrams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Return the lower-case words of a text, without punctuation."""
    return WORD.findall(text.lower())


def exact_match(captions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of captions whose words are those of the reference."""
    pairs = list(zip(captions, references, strict=True))
    return sum(words(caption) == words(reference) for caption, reference in pairs) / max(1, len(pairs))


def ngrams(tokens: Sequence[str], n: int) -> NGrams:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean CIDEr-D of captions, each against a list of references; document frequencies are of all references.

    Clipped tf-idf cosine of 1- to 4-grams, with a Gaussian penalty on the difference in length, times 10.
    """
    tokenized = [[words(text) for text in texts] for texts in references]
    log_count = math.log(max(1, len(tokenized)))
    inverse_frequencies = []
    for n in range(1, MAX_NGRAM + 1):
        document_frequency: Counter[tuple[str, ...]] = Counter()
        for texts in tokenized:
            document_frequency.update({ngram for text in texts for ngram in ngrams(text, n)})
        inverse_frequencies.append({gram: log_count - math.log(count) for gram, count in document_frequency.items()})

    def tf_idf(tokens: Sequence[str], n: int) -> dict[tuple[str, ...], float]:
        inverse = inverse_frequencies[n - 1]
        return {ngram: count * inverse.get(ngram, log_count) for ngram, count in ngrams(tokens, n).items()}

    scores = []
    for caption, texts in zip(captions, tokenized, strict=True):
        tokens = words(caption)
        total = 0.0
        for text in texts:
            penalty = math.exp(-((len(tokens) - len(text)) ** 2) / (2 * LENGTH_SIGMA**2))
            for n in range(1, MAX_NGRAM + 1):
                a, b = tf_idf(tokens, n), tf_idf(text, n)
                norm = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
                if norm:
                    total += penalty * sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / norm
        scores.append(10 * total / MAX_NGRAM / max(1, len(texts)))
    return sum(scores) / max(1, len(scores))
