"""What grows with the number of processes, and what does not: bytes read at start and at resuming, collectives of a step,
the time that a step waits for a checkpoint, faults survived, and the memory of training an image tokenizer by the number
of pictures. Everything runs on CPUs.

    python benchmarks/ranks.py start|steps|checkpoint|faults|pictures|memory [--kills 100] [--pictures 10000 1000000]
"""

from __future__ import annotations

import argparse
import bisect
import collections
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import distributed

from chameleon.cli import main as run_command
from chameleon.model.config import named_size
from chameleon.plan import TrainingSetup, plan_training
from chameleon.tensor_files import SafetensorsFiles
from chameleon.train.checkpoint import CheckpointCallback
from chameleon.train.language_module import LanguageModule
from chameleon.train.step_module import StepModule

MIB = 1 << 20
TOKENIZERS = Path(__file__).parents[1] / "chameleon" / "bundles" / "emoji"
SMALL = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 4, "ffn_width": 128}
LARGE = {"layers": 12, "width": 640, "heads": 10, "kv_heads": 10, "ffn_width": 1728}
WAYS = {
    "ddp": ["run.data_parallel=ddp"],
    "fsdp": ["run.data_parallel=fsdp"],
    "fsdp, tensor parallel 2": ["run.data_parallel=fsdp", "run.tensor_parallel_size=2"],
}


# --- inside the processes of a run -----------------------------------------------------------------------------------


def bytes_read() -> int:
    """Bytes that this process has asked files and sockets for by `read`."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def resident(kind: str) -> float:
    """The resident set of this process in MiB: VmRSS now, VmHWM the largest until now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) / 1024


def number_of_collectives() -> int:
    """Collectives of this process until now, by the process groups' own count."""
    if not distributed.is_initialized():
        return 0
    groups = distributed.distributed_c10d._world.pg_map
    return sum(group._get_sequence_number_for_group() for group in groups)


