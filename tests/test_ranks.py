"""What each of several processes reads, waits for, and does when another one ends."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_file

from chameleon.files import sha256_of
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train import process_watch
from chameleon.train.process_watch import MISSED_SIGNS, ProcessWatch, SignCounter

SHAPE = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn_width": 128}
RUN = ["run.accelerator=cpu", "run.max_steps=13", "run.log_every_n_steps=5", "attention=dense"]
FSDP = ["run.data_parallel=fsdp"]
INSTRUMENTED = """
import collections, json, os, pathlib, sys, time
import torch
from torch import distributed
from chameleon import bundle
from chameleon.cli import main
from chameleon.data import token_shards
from chameleon.model.transformer import Attention
from chameleon.tensor_files import SafetensorsFiles
from chameleon.train import checkpoint_files, process_watch
from chameleon.train.checkpoint import CheckpointCallback
from chameleon.train.language_module import LanguageModule
from chameleon.train.step_module import StepModule

rank, seen = os.environ.get("LOCAL_RANK", "0"), collections.defaultdict(list)

def record(kind, function, size):
    def recorded(*arguments):
        result = function(*arguments)
        seen[kind].append(size(result, arguments))
        return result
    return recorded

checkpoint_files.read_bytes = record("checkpoint", checkpoint_files.read_bytes, lambda result, _: len(result))
# The image tokenizer is small, and every process has it.
size_of_part = lambda result, arguments: result.nbytes * arguments[0].names[arguments[1]].name.startswith("model")
SafetensorsFiles.box = record("bundle", SafetensorsFiles.box, size_of_part)
size_of_file = lambda _, arguments: arguments[0].stat().st_size
token_shards.sha256_of = record("shards", token_shards.sha256_of, size_of_file)
bundle.sha256_of = record("bundle verified", bundle.sha256_of, size_of_file)

step = LanguageModule.training_step
def counted(module, batch, number):
    waits = [0]
    def waiting(function):
        def wrapper(*arguments):
            waits[0] += 1
            return function(*arguments)
        return wrapper
    names = ("item", "tolist", "__bool__", "__float__", "__int__")
    originals = {name: getattr(torch.Tensor, name) for name in names}
    for name in names:
        setattr(torch.Tensor, name, waiting(originals[name]))
    group = distributed.group.WORLD
    before = group._get_sequence_number_for_group() if group is not None else 0
    step(module, batch, number)
    after = group._get_sequence_number_for_group() if group is not None else 0
    for name in names:
        setattr(torch.Tensor, name, originals[name])
    seen["steps"].append((module.is_logged_step, after - before, waits[0]))
    if os.environ.get("VICTIM") == f"{rank} {module.completed_steps}":
        if os.environ["HOW"] == "exception":
            raise ValueError("the data of this process are not readable")
        os.kill(os.getpid(), int(os.environ["HOW"]))
LanguageModule.training_step = counted
if os.environ.get("SLOW") == rank:
    forward = Attention.forward
    def slow_forward(*arguments):
        time.sleep(0.02)
        return forward(*arguments)
    Attention.forward = slow_forward
if "LATE" in os.environ:
    process_watch.SECONDS_BETWEEN_SIGNS = 0.2
if os.environ.get("LATE") == rank:
    after_step = CheckpointCallback.on_train_batch_end
    def after_a_long_step(callback, trainer, module, *arguments):
        if module.current_step >= module.run_config.max_steps:
            time.sleep(2 * process_watch.MISSED_SIGNS * process_watch.SECONDS_BETWEEN_SIGNS)
        after_step(callback, trainer, module, *arguments)
    CheckpointCallback.on_train_batch_end = after_a_long_step
try:
    main(sys.argv[2:])
finally:
    pathlib.Path(sys.argv[1], f"seen-{rank}.json").write_text(json.dumps(seen))
