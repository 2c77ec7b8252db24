"""Planning: memory, operations and days of training a model on a number of devices.

Nothing is estimated that can be counted: parameters, gradients and optimiser state are counted on the model built on
`meta`, and activations by running the training code on fake tensors and adding up what autograd saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from chameleon.errors import BadInput
from chameleon.model.activation_checkpointing import ActivationCheckpointing, saved_activations_per_token
from chameleon.model.config import ModelConfig
from chameleon.model.loss import loss_chunk_size
from chameleon.model.transformer import Transformer, block_diagonal_causal_mask
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig

PRECISIONS = {
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-true": (torch.float16, torch.float16),
    "32-true": (torch.float32, torch.float32),
}
"""Lightning's name of a precision → (dtype of parameters, gradients and moments; dtype of matrix products)."""


class DeviceSpecs(NamedTuple):
    """What a device can do, by its vendor's data sheets."""

    memory: float
    """Bytes."""
    flops: float
    """Dense 16-bit operations a second with 32-bit accumulation."""
    link: float
    """Bytes a second in each direction between the devices of a node: NVLink, or PCIe 4.0 with 16 lanes."""
    network: float
    """Bytes a second in each direction for each device between nodes, in the vendor's reference designs."""


DEVICES = {
    "rtx4090": DeviceSpecs(24e9, 165e12, 32e9, 12.5e9),
    "a100-40": DeviceSpecs(40e9, 312e12, 300e9, 25e9),
    "l40s": DeviceSpecs(48e9, 362e12, 32e9, 25e9),
    "a100": DeviceSpecs(80e9, 312e12, 300e9, 25e9),
    "h100": DeviceSpecs(80e9, 989e12, 450e9, 50e9),
    "h200": DeviceSpecs(141e9, 989e12, 450e9, 50e9),
    "b200": DeviceSpecs(180e9, 2250e12, 900e9, 50e9),
}
DEVICES_PER_NODE = 8
RESERVED_BYTES = 2e9
"""Bytes of a GPU left to its runtime and to fragmentation: an allowance, not a measurement."""

DataParallel = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained."""

    micro_batch_size: int = 1
    """Rows of one forward and backward pass on a device; for inference, the batch size."""
    context_length: int = 4096
    """Tokens of a row."""
    precision: str = "bf16-mixed"
    optimizer: Literal["adamw", "muon"] = "adamw"
    data_parallel: DataParallel = "none"
    """`fsdp`: parameters, gradients and optimiser state are sharded block by block (arXiv 2304.11277)."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """`full`: a block's activations are recomputed in the backward pass; `selective`: all but those of products."""
    devices: int = 1
    tensor_parallel_size: int = 1
    """Devices that split each matrix, the vocabulary, and between blocks the tokens; only with `fsdp`."""
    micro_batches: int = 1
    """Micro-batches of a step."""
    gradient_sync: Literal["micro_batch", "step"] = "micro_batch"
    """When `fsdp` reduces gradients."""
    device_type: Literal["cuda", "cpu"] = "cuda"
    """What kind of devices they are."""
    utilization: float = 0.4
    """Share of the devices' peak that training reaches, where the network does not limit it."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, tuple(PRECISIONS)),
            ("optimizer", self.optimizer, ("adamw", "muon")),
            ("data_parallel", self.data_parallel, ("none", "ddp", "fsdp")),
            ("activation_checkpointing", self.activation_checkpointing, ("none", "selective", "full")),
            ("gradient_sync", self.gradient_sync, ("micro_batch", "step")),
            ("device_type", self.device_type, ("cuda", "cpu")),
        ):
            if value not in known:
                raise BadInput(f"unknown {name} {value!r}", where="plan", remedy=f"one of {', '.join(known)}")
        sizes = ("micro_batch_size", "context_length", "devices", "tensor_parallel_size", "micro_batches")
        for name in sizes:
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}, expected 1 or more", where="plan")
        if self.devices % self.tensor_parallel_size or (self.tensor_parallel_size > 1 and self.data_parallel != "fsdp"):
            raise BadInput(
                f"tensor_parallel_size {self.tensor_parallel_size} with {self.devices} devices and {self.data_parallel}",
                where="plan",
                remedy="it needs fsdp, and must divide the devices",
            )
        if not 0 < self.utilization <= 1:
            raise BadInput(f"utilization {self.utilization} is not in (0, 1]", where="plan")
        if self.data_parallel == "none" and self.devices > 1:
            raise BadInput(f"{self.devices} devices without data_parallel", where="plan", remedy="choose ddp or fsdp")


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one device by purpose, in bytes."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class TrainingBytes(MemoryUse):
    """Memory of one device while training, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """Of the loss: logits of one chunk, the head's gradient and its copy in the dtype of products."""
    communication: int
    """DDP's buckets; what FSDP has gathered at one time."""


