"""Probes of the hardware: whether a device can be used, what it computes fast, and how much memory is free."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import psutil
import torch

from chameleon.errors import BadInput

CGROUP_ROOT = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60
"""Version 1 of cgroups writes a number near 2**63 where there is no limit."""


def check_device(device: str) -> None:
    """Raise `BadInput` where tensors cannot be placed on a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"cannot be used ({str(error).splitlines()[0]})", where=f"device {device}") from None


def processor_name() -> str:
    """Return the name of the processor and the instructions that PyTorch uses."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def supports_packed_bfloat16() -> bool:
    """Return whether this processor's oneDNN has kernels for packed bfloat16 weights (on x86: AVX-512 or newer)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_fbgemm() -> bool:
    """Return whether PyTorch was built with FBGEMM and this processor runs it (x86 with AVX2)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def is_apple_gpu(device: torch.device | str) -> bool:
    """Return whether a device is Apple's, for which PyTorch has no float64 and only some kernels in bfloat16."""
    return torch.device(device).type == "mps"


def fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Return whether matrix products in bfloat16 are fast.

    Processors for which oneDNN has no bfloat16 kernels (x86 without AVX-512) take about a hundred times as long as in
    float32.
    """
    return torch.device(device).type != "cpu" or supports_packed_bfloat16()


def matmul_peak(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure the floating-point operations a second of a large square matrix product: the best of several tries."""
    device = torch.device(device)
    max_size = 2048 if device.type == "cpu" else 8192  # large enough that launch overhead does not count
    size, seconds = 256, 0.0
    while seconds < 0.01 and size < max_size:  # smaller products will do where they are slow
        size *= 2
        seconds = matmul_seconds(size, device, dtype, tries=2)
    return 2.0 * size**3 / matmul_seconds(size, device, dtype, tries=6)


def matmul_seconds(size: int, device: torch.device, dtype: torch.dtype, tries: int) -> float:
    """Return the shortest time of a square matrix product over `tries` tries."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


# --- memory ----------------------------------------------------------------------------------------------------------


def cgroup_memory(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> tuple[int, int] | None:
    """Return (limit, usage) in bytes of the tightest cgroup that this process is in, or None where there is no limit.

    A container sees the host's memory in /proc/meminfo; its own limit stands in the cgroup file system (version 2:
    memory.max and memory.current; version 1: memory.limit_in_bytes and memory.usage_in_bytes). Every ancestor's limit
    counts too. Page cache that the kernel can drop (`inactive_file`) does not count as used.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    tightest: tuple[int, int] | None = None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / path.lstrip("/")
        for ancestor in (folder, *folder.parents):
            if ancestor != base and base not in ancestor.parents:
                break
            limit, usage = (read_bytes_count(ancestor / name) for name in names)
            if limit is None or usage is None or limit >= NO_LIMIT:
                continue
            usage -= min(usage, reclaimable_cache(ancestor / "memory.stat"))
            if tightest is None or limit - usage < tightest[0] - tightest[1]:
                tightest = (limit, usage)
    return tightest


def read_bytes_count(path: Path) -> int | None:
    """Return the number in a cgroup file; None where the file is missing or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def reclaimable_cache(path: Path) -> int:
    """Return the bytes of page cache that the kernel can drop, from a cgroup's memory.stat."""
    try:
        counts = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def total_memory(device: torch.device | str = "cpu") -> int:
    """Return the bytes of memory of a GPU, or that this process may use on the host, cgroup limits included."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = cgroup_memory()
    total = int(psutil.virtual_memory().total)
    return total if limits is None else min(total, limits[0])


def free_memory(device: torch.device | str = "cpu") -> int:
    """Return the bytes of memory that can still be allocated on a device, cgroup limits included."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    available = int(psutil.virtual_memory().available)
    limits = cgroup_memory()
    return available if limits is None else min(available, max(0, limits[0] - limits[1]))
