"""Recipes: YAML files read into dataclasses, strictly, with `key=value` overrides.

A recipe's keys are the fields of its dataclass; an unknown one is an error that names the nearest known key. Types are
checked by jsonargparse.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from chameleon.data.mixture import SourceConfig, StageConfig
from chameleon.errors import BadInput
from chameleon.model.loss import Z_LOSS
from chameleon.model.recompute import Checkpointing
from chameleon.tokenizers.quantizer import CodebookKind
from chameleon.tokenizers.vq_loss import VQLossConfig
from chameleon.tokenizers.vqgan import VQGANConfig
from chameleon.train.adapters import LoraConfig
from chameleon.train.objective import AttentionKind, LossKind
from chameleon.train.optimizer import OptimizerConfig
from chameleon.train.stability import StabilityConfig

SHIPPED = Path(__file__).parent / "recipes"
R = TypeVar("R")


@dataclass
class RunConfig:
    """Where and on what a run happens."""

    out: str = "runs/latest"
    """Folder of the run: logs, checkpoints, and the result."""
    seed: int = 0
    steps: int = 1000
    precision: str = "bf16-mixed"
    """Lightning's name of it; on processors that are slow in bfloat16, 32-true is taken instead."""
    devices: int | str = "auto"
    """How many on each node, or `auto`; on CPUs each is a process with its share of the threads."""
    nodes: int = 1
    """Started on each by torchrun or SLURM."""
    accelerator: str = "auto"
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """What several devices share: `ddp`, the batch; `fsdp`, parameters, gradients and optimiser too (FSDP2)."""
    tensor_parallel: int = 1
    """Devices that split each matrix between them, with `fsdp`; they should be of one node."""
    log_every: int = 10
    """Steps between two rows of the log."""
    validate_every: int = 0
    """Steps between two validations; 0 validates at the end only."""
    progress: bool = True
    wandb: str | None = None
    """Project at Weights & Biases to log to as well; WANDB_MODE=offline keeps it here."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 leaves them to `checkpoint_minutes`."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints; 0 leaves them to `checkpoint_every`."""
    keep: int = 2
    """Checkpoints that are kept."""
    resume: bool = False
    """Go on from the latest checkpoint in `out`."""
    force: bool = False
    """Go on though keys of the recipe have changed that make another run."""


@dataclass
class FitImageRecipe:
    """`chameleon fit-image`: trains an image tokenizer."""

    sources: list[str]
    """Picture sources, see `chameleon.data.sources`."""
    validation: list[str] = field(default_factory=list)
    run: RunConfig = field(default_factory=RunConfig)
    model: VQGANConfig = field(default_factory=VQGANConfig)
    codebook: CodebookKind = "moving_average"
    loss: VQLossConfig = field(default_factory=VQLossConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(rate=1e-3, betas=(0.9, 0.99), eps=1e-8))
    discriminator: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(rate=2e-4, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.0, warmup=0)
    )
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    ema: float = 0.0
    """Share of the old in a moving average of the weights, which is then what is validated and saved; 0 keeps none."""
    weight_field: str | None = None
    """Field of the samples' records that says how often a picture is drawn, such as faces twice as often (RECIPE 2.1)."""
    smallest_usage: float = 0.1
    """Share of the codebook that is in use below which a warning says that it collapses."""
    batch: int = 32
    """Pictures a step, over all devices."""
    workers: int = 0
    scale: tuple[float, float] = (0.85, 1.1)
    """Range of the random scale."""
    shift: float = 0.05
    """Largest random shift, as a share of the side."""


@dataclass
class TrainRecipe:
    """What `chameleon pretrain` and `chameleon finetune` share."""

    mixture: list[SourceConfig]
    stages: list[StageConfig] = field(default_factory=list)
    """Parts of training in which sources have other weights (RECIPE 2.2)."""
    balance_modalities: bool = False
    """Give sources whose answers are mostly pictures half of the tokens, and the others the other half (RECIPE 3)."""
    tokenizers: str | None = None
    """Folder with both tokenizers' files (or a bundle) for a new model."""
    bundle: str | None = None
    """Bundle whose weights and tokenizers training starts from, instead of a new model."""
    size: str | None = None
    """Named size of a new model, see `chameleon.model.config.SIZES`; `mini` where it is left out. With a bundle, what its
    size has to be."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the model that differ from the named size."""
    learn: Literal["all", "lora", "image_head"] = "all"
    """`lora`: low-rank adapters alone, folded into the weights at the end; `image_head`: the head's rows of image ids
    alone, which teaches a model to draw that only its head keeps from drawing."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    codebook_rows: bool = False
    """While training, add a learned projection of the codebook to the rows of image ids in embedding and head, so that
    codes that look alike learn alike; folded into plain rows in the bundle."""
    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    context: int | None = None
    """Ids a row; by default the model's context."""
    rows: int = 32
    """Rows a step, over all devices."""
    micro_rows: int = 0
    """Rows of one forward and backward pass on a device; 0 takes all."""
    image_weight: float = 1.0
    """Weight of image codes in the loss, against 1 for text and structure."""
    z_loss: float = Z_LOSS
    loss: LossKind = "chunked"
    """`cut`: the kernels of cut cross-entropy (arXiv 2411.09009), by the package of that name, on GPUs."""
    attention: AttentionKind = "auto"
    """`flex`: FlexAttention, which passes over blocks between documents; `dense`: a mask. `auto`: `flex` on GPUs."""
    checkpointing: Checkpointing = "none"
    """Activations that are computed again in the backward pass: all, or all but those of products and attention."""
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    monitors: bool = True
    """At logged steps also measure attention logits and how far the weights move."""
    samples: int = 2
    """Captions and drawings in TensorBoard at each validation; 0 draws none."""
    verify: bool = True
    """Check the SHA-256 of all token shards before the first step."""
    compile: bool = False
    """torch.compile each block."""
    workers: int = 0
    validation: list[SourceConfig] = field(default_factory=list)