@dataclass(frozen=True)
class InferenceBytes(MemoryUse):
    """Memory of one device while generating in 16 bits, in bytes."""

    parameters: int
    kv_cache: int
    logits: int
    image_tokenizer: int
    """Its parameters in float32; its activations are not counted."""


class StepSeconds(NamedTuple):
    """How long the parts of a step take."""

    products: float
    network: float
    """Parameters and gradients between data-parallel devices, while products are computed."""
    link: float
    """Hidden states between the devices that split the model, which products wait for."""

    @property
    def total(self) -> float:
        """The step, if transfers of parameters and gradients hide behind everything else."""
        return max(self.products + self.link, self.network)

    @property
    def limit(self) -> str:
        """What determines the time: products or network."""
        return "network" if self.network > self.products + self.link else "products"


@dataclass(frozen=True)
class Plan:
    """The result of `plan_training`."""

    config: ModelConfig
    setup: TrainingSetup
    training: TrainingBytes
    inference: InferenceBytes
    flops_per_token: float

    def tokens_per_second(self, device: str) -> float:
        """Return the tokens a second of all devices, by what limits them. Raise `BadInput` for an unknown device."""
        setup = self.setup
        copies = setup.devices // setup.tensor_parallel_size
        tokens = copies * setup.micro_batch_size * setup.context_length * setup.micro_batches
        return tokens / self.seconds_of_step(device).total

    def days(self, device: str, tokens: float) -> float:
        """Return the days to train on that many tokens. Raise `BadInput` for an unknown device."""
        return tokens / self.tokens_per_second(device) / 86400

    def network_bytes(self) -> float:
        """Return the bytes that a device sends, and as many that it receives, for parameters and gradients in a step."""
        setup, (param_dtype, product_dtype) = self.setup, PRECISIONS[self.setup.precision]
        own = self.config.parameters / setup.tensor_parallel_size
        copies = setup.devices // setup.tensor_parallel_size
        share = (copies - 1) / copies
        if setup.data_parallel == "ddp":
            return 2 * share * own * param_dtype.itemsize
        if setup.data_parallel == "none":
            return 0.0
        # Gathered for the forward and the backward pass; gradients are reduced in 32 bits.
        reductions = setup.micro_batches if setup.gradient_sync == "micro_batch" else 1
        return share * own * (2 * product_dtype.itemsize * setup.micro_batches + 4 * reductions)

    def link_bytes(self) -> float:
        """Return the bytes that a device sends to those that split the model with it, in a step."""
        setup, product_size = self.setup, PRECISIONS[self.setup.precision][1].itemsize
        share = (setup.tensor_parallel_size - 1) / setup.tensor_parallel_size
        tokens = setup.micro_batch_size * setup.context_length * setup.micro_batches
        # A block gathers its tokens' hidden states twice and scatters sums twice, and the same in the backward pass.
        return share * 8 * self.config.layers * tokens * self.config.width * product_size

    def seconds_of_step(self, device: str) -> StepSeconds:
        """Return how long products and transfers of a step take. Raise `BadInput` for an unknown device."""
        setup, specs = self.setup, device_specs(device)
        tokens = setup.micro_batch_size * setup.context_length * setup.micro_batches
        flops = tokens * self.flops_per_token / setup.tensor_parallel_size
        speed = specs.network if setup.devices > DEVICES_PER_NODE else specs.link
        return StepSeconds(
            products=flops / (specs.flops * setup.utilization),
            network=self.network_bytes() / speed,
            link=self.link_bytes() / specs.link,
        )

    def spare_bytes(self, device: str) -> float:
        """Return the bytes left on the device while training; negative where it does not fit."""
        return device_specs(device).memory - RESERVED_BYTES - self.training.total

    def to_json(self, device_names: Iterable[str] = DEVICES, tokens: float | None = None) -> dict[str, Any]:
        """Return everything as plain values; with `tokens` to train on, also the days on each kind of device."""
        devices: dict[str, dict[str, Any]] = {}
        for name in device_names:
            seconds = self.seconds_of_step(name)
            devices[name] = {
                "spare_bytes": self.spare_bytes(name),
                "tokens_per_second": self.tokens_per_second(name),
                "seconds_of_step": seconds._asdict(),
                "limit": seconds.limit,
            }
        for name, values in devices.items():
            if tokens is not None:
                values["days"] = self.days(name, tokens)
        return {
            "model": self.config.to_json(),
            "setup": asdict(self.setup),
            "parameters": self.config.parameters,
            "training_bytes": {**asdict(self.training), "total": self.training.total},
            "inference_bytes": {**asdict(self.inference), "total": self.inference.total},
            "flops_per_token": self.flops_per_token,
            "network_bytes_per_step": self.network_bytes(),
            "link_bytes_per_step": self.link_bytes(),
            "devices": devices,
        }