def measured_run(out: Path, arguments: list[str]) -> None:
    """Run the command in this process, and write what it did to a file."""
    seen: dict[str, list[Any]] = collections.defaultdict(list)
    seen["mapped"] = [0]
    configure, full_model = LanguageModule.configure_model, LanguageModule.full_model
    box, step, save, start = (
        SafetensorsFiles.box,
        LanguageModule.training_step,
        CheckpointCallback.save,
        StepModule.on_train_batch_start,
    )

    def counted_box(files: SafetensorsFiles, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        value = box(files, name, slices)
        seen["mapped"][0] += value.nbytes  # read through a memory map
        return value

    def counted_step(module: LanguageModule, batch: Any, index: int) -> None:
        before, started = number_of_collectives(), time.perf_counter()
        step(module, batch, index)
        seen["steps"].append((module.is_logged_step, number_of_collectives() - before, time.perf_counter() - started))

    def timed_save(callback: CheckpointCallback, trainer: Any, module: StepModule, number: int) -> None:
        began = time.perf_counter()
        save(callback, trainer, module, number)
        is_synchronous = len(seen["saves"]) % 2 == 1
        if is_synchronous:
            assert callback.writer is not None
            callback.writer.wait()
        seen["saves"].append((is_synchronous, time.perf_counter() - began))

    def first_batch(module: StepModule, batch: Any, index: int) -> None:
        if "read" not in seen:
            seen["read"] = [bytes_read() - before_all]
        start(module, batch, index)

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def noted_model(module: LanguageModule) -> None:
        if os.environ.get("ALLOCATED"):
            profiler.start()
        configure(module)

    def noted_end(module: LanguageModule) -> Any:
        if os.environ.get("ALLOCATED"):
            profiler.stop()
            trace = out / f"trace-{os.environ.get('LOCAL_RANK', '0')}.json"
            profiler.export_chrome_trace(str(trace))
            seen["allocated"] = [most_allocated(json.loads(trace.read_text())["traceEvents"]) / MIB]
            trace.unlink()
        return full_model(module)

    reduce_scatter = distributed.reduce_scatter_tensor

    def waited_reduce_scatter(*arguments: Any, **options: Any) -> Any:
        work = reduce_scatter(*arguments, **options)
        if work is not None and os.environ.get("ALLOCATED"):
            work.wait()  # as on a GPU, where the next one waits for it; gloo would hold the gradients of all blocks
        return work

    distributed.reduce_scatter_tensor = waited_reduce_scatter
    LanguageModule.configure_model, LanguageModule.full_model = noted_model, noted_end  # type: ignore[method-assign]
    SafetensorsFiles.box, LanguageModule.training_step = counted_box, counted_step  # type: ignore[method-assign, assignment]
    CheckpointCallback.save, StepModule.on_train_batch_start = timed_save, first_batch  # type: ignore[method-assign]
    before_all = bytes_read()
    try:
        run_command(arguments)
    finally:
        seen["resident"] = [resident("VmHWM")]
        (out / f"seen-{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(seen))


def most_allocated(entries: list[dict[str, Any]]) -> int:
    """Return the most bytes that were allocated at one time, by the events of a profile.

    The profiler does not see what gloo's threads free, so its own total grows by it. Here a block also ends where a later
    one overlaps it.
    """
    events = sorted((entry for entry in entries if entry.get("name") == "[memory]"), key=lambda entry: entry["ts"])
    addresses: list[int] = []  # of blocks, ascending
    sizes: dict[int, int] = {}
    total = most = 0
    for event in events:
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        first = bisect.bisect_left(addresses, address)
        last = bisect.bisect_left(addresses, address + max(size, 1))
        if first and addresses[first - 1] + sizes[addresses[first - 1]] > address:
            first -= 1
        total -= sum(sizes.pop(ended) for ended in addresses[first:last])
        addresses[first:last] = [address] if size > 0 else []
        if size > 0:
            sizes[address], total = size, total + size
        most = max(most, total)
    return most


# --- outside ---------------------------------------------------------------------------------------------------------


def command(out: Path, arguments: list[str]) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    return [sys.executable, __file__, "run", str(out), *arguments]


def run(out: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """Run a command in processes of its own; what each of them did, by rank."""
    done = subprocess.run(command(out, arguments), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [json.loads(path.read_text()) for path in sorted(out.glob("seen-*.json"))]


def pretraining(folder: Path, out: Path, shape: dict[str, int], *more: str) -> list[str]:
    (folder / "recipe.yaml").write_text(f"mixture: [{{shards: {folder}/shards}}]\n")
    model = json.dumps(shape).replace('"', "")
    settings = [f"tokenizers={TOKENIZERS}", "size=tiny", f"model={model}"]
    settings += ["run.accelerator=cpu", "run.precision=32-true", "run.progress=false", "num_samples=0", "monitors=false"]
    settings += ["optimizer.warmup_steps=0", "context_length=128", "global_batch_size=8", f"run.out={out}", *more]
    return ["pretrain", "--config", str(folder / "recipe.yaml"), *settings]


def make_shards(folder: Path) -> None:
    if not (folder / "shards").exists():
        sources = [f"emoji:pairs?split=validation&per_concept=1&seed={seed}" for seed in range(8)]
        arguments = ["tokenize", *sources, "--tokenizers", str(TOKENIZERS), "--out", str(folder / "shards")]
        subprocess.run([sys.executable, "-m", "chameleon.cli", *arguments], check=True, capture_output=True)


def start(folder: Path, options: argparse.Namespace) -> None:
    """Bytes that a process reads at most, until its first step: of a bundle, and of a checkpoint that is resumed from."""
    make_shards(folder)
    base = folder / "base"
    few = ["run.max_steps=2", "run.save_every_n_steps=1", "run.log_every_n_steps=1"]
    run(base, pretraining(folder, base, LARGE, *few))
    bundle = base / "bundle"
    for processes in (1, 4, 8):
        out = folder / f"start-{processes}"
        way = [f"run.devices={processes}", "run.data_parallel=fsdp", *few]
        from_bundle = [f"bundle={bundle}", "tokenizers=null", "size=null", "model={}"]
        first = run(out, pretraining(folder, out, {}, *from_bundle, *way))
        again = run(out, [*pretraining(folder, out, {}, *from_bundle, *way), "--resume"])
        files = list((out / "checkpoints" / "step-00000001").glob("*.safetensors"))
        sizes = [(bundle / "model.safetensors").stat().st_size, sum(file.stat().st_size for file in files)]
        # Resuming reads no bundle beyond what the start's own weights are replaced by.
        for name, seen, size in (("bundle", first, sizes[0]), ("checkpoint", again, sum(sizes))):
            most = max(one["read"][0] + one["mapped"][0] for one in seen)
            limit = 1.2 * size / processes + 64 * MIB
            print(
                f"{processes} processes, {name}: at most {most / MIB:.0f} MiB a process of {size / MIB:.0f} MiB "
                f"(1.2 parts + 64 MiB: {limit / MIB:.0f} MiB)",
                flush=True,
            )
        shutil.rmtree(out)


def steps(folder: Path, options: argparse.Namespace) -> None:
    """Collectives of a step that is not logged, and of one that is."""
    make_shards(folder)
    for name, way in WAYS.items():
        out = folder / "steps"
        seen = run(out, pretraining(folder, out, SMALL, *way, "run.devices=4", "run.max_steps=25", "monitors=true"))
        usual = {count for is_logged, count, _ in seen[0]["steps"][2:] if not is_logged}
        logged = {count for is_logged, count, _ in seen[0]["steps"][2:] if is_logged}
        print(f"4 processes, {name}: {usual} collectives a step, {logged} where it is logged", flush=True)
        shutil.rmtree(out)


def checkpoint(folder: Path, options: argparse.Namespace) -> None:
    """Seconds that a step waits for a checkpoint that is written in the background, and for one that is waited for."""
    make_shards(folder)
    for processes in (1, 4):
        out = folder / "checkpoint"
        settings = ["run.max_steps=16", "run.save_every_n_steps=2", f"run.devices={processes}", "run.log_every_n_steps=50"]
        settings += ["global_batch_size=4"]  # whatever the number of processes, so that they all have the same work
        way = ["run.data_parallel=fsdp"] if processes > 1 else []
        shape = {**LARGE, "context_length": 512}
        seen = run(out, pretraining(folder, out, shape, *settings, *way, "context_length=512"))
        saves = seen[0]["saves"][2:]  # the first one makes the copies' memory
        waits = [
            statistics.median(seconds for kind, seconds in saves if kind is synchronous) for synchronous in (False, True)
        ]
        size = sum(file.stat().st_size for file in next((out / "checkpoints").iterdir()).iterdir()) / MIB
        step = statistics.median(seconds for _, _, seconds in seen[0]["steps"])
        print(
            f"{processes} processes, {size:.0f} MiB: {waits[0]:.3f} s in the background, {waits[1]:.3f} s waited for, "
            f"{waits[0] / waits[1]:.1%}; a step takes {step:.2f} s",
            flush=True,
        )
        shutil.rmtree(out)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return dict(SafetensorsFiles.from_folder(out / "bundle").items())


def faults(folder: Path, options: argparse.Namespace) -> None:
    """Kill runs at random moments, by SIGKILL, all processes or one of them, and resume each; compare the weights."""
    make_shards(folder)
    rng = random.Random(0)
    for processes in (1, 4):
        settings = ["run.max_steps=400", "run.save_every_n_steps=3", f"run.devices={processes}", "run.log_every_n_steps=5"]
        settings += ["model.dropout=0.1", *(["run.data_parallel=fsdp"] if processes > 1 else [])]
        whole = folder / f"whole-{processes}"
        run(whole, pretraining(folder, whole, SMALL, *settings))
        expected = weights_of(whole)
        kills = unlike = rounds = 0
        at_saving = 0
        while kills < options.kills // 2:
            killed, rounds = folder / f"killed-{processes}", rounds + 1
            shutil.rmtree(killed, ignore_errors=True)
            arguments = [*pretraining(folder, killed, SMALL, *settings)]
            while True:
                process = subprocess.Popen(
                    command(killed, arguments), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                if wait_for_step(process, killed) and kills < options.kills // 2:
                    time.sleep(rng.uniform(0, 2.0))
                    if process.poll() is None:
                        partials = list(killed.glob("checkpoints/.step-*.partial-*"))
                        at_saving += bool(partials)
                        kill(process, only_one=processes > 1 and rng.random() < 0.5, rng=rng)
                        kills += 1
                        arguments = [*pretraining(folder, killed, SMALL, *settings), "--resume"]
                        continue
                if process.wait() == 0:
                    break
                raise SystemExit(f"a run failed that was not killed: {killed}")
            actual = weights_of(killed)
            unlike += not all(torch.equal(value, actual[name]) for name, value in expected.items())
        print(
            f"{processes} processes: {kills} kills ({at_saving} while a checkpoint was being written), {rounds} runs "
            f"completed, {unlike} of them with other bits",
            flush=True,
        )


def wait_for_step(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Wait until a run writes its log; return whether it still runs."""
    began, log = time.time(), out / "log" / "metrics.csv"
    while process.poll() is None:
        if log.is_file() and log.stat().st_mtime > began:
            return True
        time.sleep(0.02)
    return False


def kill(process: subprocess.Popen[bytes], *, only_one: bool, rng: random.Random) -> None:
    """Kill all processes of a run, or one, after which the others must end by themselves."""
    group = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
    if only_one:
        os.kill(int(rng.choice(group)), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
            if time.monotonic() > deadline:
                raise SystemExit("other processes still run a minute after one was killed")
            process.poll()
            time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pictures(folder: Path, options: argparse.Namespace) -> None:
    """The largest resident set of `fit-image` by the number of pictures: archives of 10,000, named over and over."""
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "0.tar", "w") as archive:
        for number in range(10_000):
            data = io.BytesIO()
            PILImage.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(data, "jpeg")
            member = tarfile.TarInfo(f"{number:05}.jpg")
            member.size = len(data.getvalue())
            archive.addfile(member, io.BytesIO(data.getvalue()))
    for count in options.pictures:
        names = folder / f"pictures-{count}"
        names.mkdir()
        for number in range(count // 10_000):
            (names / f"{number}.tar").symlink_to(folder / "0.tar")
        out = folder / f"run-{count}"
        model = "{resolution: 32, channels: 8, multipliers: [1, 2], res_blocks: 1, latent_channels: 8, codebook_size: 32,"
        model += " codebook_width: 8, norm_groups: 4, attention_resolutions: []}"
        settings = [f"sources=[{names}/*.tar]", "validation=[]", f"model={model}", f"run.out={out}", "run.max_steps=20"]
        settings += ["run.accelerator=cpu", "run.precision=32-true", "run.progress=false", "num_workers=2"]
        for what in ("the index made", "the index there"):
            began = time.perf_counter()
            (seen,) = run(out, ["fit-image", "--config", "emoji-image", *settings])
            index = sum(path.stat().st_size for path in (out / "pictures").rglob("*") if path.is_file()) / MIB
            print(
                f"{count:,} pictures, {what}: {seen['resident'][0]:.0f} MiB resident, index of {index:.1f} MiB, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )


def memory(folder: Path, options: argparse.Namespace) -> None:
    """The most that PyTorch's allocator had given out while training, by its own count, beside what `plan` says."""
    make_shards(folder)
    os.environ["ALLOCATED"] = "1"
    vocab_size = json.loads((TOKENIZERS / "config.json").read_text())["model"]["vocab_size"]
    for shape, length, micro in (
        ({"layers": 8, "width": 512, "heads": 8, "kv_heads": 8, "ffn_width": 1408}, 512, 4),
        ({"layers": 4, "width": 1024, "heads": 16, "kv_heads": 4, "ffn_width": 2816}, 256, 4),
        ({"layers": 24, "width": 256, "heads": 4, "kv_heads": 4, "ffn_width": 704}, 1024, 2),
    ):
        config = named_size("tiny", **shape, vocab_size=vocab_size, context_length=length)
        for name, processes, way in (
            ("one process", 1, []),
            ("two, fsdp", 2, ["run.data_parallel=fsdp"]),
            ("two, tensor parallel", 2, ["run.data_parallel=fsdp", "run.tensor_parallel_size=2"]),
        ):
            tensor_parallel_size = 2 if "tensor" in name else 1
            setup = TrainingSetup(
                micro_batch_size=micro,
                context_length=length,
                precision="32-true",
                data_parallel="fsdp" if way else "none",
                devices=processes,
                tensor_parallel_size=tensor_parallel_size,
                micro_batches=2,
                device_type="cpu",
            )
            planned = plan_training(config, setup).training.total / MIB
            out = folder / "memory"
            rows = 2 * micro * processes // tensor_parallel_size
            settings = ["run.max_steps=3", f"run.devices={processes}", "attention=dense", f"context_length={length}"]
            settings += [f"global_batch_size={rows}", f"micro_batch_size={micro}"]
            seen = run(out, pretraining(folder, out, {**shape, "context_length": length}, *settings, *way))
            actual = max(one["allocated"][0] for one in seen)
            training = vars(plan_training(config, setup).training)
            parts = ", ".join(f"{key} {size / MIB:.0f}" for key, size in training.items())
            print(
                f"{shape['layers']} × {shape['width']}, {micro} rows of {length}, {name}: {actual:.0f} MiB, planned "
                f"{planned:.0f} ({planned / actual - 1:+.0%}; {parts})",
                flush=True,
            )
            shutil.rmtree(out)


MEASUREMENTS = {f.__name__: f for f in (start, steps, checkpoint, faults, pictures, memory)}

if __name__ == "__main__":
    if sys.argv[1] == "run":
        measured_run(Path(sys.argv[2]), sys.argv[3:])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("what", choices=MEASUREMENTS)
        parser.add_argument("--kills", type=int, default=100)
        parser.add_argument("--pictures", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
        parsed = parser.parse_args()
        with tempfile.TemporaryDirectory() as temporary:
            MEASUREMENTS[parsed.what](Path(temporary), parsed)
