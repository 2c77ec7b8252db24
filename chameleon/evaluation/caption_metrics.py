"""Metrics of captions, equal to those of pycocoevalcap 1.2 on the same words: CIDEr-D, BLEU, ROUGE-L; METEOR by its Java.

CIDEr-D: Vedantam et al., arXiv 1411.5726. BLEU: Papineni et al., ACL 2002, with the length of the closest reference.
ROUGE-L: Lin, ACL 2004, with the weight on recall of coco-caption. How texts become words: `caption_words`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

from chameleon.errors import BadInput
from chameleon.evaluation.statistics import BLEU_ORDERS

WORD = re.compile(r"\w+")
MAX_NGRAM = 4
LENGTH_SIGMA = 6.0
ROUGE_BETA = 1.2
Words = list[str]
NGrams = Counter[tuple[str, ...]]


def simple_words(text: str) -> Words:
    """Return the lower-case words of a text, without punctuation."""
    return WORD.findall(text.lower())


def ngrams(words: Sequence[str], n: int) -> NGrams:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


class CiderD:
    """CIDEr-D with the document frequencies of a set of references."""

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        """references: for each picture the words of its references."""
        self.log_count = math.log(max(1, len(references)))
        document_frequency: NGrams = Counter()
        for texts in references:
            document_frequency.update(
                {gram for n in range(1, MAX_NGRAM + 1) for words in texts for gram in ngrams(words, n)}
            )
        self.inverse = {gram: self.log_count - math.log(count) for gram, count in document_frequency.items()}
        self.references = [[self.vectors(words) for words in texts] for texts in references]

    def vectors(self, words: Words) -> tuple[int, list[tuple[dict[tuple[str, ...], float], float]]]:
        """Return the number of words, and for each n the tf-idf of the n-grams and its norm."""
        result = []
        for n in range(1, MAX_NGRAM + 1):
            weights = {gram: count * self.inverse.get(gram, self.log_count) for gram, count in ngrams(words, n).items()}
            result.append((weights, math.sqrt(sum(value * value for value in weights.values()))))
        return len(words), result

    def score(self, caption: Words, index: int) -> float:
        """Return CIDEr-D of a caption of picture `index`: clipped cosines with a Gaussian penalty on lengths, times 10."""
        length, vectors = self.vectors(caption)
        total = 0.0
        for reference_length, reference in self.references[index]:
            penalty = math.exp(-((length - reference_length) ** 2) / (2 * LENGTH_SIGMA**2))
            for (a, norm_a), (b, norm_b) in zip(vectors, reference, strict=True):
                if norm_a and norm_b:
                    total += (
                        penalty * sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / (norm_a * norm_b)
                    )
        return 10 * total / MAX_NGRAM / max(1, len(self.references[index]))


def bleu_terms(caption: Words, references: Sequence[Words]) -> list[float]:
    """Return the terms of corpus BLEU (`statistics.bleu`): clipped matches and candidates of 1- to 4-grams, two lengths.

    The second length is that of the reference whose length is closest, of equally close ones the shorter.
    """
    matches, candidates = [], []
    for n in range(1, BLEU_ORDERS + 1):
        counts = ngrams(caption, n)
        largest: NGrams = Counter()
        for words in references:
            largest |= ngrams(words, n)
        matches.append(float(sum((counts & largest).values())))
        candidates.append(float(max(0, len(caption) - n + 1)))
    closest = min((len(words) for words in references), key=lambda length: (abs(length - len(caption)), length))
    return [*matches, *candidates, float(len(caption)), float(closest)]


def rouge_l(caption: Words, references: Sequence[Words]) -> float:
    """Return ROUGE-L: the F-measure of the best precision and best recall of longest common subsequences."""
    candidate = caption or [""]
    lengths = [(longest_common_subsequence(words or [""], candidate), len(words or [""])) for words in references]
    precision = max(common / len(candidate) for common, _ in lengths)
    recall = max(common / length for common, length in lengths)
    if not precision or not recall:
        return 0.0
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        previous = 0
        for column, other in enumerate(second, start=1):
            previous, row[column] = row[column], previous + 1 if word == other else max(row[column], row[column - 1])
    return row[-1]


def has_java() -> bool:
    """Return whether pycocoevalcap's Java programs can run: the PTB tokenizer and METEOR."""
    return shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None


def meteor(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, list[float]]:
    """Return METEOR 1.5 of the set, and of each caption, by pycocoevalcap's Java. Raise `BadInput` where it cannot run."""
    if not has_java():
        raise BadInput("METEOR needs Java and pycocoevalcap", where="meteor", remedy="install both, or leave meteor=auto")
    scorer: Any = importlib.import_module("pycocoevalcap.meteor.meteor").Meteor()
    texts = {index: [" ".join(words)] for index, words in enumerate(captions)}
    known = {index: [" ".join(words) for words in of_picture] for index, of_picture in enumerate(references)}
    try:
        value, values = scorer.compute_score(known, texts)
    finally:
        scorer.meteor_p.kill()
    return float(value), [float(score) for score in values]