def device_specs(name: str) -> DeviceSpecs:
    """Return what a device can do. Raise `BadInput` for one that is not in `DEVICES`."""
    if name not in DEVICES:
        raise BadInput(f"unknown device {name!r}", where="plan", remedy=f"one of {', '.join(DEVICES)}")
    return DEVICES[name]


def plan_training(config: ModelConfig, setup: TrainingSetup, image: VQGANConfig | None = None) -> Plan:
    """Return memory and speed of a model in a setup. image: the image tokenizer, by default Meta's released one.

    Raises `BadInput` where the context length exceeds the model's.
    """
    if setup.context_length > config.context_length:
        raise BadInput(f"context_length {setup.context_length} exceeds the model's {config.context_length}", where="plan")
    with torch.device("meta"):
        model, tokenizer = Transformer(config), VQGAN(image or VQGANConfig())
    batch_size, kv_width = setup.micro_batch_size, config.kv_heads * config.head_width
    inference = InferenceBytes(
        parameters=2 * config.parameters,
        kv_cache=2 * 2 * config.layers * batch_size * kv_width * setup.context_length,
        logits=4 * batch_size * config.vocab_size,
        image_tokenizer=4 * sum(p.numel() for p in tokenizer.parameters()),
    )
    flops = flops_per_token(config, setup.context_length)
    return Plan(config, setup, training_bytes(model, setup), inference, flops)