"""


def start(recipe: Path, out: Path, *more: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts a run, whose processes write what they did to files in `out`."""
    out.mkdir(exist_ok=True)
    script = out / "instrumented.py"
    script.write_text(INSTRUMENTED)
    arguments = ["pretrain", "--config", str(recipe), f"run.out={out}", *RUN, *more]
    return subprocess.Popen(
        [sys.executable, str(script), str(out), *arguments],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(recipe: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """What each process of a run did."""
    process = start(recipe, out, *more)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return [json.loads(path.read_text()) for path in sorted(out.glob("seen-*.json"))]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tokenizer: MixedTokenizer) -> Path:
    """A recipe whose source has eight shards."""
    folder = tmp_path_factory.mktemp("ranks")
    path = recipe_file(folder, tokenizer, model=SHAPE)
    for number in range(7):
        shutil.copytree(folder / "shards" / "s", folder / "shards" / f"s{number}")
    return path


@pytest.mark.parametrize(
    ("more", "collectives"),
    [
        pytest.param(["run.devices=2"], 2, marks=pytest.mark.slow),  # one bucket of gradients, and what the step tells
        pytest.param(["run.devices=2", "micro_batch_size=1"], 2, marks=pytest.mark.slow),
        # Parameters of root and two blocks are gathered in both passes, and their gradients are reduced.
        pytest.param(["run.devices=2", *FSDP], 3 + 3 + 3 + 1, marks=pytest.mark.slow),
        pytest.param(["run.devices=2", *FSDP, "micro_batch_size=1"], 2 * (3 + 3 + 3) + 1, marks=pytest.mark.slow),
        (["run.devices=2", *FSDP, "micro_batch_size=1", "gradient_sync=step"], 2 * (3 + 3) + 3 + 1),
    ],
)
def test_steps_wait_for_nothing_between_logged_ones(
    more: list[str], collectives: int, recipe: Path, tmp_path: Path
) -> None:
    """One collective beside those of parameters and gradients, by the process group's own count; no look at a tensor."""
    for seen in run(recipe, tmp_path, *more):
        steps = seen["steps"][2:]  # the first one makes the optimiser's state
        assert [is_logged for is_logged, *_ in seen["steps"]] == [(n + 1) % 5 == 0 or n == 12 for n in range(13)]
        assert {(count, waits) for is_logged, count, waits in steps if not is_logged} == {(collectives, 0)}
        assert all(count > collectives and waits for is_logged, count, waits in steps if is_logged)


def test_each_process_reads_its_part(recipe: Path, tmp_path: Path) -> None:
    """Shards are verified by one process each, and once; a bundle and a checkpoint are read where a process's part lies."""
    settings = [*FSDP, "run.devices=2", "run.save_every_n_steps=12"]
    for note in recipe.parent.glob("shards/*/verified.json"):  # by other tests
        note.unlink()
    first = run(recipe, tmp_path / "first", *settings)
    shards = sum(path.stat().st_size for path in recipe.parent.glob("shards/*/*.bin"))
    assert sum(sum(seen["shards"]) for seen in first) == shards
    assert all(0 < sum(seen["shards"]) <= 1.2 * shards / 2 for seen in first)
    bundle = tmp_path / "first" / "bundle"
    whole = (bundle / "model.safetensors").stat().st_size
    from_bundle = [f"bundle={bundle}", "tokenizers=null", "size=null", "model={}"]
    second = run(recipe, tmp_path / "second", *settings, *from_bundle)
    assert all("shards" not in seen for seen in second)  # they have not changed since
    assert all(0 < sum(seen["bundle"]) <= 1.2 * whole / 2 for seen in second)
    again = run(recipe, tmp_path / "second", *settings, *from_bundle, "--resume")
    files = list((tmp_path / "second" / "checkpoints" / "step-00000012").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    assert len(files) == 2 and all(0 < sum(seen["checkpoint"]) <= 1.2 * size / 2 for seen in again)
    for seen_by, is_verified in ((second, True), (again, False)):
        hashed = [sum(seen.get("bundle verified", [])) for seen in seen_by]
        # The first process writes a bundle too; it verifies the one that it starts from once for all.
        assert not any(hashed[1:]) and (hashed[0] > 1.9 * whole) == is_verified


@pytest.mark.slow
def test_copies_of_a_model_share_the_reading(recipe: Path, tmp_path: Path) -> None:
    settings = ["run.devices=2", "run.save_every_n_steps=6"]
    run(recipe, tmp_path, *settings)
    bundle = sha256_of(tmp_path / "bundle" / "model.safetensors")
    again = run(recipe, tmp_path, *settings, "--resume")
    whole = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "step-00000012").glob("*.safetensors"))
    assert all(0 < sum(seen["checkpoint"]) <= 1.2 * whole / 2 for seen in again)
    assert sha256_of(tmp_path / "bundle" / "model.safetensors") == bundle


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        pytest.param("1", "exception", marks=pytest.mark.slow),
        ("1", str(int(signal.SIGKILL))),
        pytest.param("0", "exception", marks=pytest.mark.slow),
        pytest.param("0", str(int(signal.SIGKILL)), marks=pytest.mark.slow),
    ],
)
def test_a_process_that_ends_ends_all(victim: str, how: str, recipe: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    process = start(recipe, tmp_path, "run.devices=2", environment={"VICTIM": f"{victim} 4", "HOW": how})
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 90
    if how == "exception":
        assert "the data of this process are not readable" in errors
    others = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert others.stdout == ""


@pytest.mark.slow
def test_a_process_that_is_done_is_not_taken_for_dead(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path, "run.devices=2", "run.max_steps=3", environment={"LATE": "0"})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_a_store_that_does_not_answer_ends_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_watch, "SECONDS_BETWEEN_SIGNS", 0.01)
    watch, reasons = ProcessWatch(), list[str]()
    watch.hosts = ["one"]

    def end(reason: str, code: int) -> None:
        reasons.append(reason)
        watch.is_over.set()

    monkeypatch.setattr(watch, "end", end)
    monkeypatch.setattr(watch, "num_signs", 7)  # and no more, since `watch` hangs
    watch.watch_the_watch()
    assert reasons == ["the first process, on one, does not answer"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], FSDP])