@dataclass
class PretrainRecipe(TrainRecipe):
    """`chameleon pretrain`: next-id prediction on documents (RECIPE 2.2, 2.3)."""


@dataclass
class FinetuneRecipe(TrainRecipe):
    """`chameleon finetune`: answers of conversations (RECIPE 3)."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(rate=1e-5, schedule="cosine", warmup=0, final=0.0)
    )


@dataclass
class RoadRecipe:
    """`chameleon demo`: everything from data to a tuned model. The recipes' folders are replaced by the run's."""

    text_sources: list[str]
    """Sources the text tokenizer learns from."""
    text_pieces: int
    image: str
    """Recipe of the image tokenizer."""
    shards: dict[str, str]
    """Name of a shard folder → source."""
    pretrain: str
    finetune: str
    concepts: int | None = None
    """Evaluate on this many concepts of the embedded set; None takes all."""
    drawings: int = 200
    """Drawings to evaluate."""


def read_recipe(kind: type[R], path: str | Path | None, overrides: Sequence[str] = ()) -> R:
    """The recipe of dataclass `kind` from a YAML file (or the name of a shipped one) and `key.sub=value` overrides.

    Raises `BadInput` that names file and key for what is unknown, missing, or of the wrong type.
    """
    values: dict[str, Any] = {}
    where: object = "recipe"
    if path is not None:
        file = find_recipe(path)
        where = file
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadInput(f"not YAML ({error})", where=file) from None
        if not isinstance(values, dict):
            raise BadInput("expected keys and values", where=file)
    known = dict(fields_of(kind))
    check_keys(values, known, where, "")
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise BadInput(f"expected key=value, got {text!r}", where="command line")
        try:
            put(values, key.split("."), yaml.safe_load(value), text)
        except yaml.YAMLError:
            raise BadInput(f"value of {text!r} is not YAML", where="command line") from None
    check_keys(values, known, "command line" if overrides else where, "")
    parser = ArgumentParser(exit_on_error=False, parser_mode="yaml")
    parser.add_class_arguments(kind)
    try:
        recipe = kind(**vars(parser.instantiate_classes(parser.parse_object(values))))
    except (ArgumentError, TypeError) as error:
        raise BadInput(str(error), where=where) from None
    check_empty(recipe, where, "")
    return recipe


def check_empty(value: Any, where: object, prefix: str) -> None:
    """Raises `BadInput` naming the first key that is empty (null) where its type does not allow it."""
    hints = typing.get_type_hints(type(value))
    for entry in dataclasses.fields(value):
        found = getattr(value, entry.name)
        if found is None and type(None) not in typing.get_args(hints[entry.name]):
            raise BadInput(f"{prefix}{entry.name} is empty", where=where, remedy="give a value, or leave it out")
        for inner in found if isinstance(found, list) else [found]:
            if dataclasses.is_dataclass(inner):
                check_empty(inner, where, f"{prefix}{entry.name}.")


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, or the shipped recipe of that name. Raises `BadInput` that lists the shipped ones."""
    shipped = SHIPPED / f"{path}.yaml"
    for candidate in (Path(path), shipped):
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(entry.stem for entry in SHIPPED.glob("*.yaml")))
    raise BadInput("no such recipe", where=path, remedy=f"give a file or one of: {names}")


def fields_of(kind: Any) -> Iterator[tuple[str, Any]]:
    """Field names of a dataclass with, for nested dataclasses, their type, else None."""
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        if typing.get_origin(hint) is list:
            inner = typing.get_args(hint)[0]
            yield entry.name, inner if dataclasses.is_dataclass(inner) else None
        else:
            yield entry.name, hint if dataclasses.is_dataclass(hint) else None


def check_keys(values: Any, known: dict[str, Any], where: object, prefix: str) -> None:
    """Raises `BadInput` on the first key that no field has, naming the nearest one that exists."""
    for entry in values if isinstance(values, list) else [values]:
        if not isinstance(entry, dict):
            raise BadInput(f"{prefix.rstrip('.')} holds {entry!r}, expected keys and values", where=where)
        for key, value in entry.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                raise BadInput(f"unknown key {prefix}{key}", where=where, remedy=f"did you mean {prefix}{near[0]}?")
            if known[key] is not None:
                if not isinstance(value, (dict, list)):
                    raise BadInput(f"{prefix}{key} is {value!r}, expected keys and values", where=where)
                check_keys(value, dict(fields_of(known[key])), where, f"{prefix}{key}.")


def put(values: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    """Sets a nested value, making the dictionaries on the way."""
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise BadInput(f"{text!r}: {key} holds no keys", where="command line")
    values[keys[-1]] = value


def to_plain(recipe: Any) -> dict[str, Any]:
    """The recipe as plain values, as provenance keeps it."""
    return dataclasses.asdict(recipe)