def training_bytes(model: Transformer, setup: TrainingSetup) -> TrainingBytes:
    """Return what one device holds at the end of a forward pass, with loss and gradients. The model may be on `meta`."""
    config, (param_dtype, product_dtype) = model.config, PRECISIONS[setup.precision]
    param_size, product_size = param_dtype.itemsize, product_dtype.itemsize
    named = dict(model.named_parameters())
    num_parameters = sum(p.numel() for p in named.values())
    block_parameters = sum(p.numel() for p in model.blocks[0].parameters())
    # AdamW has two moments, and a float32 step count for each tensor; Muon one momentum for each matrix of a block.
    muon = {n for n in named if setup.optimizer == "muon" and n.startswith("blocks.") and "_norm." not in n}
    num_moments = sum(p.numel() * (1 if name in muon else 2) for name, p in named.items())
    parameters = gradients = num_parameters * param_size
    optimizer = num_moments * param_size + 4 * (len(named) - len(muon))
    activations = activation_bytes(config, setup)
    communication = 0
    if setup.data_parallel == "fsdp":
        whole_gradients = gradients // setup.tensor_parallel_size
        parameters, gradients, optimizer = (-(-size // setup.devices) for size in (parameters, gradients, optimizer))
        if setup.gradient_sync == "step" and setup.micro_batches > 1:
            gradients += whole_gradients
        root_parameters = num_parameters - config.layers * block_parameters
        gathered = (root_parameters + 2 * block_parameters) * product_size  # the root, a block and the next one
        reduced = block_parameters * (product_size + 2 * 4)  # a block's gradients, in 32 bits with those of the one before
        communication = (gathered + reduced) // setup.tensor_parallel_size
        if setup.activation_checkpointing == "none":  # gradients come when the activations of their block are gone
            communication -= min(activations // config.layers, reduced // setup.tensor_parallel_size)
    elif setup.data_parallel == "ddp":
        communication = gradients
    num_tokens, head_size = setup.micro_batch_size * setup.context_length, config.vocab_size * config.width
    chunk_logits = min(loss_chunk_size(config.vocab_size, setup.device_type), num_tokens) * config.vocab_size
    head_copies = 4 + product_size + (product_size if product_size != param_size else 0)
    logits = (chunk_logits * (4 + product_size) + head_size * head_copies) // setup.tensor_parallel_size
    logits += 2 * num_tokens * config.width * product_size  # hidden states of weighted tokens, and their gradient
    return TrainingBytes(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        communication=communication,
    )


def activation_bytes(config: ModelConfig, setup: TrainingSetup, *, masked: bool = True) -> int:
    """Return the bytes that autograd saves in a forward pass from token ids to hidden states, without parameters.

    One and two blocks are run on fake tensors; every further block adds what the second one did. Copies of weights made by
    mixed precision count, since they live as long. The kernels are those of a CPU.

    Tensor parallelism splits what belongs to heads and to the hidden width of the feed-forward layers, and elsewhere the
    tokens, but for attention masks and the inputs of the two first matrices of a block, which each device has whole.

    masked: whether attention has a mask, from which kernels make one of their own.
    """
    if setup.tensor_parallel_size > 1:
        size, num_tokens = setup.tensor_parallel_size, setup.micro_batch_size * setup.context_length
        alone = replace(setup, tensor_parallel_size=1)
        whole, without_masks = (activation_bytes(config, alone, masked=is_masked) for is_masked in (True, False))
        unsplit = whole - without_masks
        if setup.activation_checkpointing == "none":
            unsplit += 2 * config.layers * num_tokens * config.width * PRECISIONS[setup.precision][1].itemsize
        return (whole - unsplit) // size + unsplit
    one_block, two_blocks = (traced_bytes(replace(config, layers=layers), setup, masked) for layers in (1, 2))
    per_block, rest = two_blocks - one_block, 2 * one_block - two_blocks
    if setup.activation_checkpointing == "none":
        return rest + config.layers * per_block
    num_tokens, (param_dtype, product_dtype) = (
        setup.micro_batch_size * setup.context_length,
        PRECISIONS[setup.precision],
    )
    saved = num_tokens * config.width * param_dtype.itemsize
    if setup.activation_checkpointing == "selective":
        saved += num_tokens * saved_activations_per_token(config) * product_dtype.itemsize
    return rest + config.layers * saved + per_block


def traced_bytes(config: ModelConfig, setup: TrainingSetup, masked: bool) -> int:
    """Return the `saved_bytes` of a forward pass over a packed batch of the setup's shape, on fake tensors."""
    param_dtype, product_dtype = PRECISIONS[setup.precision]
    default_dtype = torch.get_default_dtype()
    with FakeTensorMode():
        try:
            torch.set_default_dtype(param_dtype)
            model = Transformer(config)
        finally:
            torch.set_default_dtype(default_dtype)
        token_ids = torch.zeros(setup.micro_batch_size, setup.context_length, dtype=torch.int64)
        with torch.autocast("cpu", product_dtype, enabled=product_dtype != param_dtype):
            mask = block_diagonal_causal_mask(token_ids) if masked else None
            return saved_bytes(lambda: model(token_ids, token_ids, mask), list(model.parameters()))


def saved_bytes(run: Callable[[], Tensor], parameters: list[torch.nn.Parameter]) -> int:
    """Return the bytes of the distinct storages that autograd saves during `run()`, without those of the parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    saved: dict[int, torch.UntypedStorage] = {}  # keeps storages alive, so that no address occurs twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())


def flops_per_token(config: ModelConfig, context_length: int) -> float:
    """Return the floating-point operations of training for one token: 6 for each weight of a product, and attention's.

    The embedding is a lookup and counts nothing. Attention at full `context_length`, halved for causality (PaLM,
    arXiv 2204.02311, appendix B, halved).
    """
    kv = config.kv_heads * config.head_width
    block = config.width * (2 * config.width + 2 * kv) + 3 * config.width * config.ffn_width
    weights = config.layers * block + config.vocab_size * config.width
    return 6.0 * weights + 6.0 * config.layers * config.width * context_length
