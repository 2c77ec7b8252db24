"""How the caption words of the rules in Python differ from those of Stanford's PTBTokenizer, and CIDEr-D with them.

    python benchmarks/caption_words.py        (needs Java and pycocoevalcap)

Texts: first sentences of the docstrings of Python's standard library, and the embedded set's names and keywords.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from pathlib import Path

from chameleon.data import emoji
from chameleon.evaluation.caption_metrics import CiderD, Words
from chameleon.evaluation.caption_words import caption_words


def sentences() -> list[str]:
    """Return the first sentences of docstrings, in a fixed order."""
    result = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (docstring := ast.get_docstring(node)):
                result.append(re.split(r"(?<=[.!?])\s", " ".join(docstring.split()))[0])
    return [text for text in dict.fromkeys(result) if 3 <= len(text.split()) <= 25]


def noisy(text: str, rng: random.Random) -> str:
    """Return a text with a few of its words left out."""
    return " ".join(word for word in text.split(" ") if rng.random() > 0.2)


def main() -> None:
    rng = random.Random(0)
    names = [text for entry in emoji.load("train") for text in (f"{entry.caption}.", " ".join(entry.tags))]
    for title, texts in (("docstrings", sentences()), ("names and keywords", list(dict.fromkeys(names)))):
        pairs = [[text, noisy(text, rng)] for text in texts]
        scores: dict[str, float] = {}
        words: dict[str, list[list[Words]]] = {}
        for splitter in ("java", "python"):
            words[splitter], _ = caption_words(pairs, splitter)  # type: ignore[arg-type]
            cider = CiderD([[reference] for reference, _ in words[splitter]])
            scores[splitter] = sum(cider.score(caption, i) for i, (_, caption) in enumerate(words[splitter])) / len(pairs)
        differing = [i for i in range(len(pairs)) if words["java"][i][0] != words["python"][i][0]]
        print(f"{title}: {len(pairs)} texts, words equal in {1 - len(differing) / len(pairs):.2%}, CIDEr-D {scores}")
        for index in differing[:20]:
            print("  ", pairs[index][0], "|", words["java"][index][0], "|", words["python"][index][0])


if __name__ == "__main__":
    main()