def test_the_slowest_process_is_named(way: list[str], recipe: Path, tmp_path: Path) -> None:
    """In the log of each logged step, and by an alarm once it was slow three times in a row."""
    more = ["run.devices=3", "run.log_every_n_steps=1", "global_batch_size=6", *way]
    process = start(recipe, tmp_path, *more, environment={"SLOW": "2"})
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    with open(tmp_path / "log" / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("speed/slowest_process")]
    assert len(rows) == 13 and [float(row["speed/slowest_process"]) for row in rows[3:]].count(2) >= 9
    assert float(rows[-1]["speed/slowest_to_median"]) > 1.5
    assert "process 2 takes" in (tmp_path / "events.jsonl").read_text()


def test_a_process_without_signs_counts_as_dead() -> None:
    counter = SignCounter()
    for look in range(3 * MISSED_SIGNS):
        signs = {1: str(look).encode(), 2: str(min(look, 20)).encode()}
        dead = counter.look(signs)
        assert dead == (2 if look >= 20 + MISSED_SIGNS else None), look


def test_validation_is_shared(recipe: Path, tmp_path: Path) -> None:
    """Any number of processes validates the same rows; that they cannot be divided evenly makes no difference."""
    figures = []
    for devices in (1, 3):
        out = tmp_path / str(devices)
        out.mkdir()
        script = [sys.executable, "-m", "chameleon.cli", "pretrain", "--config", str(recipe), *RUN, f"run.out={out}"]
        shards = recipe.parent / "shards"
        script += [f"validation=[{{shards: {shards}}}]", f"run.devices={devices}", "micro_batch_size=1", "--json"]
        script += [*FSDP, "global_batch_size=3"] if devices == 3 else ["global_batch_size=3"]
        done = subprocess.run(script, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        figures.append(json.loads(done.stdout))
    for kind in ("text", "image"):
        name = f"validation/{kind}_loss"
        values = torch.tensor([figure["metrics"][name] if "metrics" in figure else figure[name] for figure in figures])
        torch.testing.assert_close(values, values[:1].expand(2), atol=1e-5, rtol=0)
