"""Whether our text tokenizer, written as a `tokenizer.json`, gives the same ids in Hugging Face's library.

    python benchmarks/tokenizer_json.py [--files 120] [--seed 0]

Lines of files drawn from Python's own standard library, by the shipped bundle's tokenizer. Lines with `▁` are left out:
the library takes that character for a space.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from pathlib import Path

import tokenizers

from chameleon.bundle import SHIPPED
from chameleon.tokenizers.json_text import to_json_text
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.tokenizers.text import SPACE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ours = MixedTokenizer.load(SHIPPED)
    theirs = tokenizers.Tokenizer.from_str(to_json_text(ours.text, ours.vocabulary).data.decode())
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = random.Random(options.seed).sample(files, min(options.files, len(files)))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in chosen]
    lines = [line for text in texts for line in text.splitlines(keepends=True) if SPACE not in line]
    same = sum(ours.text_to_ids(line) == theirs.encode(line, add_special_tokens=False).ids for line in lines)
    print(f"{same} of {len(lines)} lines of {len(chosen)} files have the same ids")


if __name__ == "__main__":
    main()
