"""Arithmetic of a model: bytes, operations and days of a size on a number of devices, and what a machine can do.

Nothing is estimated that can be counted: parameters, gradients and optimiser are counted on the model built without
memory, and activations by running the very code that trains on fake tensors and adding up what autograd keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig
from chameleon.model.loss import rows_at_once
from chameleon.model.recompute import Checkpointing, products_per_token
from chameleon.model.running import packs
from chameleon.model.transformer import Transformer, packed_mask
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig

# Precision as Lightning names it → dtype of parameters, gradients and moments; dtype of products.
PRECISIONS = {
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-true": (torch.float16, torch.float16),
    "32-true": (torch.float32, torch.float32),
}
# Bytes of memory, and dense operations a second of 16-bit products with 32-bit sums (vendors' data sheets).
DEVICES = {
    "rtx4090": (24e9, 165e12),
    "a100-40": (40e9, 312e12),
    "l40s": (48e9, 362e12),
    "a100": (80e9, 312e12),
    "h100": (80e9, 989e12),
    "h200": (141e9, 989e12),
    "b200": (180e9, 2250e12),
}
RESERVED = 2e9
"""Bytes of a device left to its runtime and to gaps between allocations: an allowance, not a measurement."""

Sharding = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class Setup:
    """How a model is trained, and run."""

    rows: int = 1
    """Rows of one forward and backward pass on one device; of one batch when it runs."""
    context: int = 4096
    """Ids a row."""
    precision: str = "bf16-mixed"
    optimizer: Literal["adamw", "muon"] = "adamw"
    sharding: Sharding = "none"
    """`fsdp`: parameters, gradients and optimiser split over the devices block by block (arXiv 2304.11277)."""
    checkpointing: Checkpointing = "none"
    """`full`: a block's activations are computed again in the backward pass; `selective`: all but products'."""
    devices: int = 1
    utilisation: float = 0.4
    """Share of the devices' peak that training reaches."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, tuple(PRECISIONS)),
            ("optimizer", self.optimizer, ("adamw", "muon")),
            ("sharding", self.sharding, ("none", "ddp", "fsdp")),
            ("checkpointing", self.checkpointing, ("none", "selective", "full")),
        ):
            if value not in known:
                raise BadInput(f"{name} {value!r} is not known", where="plan", remedy=f"one of {', '.join(known)}")
        if min(self.rows, self.context, self.devices) < 1:
            raise BadInput("rows, context and devices must be positive", where="plan")
        if not 0 < self.utilisation <= 1:
            raise BadInput(f"utilisation {self.utilisation} is not in (0, 1]", where="plan")
        if self.sharding == "none" and self.devices > 1:
            raise BadInput(f"{self.devices} devices and no sharding", where="plan", remedy="choose ddp or fsdp")


@dataclass(frozen=True)
class Bytes:
    """Memory of one device by what it is for."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class TrainingBytes(Bytes):
    """Memory of one device while training, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """The loss: logits of one chunk, the head's gradient and its copy in the dtype of the products."""
    communication: int
    """DDP's buckets; what FSDP has gathered at one time."""


@dataclass(frozen=True)
class RunningBytes(Bytes):
    """Memory of one device while generating in 16 bits, in bytes."""

    parameters: int
    kv_cache: int
    logits: int
    image_tokenizer: int
    """Its parameters in float32; its activations are not counted."""


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found."""

    config: ModelConfig
    setup: Setup
    training: TrainingBytes
    running: RunningBytes
    flops_per_token: float

    def tokens_per_second(self, device: str) -> float:
        """Over all devices, at the setup's utilisation. Raises `BadInput` for an unknown device."""
        return self.setup.devices * self.setup.utilisation * named_device(device)[1] / self.flops_per_token

    def days(self, device: str, tokens: float) -> float:
        """Days to train on that many tokens. Raises `BadInput` for an unknown device."""
        return tokens / self.tokens_per_second(device) / 86400

    def spare(self, device: str) -> float:
        """Bytes left on the device while training; negative: by how much it does not fit."""
        return named_device(device)[0] - RESERVED - self.training.total

    def to_json(self, tokens: float | None = None) -> dict[str, Any]:
        """Everything as plain values; with `tokens` to train on, the days that takes on each kind of device."""
        devices = {
            name: {"spare_bytes": self.spare(name), "tokens_per_second": self.tokens_per_second(name)} for name in DEVICES
        }
        for name, found in devices.items():
            if tokens is not None:
                found["days"] = self.days(name, tokens)
        return {
            "model": self.config.to_json(),
            "setup": asdict(self.setup),
            "parameters": self.config.parameters,
            "training_bytes": {**asdict(self.training), "total": self.training.total},
            "running_bytes": {**asdict(self.running), "total": self.running.total},
            "flops_per_token": self.flops_per_token,
            "devices": devices,
        }


def named_device(name: str) -> tuple[float, float]:
    """(bytes, operations a second) of a device in the table. Raises `BadInput` for another one."""
    if name not in DEVICES:
        raise BadInput(f"no device {name!r}", where="plan", remedy=f"one of {', '.join(DEVICES)}")
    return DEVICES[name]


