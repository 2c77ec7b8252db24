"""What a user feels: seconds from the shell to an answer, and a drawing beside other busy processes.

    python benchmarks/everyday.py [--rounds 7] [--only start load compiled]

`start` runs the command anew each time, after one run that is not counted. `load` draws one picture of 64 pixels with the
shipped model, in a process of its own for each setting, beside none, one and two processes that are always busy, with the
number of threads that is chosen and with two. `compiled` starts the same compiled decoding twice in new processes, with an
empty cache of compiled code before the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUSY = "while True: pass"
DRAW = """
import sys, time
from chameleon import Chameleon
from chameleon.threads import set_threads
if sys.argv[2] != "chosen": set_threads(int(sys.argv[2]))
model = Chameleon.load()
model.draw("red heart")
time.sleep(0.3)
for seed in range(int(sys.argv[1])):
    start = time.perf_counter()
    model.draw("red heart", seed=seed)
    print(time.perf_counter() - start, flush=True)
"""
COMPILE = """
import time, torch
from chameleon import Chameleon
start = time.perf_counter()
model = Chameleon.load(compile=True)
model.draw("red heart", guidance_scale=1.0)
print(time.perf_counter() - start)
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that are always busy."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(command: list[str], **environment: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    ).stdout


def summary(name: str, values: list[float]) -> dict[str, float]:
    median = statistics.median(values)
    print(f"{name:48} {median:7.3f} s ({min(values):.3f}–{max(values):.3f})", file=sys.stderr, flush=True)
    return {"median": median, "lowest": min(values), "highest": max(values)}


def start(options: argparse.Namespace) -> dict[str, Any]:
    from chameleon.data import emoji

    command = str(Path(sys.executable).parent / "chameleon")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        emoji.load("validation")[0].picture.save(picture)
        for name, arguments in {
            "chameleon --help": [command, "--help"],
            "import chameleon": [sys.executable, "-c", "import chameleon"],
            "import torch": [sys.executable, "-c", "import torch"],
            "chameleon caption picture.png": [command, "caption", str(picture)],
            "chameleon draw": [command, "draw", "red heart", "--out", str(Path(folder) / "drawing.png")],
        }.items():
            times = []
            for _ in range(options.rounds + 1):
                began = time.perf_counter()
                run(arguments)
                times.append(time.perf_counter() - began)
            results[name] = summary(name, times[1:])
    return results


def load(options: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for others in (0, 1, 2):
        for threads in ("chosen", "1", "2"):
            with busy(others):
                output = run([sys.executable, "-c", DRAW, str(options.rounds), threads])
            name = f"drawing, {others} busy processes, threads {threads}"
            results[name] = summary(name, [float(line) for line in output.split()])
    idle = results["drawing, 0 busy processes, threads chosen"]["median"]
    for result in results.values():
        result["times idle"] = result["median"] / idle
    return results


def compiled(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        times = [float(run([sys.executable, "-c", COMPILE], TORCHINDUCTOR_CACHE_DIR=folder)) for _ in range(3)]
    for name, value in zip(("first", "second", "third"), times, strict=True):
        summary(f"compiled drawing from its start, {name}", [value])
    return {"seconds": times}


PARTS = {"start": start, "load": load, "compiled": compiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    print(json.dumps({name: PARTS[name](options) for name in options.only}, indent=2))


if __name__ == "__main__":
    main()
