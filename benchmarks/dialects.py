"""What the dialects of pictures cost.

    python benchmarks/dialects.py [--before CHECKOUT]

* square: drawings of the shipped model with this package and with an earlier checkout, in turns, in processes of their own;
* sized: a picture of 672 × 384 pixels at 16 pixels a code, 1,008 codes in 24 rows (1,036 tokens), beside 1,008 codes
  without row ends, by a random model: passes and time;
* packing: how full rows are with pictures of all shapes of Lumina-mGPT and with squares, with captions, in rows of 4,096.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from chameleon.bundle import SHIPPED
from chameleon.data.index import RowIndex
from chameleon.data.token_shards import open_shards, write_shard
from chameleon.dialect import Dialect, SizedDialect, SquareDialect
from chameleon.generation.constraints import OutputConstraints
from chameleon.generation.engine import Engine
from chameleon.generation.request import Request
from chameleon.model.config import ModelConfig
from chameleon.model.transformer import Transformer
from chameleon.vocabulary import Vocabulary

ROUNDS = 7
DRAW = """
import sys, time, torch
torch.set_num_threads(2)
from chameleon import Chameleon
model = Chameleon.load(sys.argv[1], dtype="float32")
prompts = [f"{n} hearts" for n in range(16)]
model.draw_batch(prompts)
model.draw("red heart")
start = time.perf_counter()
for seed in range(6):
    model.draw("red heart", seed=seed)
single = (time.perf_counter() - start) / 6
start = time.perf_counter()
model.draw_batch(prompts)
print(single, (time.perf_counter() - start) / 16)
"""


def draw_times(checkout: str) -> tuple[float, float]:
    """Return seconds for one drawing alone, and for each of 16 together, by the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": checkout}
    command = [sys.executable, "-c", DRAW, str(SHIPPED)]
    output = subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True).stdout
    alone, together = map(float, output.split())
    return alone, together


def square(before: str) -> None:
    here = str(Path(__file__).parent.parent)
    times: dict[str, list[tuple[float, float]]] = {here: [], before: []}
    for index in range(ROUNDS):
        for checkout in (here, before) if index % 2 else (before, here):
            times[checkout].append(draw_times(checkout))
    for name, column in (("one drawing", 0), ("each of 16", 1)):
        now, then = (statistics.median(row[column] for row in times[checkout]) for checkout in (here, before))
        print(f"square, {name}: {1000 * now:.1f} ms, before {1000 * then:.1f} ms, ratio {now / then:.3f}")


def vocabulary(dialect: Dialect) -> Vocabulary:
    return Vocabulary(1, 0, 2, 3, 4, 5, ((100, 8192),), ((9000, 1000),), 10_000, dialect, 2)


def sized() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=10_000, layers=8, width=512, heads=8, kv_heads=8, ffn_width=1408, context_length=2048)
    model = Transformer(config).eval().requires_grad_(False)
    rows = SizedDialect(row_end=6, size_ids=((10, 64),), unit=2, target=16)
    grid = (24, 42)
    seconds: dict[str, list[float]] = {}
    passes = {}
    for _ in range(3):
        for name, dialect in (("sized", rows), ("square", SquareDialect(grid))):
            engine = Engine(model, vocabulary(dialect))
            constraints = OutputConstraints(dialect.length(grid), format=("image",), grid=grid)
            start = time.perf_counter()
            (output,) = engine.generate([Request((0, 9001, 5), constraints)])
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            passes[name] = (len(output), engine.decoder.num_forward_passes)
    for name in seconds:
        print(f"{name}: {passes[name][0]} tokens, {passes[name][1]} passes, {statistics.median(seconds[name]):.2f} s")
    print(f"ratio {statistics.median(seconds['sized']) / statistics.median(seconds['square']):.3f}")


def packing() -> None:
    for side in (512, 768):
        shapes = SizedDialect(row_end=6, size_ids=((10, 64),), unit=2, target=side // 32)
        for name, dialect in (("all shapes", shapes), ("squares", SquareDialect(shapes.grid))):
            rng, v = random.Random(0), vocabulary(dialect)
            with tempfile.TemporaryDirectory() as folder:
                with write_shard(Path(folder) / "s", "print", v) as writer:
                    for _ in range(4000):
                        grid = rng.choice(dialect.grids)
                        image = np.array(v.image_block(grid))
                        image[image < 0] = 100
                        words = min(300, int(rng.lognormvariate(3.5, 0.8)) + 1)
                        writer.add(torch.from_numpy(np.concatenate(([0], image, np.full(words, 9001), [2]))))
                index = RowIndex(open_shards(Path(folder)), 4096, v)
                print(f"packing, {side} pixels, {name}: {index.fill:.1%} of {len(index)} rows filled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="an earlier checkout of the package")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    packing()
    sized()
    if arguments.before:
        square(arguments.before)


if __name__ == "__main__":
    main()