def make_plan(config: ModelConfig, setup: Setup, image: VQGANConfig | None = None) -> Plan:
    """Memory and speed of a model under a setup. `image`: the image tokenizer, by default the released one.

    Raises `BadInput` where the context exceeds the model's.
    """
    if setup.context > config.context:
        raise BadInput(f"context {setup.context} exceeds the model's {config.context}", where="plan")
    with torch.device("meta"):
        model, tokenizer = Transformer(config), VQGAN(image or VQGANConfig())
    cache = 2 * config.layers * setup.rows * config.kv_heads * setup.context * config.head_width
    running = RunningBytes(
        parameters=2 * config.parameters,
        kv_cache=2 * cache,
        logits=4 * setup.rows * config.vocab_size,
        image_tokenizer=4 * sum(p.numel() for p in tokenizer.parameters()),
    )
    return Plan(config, setup, training_bytes(model, setup), running, flops_per_token(config, setup.context))


def training_bytes(model: Transformer, setup: Setup) -> TrainingBytes:
    """What one device holds at the end of a forward pass, loss and gradients included. The model may lie on `meta`."""
    config, (stored, products) = model.config, PRECISIONS[setup.precision]
    size, low = stored.itemsize, products.itemsize
    named = dict(model.named_parameters())
    count = sum(p.numel() for p in named.values())
    block = sum(p.numel() for p in model.blocks[0].parameters())
    # AdamW keeps two moments and a float32 count for each tensor; Muon one momentum for each matrix of a block.
    muon = {n for n, p in named.items() if setup.optimizer == "muon" and n.startswith("blocks.") and "_norm." not in n}
    moments = sum(p.numel() * (1 if name in muon else 2) for name, p in named.items())
    parameters, gradients, optimizer = count * size, count * size, moments * size + 4 * (len(named) - len(muon))
    communication = 0
    if setup.sharding == "fsdp":
        parameters, gradients, optimizer = (-(-part // setup.devices) for part in (parameters, gradients, optimizer))
        communication = (count - config.layers * block + 2 * block) * low  # the root's, and a block with the next one
    elif setup.sharding == "ddp":
        communication = gradients
    ids, head = setup.rows * setup.context, config.vocab_size * config.width
    logits = min(rows_at_once(config.vocab_size), ids) * config.vocab_size * (4 + low) + head * (
        4 + low + (low if low != size else 0)
    )
    logits += 2 * ids * config.width * low  # hidden states that count, and their gradient
    return TrainingBytes(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activation_bytes(config, setup),
        logits=logits,
        communication=communication,
    )


def activation_bytes(config: ModelConfig, setup: Setup) -> int:
    """Bytes that autograd keeps of one forward pass from ids to hidden states, parameters themselves left out.

    One and two blocks are run on fake tensors; every further block adds what the second one did. Copies of weights
    that mixed precision makes count here, since they live as long. The kernels are those of a CPU.
    """
    one, two = (traced_bytes(replace(config, layers=layers), setup) for layers in (1, 2))
    block, ends = two - one, 2 * one - two
    if setup.checkpointing == "none":
        return ends + config.layers * block
    ids, (stored, low) = setup.rows * setup.context, PRECISIONS[setup.precision]
    kept = ids * config.width * stored.itemsize
    if setup.checkpointing == "selective":
        kept += ids * products_per_token(config) * low.itemsize
    return ends + config.layers * kept + block


def traced_bytes(config: ModelConfig, setup: Setup) -> int:
    """`saved_bytes` of a pass over packed rows of the setup's shape, on fake tensors."""
    stored, products = PRECISIONS[setup.precision]
    before = torch.get_default_dtype()
    with FakeTensorMode():
        try:
            torch.set_default_dtype(stored)
            model = Transformer(config)
        finally:
            torch.set_default_dtype(before)
        ids = torch.zeros(setup.rows, setup.context, dtype=torch.int64)
        with torch.autocast("cpu", products, enabled=products != stored):
            return saved_bytes(lambda: model(ids, ids, packed_mask(ids)), list(model.parameters()))


def saved_bytes(run: Callable[[], Tensor], parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of the distinct storages that autograd saves during `run()`, those of the parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}  # storages stay alive, so that no address is met twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def flops_per_token(config: ModelConfig, context: int) -> float:
    """Floating-point operations of training for one token: 6 for each weight of a product, and attention's.

    The embedding is a look-up and counts nothing. Attention at full `context`, halved for causality
    (PaLM, arXiv 2204.02311, appendix B, halved).
    """
    kv = config.kv_heads * config.head_width
    block = config.width * (2 * config.width + 2 * kv) + 3 * config.width * config.ffn_width
    weights = config.layers * block + config.vocab_size * config.width
    return 6.0 * weights + 6.0 * config.layers * config.width * context


def matmul_peak(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> float:
    """Measured operations a second of a large square product: the best of a few tries."""
    device = torch.device(device)
    largest = 2048 if device.type == "cpu" else 8192  # large enough that starting it counts for nothing
    size, seconds = 256, 0.0
    while seconds < 0.01 and size < largest:  # where such products are slow, smaller ones do
        size *= 2
        seconds = product_seconds(size, device, dtype, tries=2)
    return 2.0 * size**3 / product_seconds(size, device, dtype, tries=6)


def product_seconds(size: int, device: torch.device, dtype: torch.dtype, tries: int) -> float:
    """The least time of a square product in some tries."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether products in bfloat16 are worth it: processors that oneDNN has no such kernels for (x86 without AVX-512)
    take a hundred times as long.
    """
    if torch.device(device).type != "cpu":
        return True
    return packs()
