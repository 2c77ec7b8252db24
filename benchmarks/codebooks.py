"""Three ways to learn a codebook, on the embedded set, from the same recipe and the same pictures in the same order.

The first weights differ, as the codebooks draw different numbers before the rest is drawn.

    python benchmarks/codebooks.py [--steps 600] [--seeds 1 2]

Prints for each the validation PSNR of held-out pictures, the share of codes they use, and the codes' perplexity.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import get_args

from chameleon.tokenizers.quantizer import CodebookKind
from chameleon.train.image_tokenizer import fit_image
from chameleon.train.recipe import FitImageRecipe, read_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    options = parser.parse_args()
    for seed in options.seeds:
        for kind in get_args(CodebookKind):
            with tempfile.TemporaryDirectory() as folder:
                settings = [f"codebook={kind}", f"run.max_steps={options.steps}", f"run.seed={seed}", f"run.out={folder}"]
                recipe = read_recipe(
                    FitImageRecipe, "emoji-image", [*settings, "run.progress=false", "run.validate_every_n_steps=0"]
                )
                started = time.monotonic()
                _, figures = fit_image(recipe)
                seconds = time.monotonic() - started
            shown = (
                f"{figures[f'validation/{name}']:.4g} {name}" for name in ("psnr", "codebook_usage", "codebook_perplexity")
            )
            print(f"seed {seed}  {kind:16}", *shown, f"{seconds:.0f} s", sep="  ", flush=True)


if __name__ == "__main__":
    main()
