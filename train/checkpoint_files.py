"""The files of a checkpoint: written in the background, read by each process where its own part lies, verified as they are.

PyTorch's distributed checkpointing plans who writes and who reads what, and writes. Its reader opens the files of all
processes on each of them; the one here reads a process's own file once, for checksum and tensors alike, and of others only
the rows that it needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.futures import Future

from chameleon.errors import BadInput
from chameleon.files import sha256_of, write_json
from chameleon.tensor_files import TORCH_DTYPES
from chameleon.train.muon import Muon
from chameleon.train.processes import gather, is_single_process, num_processes, process_rank, run_on_all_processes
from chameleon.train.sharded_tensors import local_part
from chameleon.train.step_module import StepModule

DESCRIPTION_FILE = "checkpoint.json"
READ_BYTES = 1 << 24
SECONDS_AFTER_FAILURE = 20.0
"""How long a run that fails waits for a checkpoint that is being written."""
OPTIMIZER_STATE_KEYS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}
"""Keys of an optimiser's state of each parameter."""


def tensors_to_save(module: StepModule, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint: `module.NAME`, `optimizer.PARAMETER.KEY`, `extra.NAME`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    tensors = {f"module.{name}": value.detach() for name, value in module.checkpointed_tensors().items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors | {f"extra.{name}": value for name, value in module.extra_state().items()}


# --- writing ---------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes one checkpoint at a time in the background, from a copy of the tensors in the host's memory."""

    def __init__(self, group: Any, device: torch.device) -> None:
        """group: all processes, with a backend for CPUs, used by nothing else. device: where the tensors are."""
        self.group, self.device = group, device
        self.stager = DefaultStager(StagingOptions(device.type == "cuda", False, False, False))
        self.thread: threading.Thread | None = None
        self.error: BadInput | None = None

    @property
    def failed(self) -> bool:
        """Whether the latest checkpoint could not be written, on any process."""
        return self.error is not None

    def start(
        self, target: Path, tensors: dict[str, Tensor], description: dict[str, Any], on_done: Callable[[], None]
    ) -> None:
        """Copy the tensors, and write them to the folder `target` while training goes on.

        A collective operation. on_done: called on the first process once the folder is complete. Waits for the checkpoint
        before this one; raises `BadInput` where that failed.
        """
        self.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            staged = self.stager.stage(tensors)

        def write() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # a new thread begins with the first one
                self.write(target, staged, description, on_done)
            except BadInput as error:
                self.error = error
            except Exception as error:  # the main thread reports it
                self.error = BadInput(f"could not be written ({error})", where=target.parent)

        # A daemon: where other processes have died it would wait for them, and this process must be able to end.
        self.thread = threading.Thread(target=write, daemon=True, name="checkpoint writer")
        self.thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint in progress is complete. Raise `BadInput` where one failed since the last call."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait_a_moment(self) -> None:
        """Let the checkpoint in progress be completed, unless that takes long: other processes may have died."""
        if self.thread is not None:
            self.thread.join(SECONDS_AFTER_FAILURE)

    def write(self, target: Path, tensors: Any, description: dict[str, Any], on_done: Callable[[], None]) -> None:
        """Write all files to a partial folder, which becomes `target` when all processes are done.

        Raises `BadInput` where the disk is full; earlier checkpoints stay.
        """
        partial = target.with_name(f".{target.name}.partial-all")
        is_first = process_rank() == 0
        own_files = f"shard-{process_rank() + 1:05}-*.safetensors"

        def create_folder() -> None:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def write_part() -> dict[str, str]:
            save_tensors(partial, tensors, self.group)
            return {path.name: sha256_of(path) for path in partial.glob(own_files)}

        def complete() -> None:
            if is_first:
                checksums = {name: checksum for part in parts for name, checksum in part.items()}
                write_json(partial / DESCRIPTION_FILE, description | {"sha256": checksums})
                flush_to_disk(partial / DESCRIPTION_FILE, partial)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                flush_to_disk(target.parent)  # before earlier ones are removed
                on_done()

        try:
            run_on_all_processes(create_folder, self.group)
            run_on_all_processes(lambda: check_disk_space(target.parent, tensors), self.group)  # before any process writes
            parts = gather(run_on_all_processes(write_part, self.group), self.group)
            run_on_all_processes(complete, self.group)
        except BadInput as error:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise BadInput(
                error.reason, where=target.parent, remedy="free some space; earlier checkpoints are kept"
            ) from None


def flush_to_disk(*paths: Path) -> None:
    """Wait until files, and the names in folders, are on the disk, as PyTorch does for the tensors."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_tensors(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Write this process's part of the tensors to a folder that all processes share."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of running in a single process
            save(tensors, storage_writer=writer, process_group=group, no_dist=is_single_process())
    except CheckpointException as error:  # not a subclass of Exception
        reasons = [failure[0] for failure in error.failures.values()]  # each with its traceback
        raise BadInput(f"could not be written ({'; '.join(map(str, reasons)) or error})", where=folder) from None


def check_disk_space(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise `BadInput` where this process's part does not fit on the disk."""
    parts = [local_part(value) for value in tensors.values()]
    needed, free = sum(part.numel() * part.element_size() for part in parts), shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(f"a checkpoint takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", where=folder)


# --- reading ---------------------------------------------------------------------------------------------------------


class StoredPart(NamedTuple):
    """A tensor in a file: the part of a tensor of the checkpoint, or all of it."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    """Where the part begins in the whole tensor."""
    start: int
    """Byte of the file at which it begins."""

    def bytes_of_rows(self, first: int, count: int) -> tuple[int, int]:
        """Return (start, end) in the file of some rows of the part."""
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        return self.start + first * row_bytes, self.start + (first + count) * row_bytes


class CheckpointReader(FileSystemReader):
    """Reads a checkpoint on all processes together, each the files of its own share whole, and of others what it needs.

    The processes of a run that goes on as it was divided have each its own file as its share, which holds all its tensors.
    """

    def __init__(self, folder: Path, sha256: dict[str, str], group: Any) -> None:
        """sha256: file name → its checksum."""
        super().__init__(folder)
        self.folder, self.sha256, self.group = folder, sha256, group
        self.files = sorted(sha256)
        self.contents: dict[str, bytearray] = {}
        """File name → its bytes, of this process's share."""
        self.parts: dict[MetadataIndex, StoredPart] = {}
        self.metadata: Metadata | None = None

    def read_share(self) -> None:
        """Read and verify this process's files. Raise `BadInput` where one is damaged."""
        for file in self.files[process_rank() :: num_processes()]:
            path, digest = self.folder / file, hashlib.sha256()
            try:
                content = read_bytes(path, 0, path.stat().st_size, digest.update)
            except OSError as error:
                raise BadInput(f"incomplete ({error})", where=self.folder) from None
            if digest.hexdigest() != self.sha256[file]:
                raise BadInput("checksum does not match", where=path)
            self.contents[file] = content

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what the checkpoint contains; each process reads the headers of its share. A collective operation."""
        if self.metadata is not None:
            return self.metadata
        own = [part for file, content in self.contents.items() for part in stored_parts(self.folder / file, content)]
        tensors: dict[str, TensorStorageMetadata] = {}
        for part in (part for parts in gather(own, self.group) for part in parts):
            chunk = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.shape))
            tensor = tensors.setdefault(
                part.name,
                TensorStorageMetadata(TensorProperties(dtype=part.dtype), torch.Size([0] * len(part.shape)), []),
            )
            tensor.chunks.append(chunk)
            ends = [offset + size for offset, size in zip(part.offsets, part.shape, strict=True)]
            tensor.size = torch.Size(map(max, tensor.size, ends))
            self.parts[MetadataIndex(part.name, chunk.offsets)] = part
        self.metadata = Metadata(tensors)  # type: ignore[arg-type]
        return self.metadata

    def owners(self) -> dict[str, int]:
        """Return name of a tensor → the process whose share has it, of tensors that one file holds whole."""
        process_of_file = {file: index % num_processes() for index, file in enumerate(self.files)}
        return {part.name: process_of_file[part.file] for part in self.parts.values()}

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing is left to do; the metadata is the reader's own."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what a plan asks for to its targets."""
        for item in plan.items:
            part = self.parts[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
            target = planner.resolve_tensor(item).detach()
            target.copy_(self.read_slice(part, tuple(item.storage_offsets), tuple(item.lengths)).view(target.shape))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_slice(self, part: StoredPart, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
        """Return a box of a part, from memory or from its rows on the disk."""
        first, count = (offsets[0], lengths[0]) if offsets else (0, 1)
        start, end = part.bytes_of_rows(first, count)
        if start == end:
            return torch.empty(lengths, dtype=part.dtype)
        if part.file in self.contents:
            data = memoryview(self.contents[part.file])[start:end]
        else:
            data = memoryview(read_bytes(self.folder / part.file, start, end - start))
        rows = torch.frombuffer(data, dtype=part.dtype).view(count, *part.shape[1:])
        for dim in range(1, len(offsets)):
            rows = rows.narrow(dim, offsets[dim], lengths[dim])
        return rows


def read_bytes(path: Path, start: int, count: int, on_block: Callable[[memoryview], None] | None = None) -> bytearray:
    """Return `count` bytes of a file from `start` on, fewer where it ends before. on_block: called with each block read."""
    content = bytearray(count)
    view, position = memoryview(content), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while num_read := file.readinto(view[position : position + READ_BYTES]):
            if on_block is not None:
                on_block(view[position : position + num_read])
            position += num_read
    return content


def stored_parts(path: Path, content: bytearray) -> list[StoredPart]:
    """Return the tensors of a file of PyTorch's distributed writer, from its header."""
    data_start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data_start])
    sharding = json.loads(header.pop("__metadata__", {}).get(CUSTOM_METADATA_KEY, "{}"))
    parts = []
    for name, entry in header.items():
        shape = tuple(entry["shape"])
        offsets = tuple(sharding[name][SAVED_OFFSETS_KEY]) if name in sharding else (0,) * len(shape)
        start = data_start + entry["data_offsets"][0]
        parts.append(StoredPart(name, path.name, TORCH_DTYPES[entry["dtype"]], shape, offsets, start))
    return parts


def restore(reader: CheckpointReader, module: StepModule, optimizers: list[torch.optim.Optimizer]) -> None:
    """Restore module and optimisers, each process its part. Raise `BadInput` for other shapes. A collective operation.

    Tensors that are the same on every process are read by one, which sends them to the others.
    """
    folder, stored = reader.folder, reader.read_metadata().state_dict_metadata
    targets: dict[str, Tensor] = {f"module.{name}": v.detach() for name, v in module.checkpointed_tensors().items()}
    for name, target in targets.items():
        if name not in stored or stored[name].size != target.shape:  # type: ignore[union-attr]
            stored_shape = list(stored[name].size) if name in stored else "missing"  # type: ignore[union-attr]
            raise BadInput(f"{name} is {stored_shape} in the checkpoint, {list(target.shape)} here", where=folder)
    for optimizer in optimizers:
        optimizer.state.clear()  # frees as much memory as is read next
    parameters = dict(module.named_parameters())
    parameter_of = {}
    for name, metadata in stored.items():
        if name in targets:
            continue
        parameter_name = name.removeprefix("optimizer.").rpartition(".")[0]
        parameter = parameters.get(parameter_name) if name.startswith("optimizer.") else None
        size, dtype = metadata.size, metadata.properties.dtype  # type: ignore[union-attr]
        if parameter is not None and size == parameter.shape:
            targets[name] = torch.zeros_like(parameter, dtype=dtype)
        else:
            targets[name] = torch.zeros(size, dtype=dtype)
        if parameter is not None:
            parameter_of[name] = parameter
    read_tensors(reader, targets)
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in parameter_of.items():
        states.setdefault(parameter, {})[name.rpartition(".")[2]] = targets[name]
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            state = states.get(parameter, {})
            if set(state) == OPTIMIZER_STATE_KEYS[type(optimizer)]:
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
            elif state:
                warnings.warn(f"{folder} is of another optimizer, whose state is dropped", stacklevel=2)
    module.load_extra_state({n.removeprefix("extra."): v for n, v in targets.items() if n.startswith("extra.")})


def read_tensors(reader: CheckpointReader, targets: dict[str, Tensor]) -> None:
    """Fill targets, which may be sharded, from a checkpoint. A collective operation."""
    replicated = {} if is_single_process() else {n: t for n, t in targets.items() if not isinstance(t, DTensor)}
    owners = reader.owners()
    own = {n: target for n, target in targets.items() if n not in replicated or owners[n] == process_rank()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(own, storage_reader=reader, process_group=reader.group, no_dist=is_single_process())
    for name, target in replicated.items():
        group = reader.group if target.device.type == "cpu" else None
        distributed.broadcast(target, src=owners[name], group=group)
