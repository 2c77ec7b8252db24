"""A run that is killed and goes on ends as one that was not, to the bit."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import recipe_file

from chameleon.cli import main
from chameleon.errors import BadInput
from chameleon.tensor_files import SafetensorsFiles
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.recipe import PretrainRecipe, read_recipe
from chameleon.train.run import train

CODE = """
import os, sys
from chameleon.cli import main
from chameleon.train.checkpoint import CheckpointCallback
from chameleon.train.step_module import StepModule
begin = StepModule.on_train_batch_start
def step(module, batch, number):
    if module.completed_steps == int(sys.argv[1]) and os.environ.get("LOCAL_RANK", "0") == os.environ.get("SIGNALLED", "0"):
        for callback in module.trainer.callbacks:
            if isinstance(callback, CheckpointCallback):
                callback.writer.wait()  # the checkpoints before are complete
        (os.killpg if os.environ.get("GROUP") else os.kill)(0 if os.environ.get("GROUP") else os.getpid(), int(sys.argv[2]))
    return begin(module, batch, number)
StepModule.on_train_batch_start = step
main(sys.argv[3:])
"""
CHANGES = [
    "run.max_steps=14",
    "run.save_every_n_steps=3",
    "run.log_every_n_steps=1",
    "model.dropout=0.1",
    "micro_batch_size=2",
]


def run(recipe: Path, out: Path, *more: str, step: int = -1, sign: int = 0, to_group: bool = False) -> int:
    """Trains in a process of its own, which is sent a signal at a step, with its workers or without."""
    return command(["pretrain", "--config", str(recipe), f"run.out={out}", *CHANGES, *more], step, sign, to_group)


def command(arguments: list[str], step: int = -1, sign: int = 0, to_group: bool = False) -> int:
    start = [sys.executable, *(["-c", CODE, str(step), str(int(sign))] if sign else ["-m", "chameleon.cli"]), *arguments]
    environment = {**os.environ, "GROUP": "1" if to_group else ""}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, start_new_session=True)
    assert done.returncode in (0, -signal.SIGKILL, 143), done.stderr
    return done.returncode


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(SafetensorsFiles.from_folder(out / "bundle", "model").items())


def losses(out: Path) -> list[tuple[str, ...]]:
    names = ("step", "train/loss", "train/text_loss", "train/grad_norm", "train/output_norm", "lr")
    with open(out / "log" / "metrics.csv", encoding="utf-8") as file:
        return [tuple(row.get(name, "") for name in names) for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_killed_and_resumed_it_ends_the_same(kind: str, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    recipe = recipe_file(tmp_path, tokenizer, optimizer={"lr": 0.01, "warmup_steps": 2, "eps": 1e-8, "kind": kind})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(recipe, whole) == 0
    assert run(recipe, killed, step=7, sign=signal.SIGKILL) == -signal.SIGKILL
    kept = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006"]
    assert run(recipe, killed, "--resume", step=10, sign=signal.SIGKILL) == -signal.SIGKILL
    (state,) = (killed / "checkpoints" / "step-00000009").glob("*.safetensors")
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)  # so the one before it serves
    assert run(recipe, killed, "--resume") == 0
    mine, expected = weights(killed), weights(whole)
    assert mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in expected)
    assert losses(killed) == losses(whole) and len(losses(whole)) == 14


@pytest.mark.slow  # one process; two are below
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint(number: int, tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    recipe = recipe_file(tmp_path, tokenizer)
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert run(recipe, whole, "run.save_every_n_steps=0") == 0
    assert run(recipe, ended, "run.save_every_n_steps=0", "num_workers=1", step=4, sign=number, to_group=True) == 143
    assert [path.name for path in (ended / "checkpoints").iterdir()] == ["step-00000005"]
    assert not (ended / "bundle").exists()
    assert run(recipe, ended, "run.save_every_n_steps=0", "--resume") == 0
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(ended).items())
    assert losses(ended) == losses(whole)


def test_a_signal_to_one_process_ends_all(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Of two processes the second is told to end: both write the checkpoint, and go on from it to the same bits."""
    recipe, script = recipe_file(tmp_path, tokenizer), tmp_path / "run.py"
    script.write_text(CODE)
    arguments = [
        "pretrain",
        "--config",
        str(recipe),
        *CHANGES,
        "run.devices=2",
        "run.accelerator=cpu",
        "micro_batch_size=0",
        "num_workers=1",
    ]
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert command([*arguments, f"run.out={whole}"]) == 0
    start = [sys.executable, str(script), "4", str(int(signal.SIGTERM)), *arguments, "run.save_every_n_steps=0"]
    environment = {**os.environ, "SIGNALLED": "1"}
    done = subprocess.run([*start, f"run.out={ended}"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143 and not (ended / "bundle").exists()
    assert [path.name for path in (ended / "checkpoints").iterdir()] == ["step-00000005"]
    assert command([*arguments, f"run.out={ended}", "--resume"]) == 0
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(ended).items())


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Five times, while it trains or writes a checkpoint, which it does all the time."""
    recipe = recipe_file(tmp_path, tokenizer)
    settings = ["run.max_steps=200", "run.save_every_n_steps=2", "run.log_every_n_steps=1"]
    assert run(recipe, tmp_path / "whole", *settings) == 0
    killed, rng, kills = tmp_path / "killed", random.Random(0), 0
    start = [sys.executable, "-m", "chameleon.cli", "pretrain", "--config", str(recipe), f"run.out={killed}", *CHANGES]
    while kills < 5:
        began, log = time.time(), killed / "log" / "metrics.csv"
        process = subprocess.Popen([*start, *settings, *(["--resume"] if kills else [])], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (log.is_file() and log.stat().st_mtime > began):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:  # a fast machine: there was not enough left to do
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 3
    assert run(recipe, killed, *settings, "--resume") == 0
    mine, expected = weights(killed), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], expected[name]) for name in expected) and losses(killed) == losses(
        tmp_path / "whole"
    )


def test_changed_recipes(tmp_path: Path, tokenizer: MixedTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_file(tmp_path, tokenizer)
    out = tmp_path / "run"
    run(recipe, out, step=5, sign=signal.SIGKILL)
    command = ["pretrain", "--config", str(recipe), f"run.out={out}", *CHANGES, "--resume"]
    with pytest.raises(SystemExit) as error:
        main([*command[:4], *CHANGES, "optimizer.lr=0.5", "run.log_every_n_steps=2", "--resume"])
    actual = capsys.readouterr().err
    assert error.value.code == 2 and "optimizer.lr from 0.01 to 0.5" in actual and "--force" in actual
    with pytest.warns(UserWarning, match=r"run\.log_every_n_steps from 1 to 2"):
        main([*command[:4], *CHANGES, "run.log_every_n_steps=2", "--resume"])
    description = json.loads((out / "bundle" / "provenance.json").read_text())
    assert description["training"][-1]["recipe"]["run"]["max_steps"] == 14


def test_nothing_to_resume(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.max_steps=2", "run.resume=true"])
    with pytest.warns(UserWarning, match="no checkpoint in"):
        train(recipe)
    recipe.run.save_every_n_steps, recipe.run.max_steps, recipe.run.resume = 1, 3, False
    train(recipe)
    recipe.run.resume, recipe.global_batch_size = True, 6
    with pytest.raises(BadInput, match="global_batch_size from 4 to 6"):
        train(recipe)


@pytest.mark.slow
def test_another_number_of_processes_goes_on(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Two processes until step 6, then one: the losses are those of one process all the way."""
    recipe = recipe_file(tmp_path, tokenizer)
    plain = ["model.dropout=0", "micro_batch_size=0", "run.accelerator=cpu"]
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert run(recipe, whole, *plain) == 0
    assert run(recipe, changed, *plain, "run.devices=2", "run.save_total_limit=9") == 0
    for late in ("step-00000009", "step-00000012"):
        shutil.rmtree(changed / "checkpoints" / late)
    assert run(recipe, changed, *plain, "run.save_total_limit=9", "--resume") == 0
    ours, expected = ([[float(value or 0) for value in row] for row in losses(out)] for out in (changed, whole))
    assert len(ours) == len(expected) == 14
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_finished_run_that_goes_on_ends_the_same(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    recipe, out = recipe_file(tmp_path, tokenizer), tmp_path / "run"
    assert run(recipe, out, "run.save_every_n_steps=7") == 0
    before, rows = weights(out), losses(out)
    assert run(recipe, out, "run.save_every_n_steps=7", "--resume") == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(out).items())
    assert losses(out) == rows


def log_of(out: Path, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    with open(out / "log" / "metrics.csv", encoding="utf-8") as file:
        return [tuple(row.get(name, "") for name in names) for row in csv.DictReader(file)]


IMAGE = ["model.resolution=16", "model.channels=8", "model.multipliers=[1,2]", "model.res_blocks=1", "model.norm_groups=4"]
IMAGE += [
    "model.latent_channels=8",
    "model.codebook_size=16",
    "model.codebook_width=4",
    "global_batch_size=4",
    "run.progress=false",
]
IMAGE += ["loss.adversarial=0.5", "loss.adversarial_start=5", "loss.discriminator_channels=8", "ema_decay=0.9"]
IMAGE += ["loss.discriminator_layers=1", "run.precision=32-true", "run.accelerator=cpu", "run.log_every_n_steps=1"]


def image_run(out: Path, *more: str, step: int = -1, sign: int = 0) -> int:
    arguments = ["fit-image", "--config", "emoji-image", *IMAGE, "run.max_steps=10", "run.save_every_n_steps=2", *more]
    return command([*arguments, "sources=['emoji:pairs?concepts=20']", "validation=[]", f"run.out={out}"], step, sign)


def test_an_image_tokenizer_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Both optimisers, the moving average and the codebook, killed before and after the discriminator has begun."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert image_run(whole) == 0
    assert image_run(killed, step=5, sign=signal.SIGKILL) == -signal.SIGKILL
    assert image_run(killed, "--resume", step=8, sign=signal.SIGKILL) == -signal.SIGKILL
    assert image_run(killed, "--resume") == 0
    names = (
        "step",
        "train/loss",
        "train/discriminator",
        "train/adaptive_weight",
        "train/codebook_perplexity",
        "train/revived_codes",
    )
    assert log_of(killed, names) == log_of(whole, names) and len(log_of(whole, names)) == 10
    assert any(row[2] for row in log_of(whole, names))
    mine, expected = (SafetensorsFiles.from_folder(out, "image_tokenizer") for out in (killed, whole))
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_processes_that_share_pictures_log_what_one_does(tmp_path: Path) -> None:
    for devices in (1, 2):
        assert image_run(tmp_path / str(devices), f"run.devices={devices}", "optimizer.lr=0.0003") == 0
    names = ("train/loss", "train/psnr", "train/adaptive_weight", "train/codebook_perplexity", "train/grad_norm")
    one, two = (
        torch.tensor([[float(value or 0) for value in row] for row in log_of(tmp_path / devices, names)])
        for devices in "12"
    )
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
