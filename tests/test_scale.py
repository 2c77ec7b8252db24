"""One model on several processes, divided in whatever way, learns what it learns on one."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import recipe_file

from chameleon.cli import main
from chameleon.tensor_files import SafetensorsFiles
from chameleon.tokenizers.mixed import MixedTokenizer

SHAPE = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 32}
STEPS = 20
RUN = [f"run.max_steps={STEPS}", "run.save_every_n_steps=10", "run.log_every_n_steps=1", "run.accelerator=cpu"]
RUN += ["optimizer.max_grad_norm=0.3", "optimizer.lr=0.003"]
WAYS = {
    "two, ddp, accumulating": ["run.devices=2", "micro_batch_size=1"],
    "two, fsdp, accumulating": [
        "run.devices=2",
        "run.data_parallel=fsdp",
        "micro_batch_size=1",
        "activation_checkpointing=full",
    ],
    "two, tensor parallel": [
        "run.devices=2",
        "run.data_parallel=fsdp",
        "run.tensor_parallel_size=2",
        "activation_checkpointing=selective",
    ],
    "four, ddp": ["run.devices=4"],
    "four, fsdp": ["run.devices=4", "run.data_parallel=fsdp", "activation_checkpointing=selective"],
    "four, fsdp and tensor parallel": ["run.devices=4", "run.data_parallel=fsdp", "run.tensor_parallel_size=2"],
}
SEEN = ("train/loss", "train/text_loss", "train/image_loss", "train/log_z", "train/grad_norm", "train/output_norm")


def run(recipe: Path, out: Path, *more: str, code: int = 0) -> str:
    """Trains in processes of its own; what they said."""
    command = [sys.executable, "-m", "chameleon.cli", "pretrain", "--config", str(recipe), f"run.out={out}", *RUN, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stderr


def log(out: Path) -> torch.Tensor:
    with open(out / "log" / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return torch.tensor([[float(row[name]) for name in SEEN] for row in rows])


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory, tokenizer: MixedTokenizer) -> Path:
    """The folder of a recipe, which was run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    recipe_file(folder, tokenizer, model=SHAPE)
    run(folder / "recipe.yaml", folder / "run")
    return folder


USUAL_WAYS = ("two, ddp, accumulating", "four, fsdp and tensor parallel")
"""Those that `make test` compares from beginning to end; it resumes, and trains adapters, in two others."""


@pytest.mark.parametrize("way", [way if way in USUAL_WAYS else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_losses_are_those_of_one_process(way: str, lone: Path, tmp_path: Path) -> None:
    """And one process goes on from the checkpoint that they wrote on the way."""
    run(lone / "recipe.yaml", tmp_path, *WAYS[way])
    expected, actual = log(lone / "run"), log(tmp_path)
    assert expected.shape == (STEPS, len(SEEN)) and expected[0, 0] > expected[-1, 0] + 0.5
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    weights = [SafetensorsFiles.from_folder(out / "bundle") for out in (lone / "run", tmp_path)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name].float(), value.float(), atol=1e-3, rtol=1e-2, msg=name)
    with pytest.warns(UserWarning, match="changed since the checkpoint"):
        main(["pretrain", "--config", str(lone / "recipe.yaml"), f"run.out={tmp_path}", *RUN, "--resume"])
    torch.testing.assert_close(log(tmp_path), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "adapters", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("codebook rows", "image head", "muon"))]
)
def test_adapters_learn_in_a_split_model(adapters: str, lone: Path, tmp_path: Path) -> None:
    """What is added to the matrices is split with them, and folded into the same bundle as on one process."""
    start = [f"bundle={lone}/run/bundle", "tokenizers=null", "size=null", "model={}"]
    changes = {
        "codebook rows": ["codebook_rows=true"],
        "lora": [*start, "trainable=lora", "lora.rank=4"],
        "image head": [*start, "trainable=image_head"],
        "muon": ["optimizer.kind=muon"],
    }[adapters]
    run(lone / "recipe.yaml", tmp_path / "one", *changes)
    run(lone / "recipe.yaml", tmp_path / "two", *changes, *WAYS["two, tensor parallel"])
    expected = log(tmp_path / "one")
    tolerance = 1e-3 if adapters == "muon" else 1e-5  # it may orthogonalise in bfloat16
    torch.testing.assert_close(log(tmp_path / "two"), expected, atol=tolerance, rtol=tolerance)
    assert expected[0, 0] > expected[-1, 0] + 0.01
    weights = [SafetensorsFiles.from_folder(tmp_path / out / "bundle") for out in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name].float(), value.float(), atol=1e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize(
    "way", ["two, fsdp, accumulating", pytest.param("four, fsdp and tensor parallel", marks=pytest.mark.slow)]
)
def test_several_processes_go_on_from_one(way: str, lone: Path, tmp_path: Path) -> None:
    shutil.copytree(lone / "run" / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(lone / "run" / "log", tmp_path / "log")
    run(lone / "recipe.yaml", tmp_path, *WAYS[way], "--resume")
    torch.testing.assert_close(log(tmp_path), log(lone / "run"), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_two_nodes_of_two_processes(lone: Path, tmp_path: Path) -> None:
    """Two agents of torchrun, each with a host name of its own where the system allows it."""
    arguments = ["pretrain", "--config", str(lone / "recipe.yaml"), f"run.out={tmp_path}", *RUN, "run.devices=2"]
    arguments += ["run.num_nodes=2", "run.data_parallel=fsdp", "run.tensor_parallel_size=2", "--json"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    agent += ["--master-addr", "127.0.0.1", "--master-port", "29619"]
    can_rename = subprocess.run(["unshare", "-u", "hostname", "node"], capture_output=True).returncode == 0
    running = []
    for node in range(2):
        command = [*agent, "--node-rank", str(node), "-m", "chameleon.cli", *arguments]
        if can_rename:
            command = ["unshare", "-u", "sh", "-c", f'hostname node{node} && exec "$@"', "sh", *command]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    torch.testing.assert_close(log(tmp_path), log(lone / "run"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("started", [pytest.param("torchrun", marks=pytest.mark.slow), "slurm"])
def test_the_same_recipe_started_by_a_cluster(started: str, lone: Path, tmp_path: Path) -> None:
    """By torchrun, and as SLURM starts its tasks: two processes that know of each other by their environment."""
    arguments = ["pretrain", "--config", str(lone / "recipe.yaml"), f"run.out={tmp_path}", *RUN, "run.devices=2", "--json"]
    if started == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
        commands = [([*start, "-m", "chameleon.cli", *arguments], {})]
    else:
        job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}
        job |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1"}
        job |= {"MASTER_PORT": "29618"}
        commands = [
            ([sys.executable, "-m", "chameleon.cli", *arguments], {**job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
            for rank in "01"
        ]
    running = [
        subprocess.Popen(command, env={**os.environ, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, more in commands
    ]
    printed = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), printed
    assert sum(len(out.splitlines()) for out, _ in printed) == 1  # one of the processes speaks
    torch.testing.assert_close(log(tmp_path), log(lone / "run"), atol=1e-5, rtol=1e-5)
