"""Recipes: YAML files read into dataclasses, strictly, with `key=value` overrides.

The keys of a recipe are the fields of its dataclass; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from chameleon.bundle import GenerationConfig
from chameleon.config_reader import read_config
from chameleon.data.mixture import SourceConfig, StageConfig
from chameleon.dialect import ShapeConfig
from chameleon.errors import BadInput, check_least, check_seed
from chameleon.model.activation_checkpointing import ActivationCheckpointing
from chameleon.model.loss import Z_LOSS
from chameleon.tokenizers.quantizer import CodebookKind
from chameleon.tokenizers.vq_loss import VQLossConfig
from chameleon.tokenizers.vqgan import VQGANConfig
from chameleon.train.adapters import LoraConfig
from chameleon.train.objective import AttentionKind, LossKind
from chameleon.train.optimizer import OptimizerConfig
from chameleon.train.stability import StabilityConfig

SHIPPED = Path(__file__).parent / "recipes"
MAX_RUN_SEED = 2**32 - 1
"""NumPy's global generator takes no larger seed."""
R = TypeVar("R")


@dataclass
class RunConfig:
    """Where and on which devices a run takes place."""

    out: str = "runs/latest"
    """Folder of the run: logs, checkpoints, and the result."""
    seed: int = 0
    """0 … 2³² − 1."""
    max_steps: int = 1000
    precision: str = "bf16-mixed"
    """As Lightning names it; on processors where bfloat16 is slow, 32-true is used instead."""
    devices: int | str = "auto"
    """Devices on each node, or `auto`; on CPUs each is a process with its share of the threads."""
    num_nodes: int = 1
    """Nodes, on each of which torchrun or SLURM starts the command."""
    accelerator: str = "auto"
    data_parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: devices split the batch; `fsdp`: parameters, gradients and optimiser are sharded too (FSDP2)."""
    tensor_parallel_size: int = 1
    """Devices that split each matrix and the vocabulary between them, and between blocks the tokens, with `fsdp`; they
    should be in one node."""
    log_every_n_steps: int = 10
    validate_every_n_steps: int = 0
    """0 validates at the end only."""
    progress: bool = True
    """Show a progress line."""
    wandb_project: str | None = None
    """Project at Weights & Biases to log to as well; WANDB_MODE=offline keeps it local."""
    save_every_n_steps: int = 0
    """Steps between two checkpoints; 0 leaves them to `save_every_n_minutes`."""
    save_every_n_minutes: float = 10.0
    """Minutes between two checkpoints; 0 leaves them to `save_every_n_steps`."""
    save_total_limit: int = 2
    """Checkpoints that are kept."""
    resume: bool = False
    """Resume from the latest checkpoint in `out`."""
    force: bool = False
    """Resume although incompatible keys of the recipe have changed, and skip the memory check."""

    def __post_init__(self) -> None:
        check_seed(self.seed, "run.seed", largest=MAX_RUN_SEED)
        for name in ("max_steps", "num_nodes", "log_every_n_steps"):
            check_least(getattr(self, name), 1, f"run.{name}")
        for name in ("validate_every_n_steps", "save_every_n_steps", "save_every_n_minutes"):
            check_least(getattr(self, name), 0, f"run.{name}")


@dataclass
class FitImageRecipe:
    """`chameleon fit-image`: trains an image tokenizer."""

    sources: list[str]
    """Sources of pictures, see `chameleon.data.sources`."""
    allow_paths: bool = False
    """Let records name images outside their folder."""
    validation: list[str] = field(default_factory=list)
    run: RunConfig = field(default_factory=RunConfig)
    model: VQGANConfig = field(default_factory=VQGANConfig)
    codebook: CodebookKind = "moving_average"
    loss: VQLossConfig = field(default_factory=VQLossConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), eps=1e-8))
    discriminator: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-4, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.0, warmup_steps=0)
    )
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is then validated and saved; 0 keeps none."""
    weight_field: str | None = None
    """Field of the records with an image's sampling weight, such as 2 for faces (arXiv 2405.09818, section 2.1)."""
    min_codebook_usage: float = 0.1
    """Warn of codebook collapse where the perplexity of the codes is a smaller share of the codebook's size."""
    global_batch_size: int = 32
    """Pictures of a step, over all devices."""
    num_workers: int = 0
    """Processes that load pictures."""
    scale: tuple[float, float] = (0.85, 1.1)
    """Range of the random scale."""
    shift: float = 0.05
    """Largest random shift, as a fraction of the side."""
    restyle: float = 0.0
    """Share of the pictures that are changed as another artist might have drawn them, in any hue; for drawings on white."""
    shapes: ShapeConfig | None = None
    """Shapes of the images of models that are trained with this tokenizer, which then write images in the sized dialect;
    null: squares of one size. The tokenizer itself is trained on squares."""


@dataclass
class TrainRecipe:
    """What `chameleon pretrain` and `chameleon finetune` share."""

    mixture: list[SourceConfig]
    stages: list[StageConfig] = field(default_factory=list)
    """Parts of training in which sources have other weights (arXiv 2405.09818, section 2.2)."""
    balance_modalities: bool = False
    """Give sources whose answers are mostly images half of the tokens, and the others the other half (section 3.2)."""
    tokenizers: str | None = None
    """Folder with both tokenizers' files (or a bundle) for a new model."""
    bundle: str | None = None
    """Bundle whose weights and tokenizers training starts from, instead of a new model."""
    size: str | None = None
    """Named size of a new model, see `chameleon.model.config.SIZES`; by default `mini`. With a bundle, the size that it
    must have."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that differ from the named size."""
    trainable: Literal["all", "lora", "image_head"] = "all"
    """`lora`: low-rank adapters only, folded into the weights at the end; `image_head`: the head's rows of image tokens
    only, for a model that can draw but for its head."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    codebook_rows: bool = False
    """During training, add a trained projection of the codebook to the rows of image tokens in embedding and head, so that
    similar codes are trained together; folded into plain rows in the bundle."""
    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    context_length: int | None = None
    """Tokens of a packed row; by default the model's context length."""
    global_batch_size: int = 32
    """Rows of a step, over all devices."""
    micro_batch_size: int = 0
    """Rows of one forward and backward pass on a device (gradient accumulation); 0 takes all of the device's rows."""
    gradient_sync: Literal["micro_batch", "step"] = "micro_batch"
    """When `fsdp` reduces gradients with several micro-batches: after each, or once a step, for which every device holds
    the gradients of all the parameters that tensor parallelism leaves it."""
    image_loss_weight: float = 1.0
    """Weight of image codes in the loss; other tokens have 1."""
    z_loss: float = Z_LOSS
    loss: LossKind = "chunked"
    """`cut`: the kernels of cut cross-entropy (arXiv 2411.09009), by the package of that name, on GPUs."""
    attention: AttentionKind = "auto"
    """`flex`: FlexAttention, which skips blocks between documents; `documents`: each document by itself, several of about a
    length at once; `dense`: a dense mask; `auto`: `documents` on CPUs, `flex` on GPUs, or `dense` there where activations
    are recomputed, which PyTorch 2.11 refuses with `flex`."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Activations recomputed in the backward pass: `full`: all; `selective`: all but those of products and attention."""
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    monitors: bool = True
    """On logged steps also measure attention logits and how far the weights move."""
    num_samples: int = 2
    """Captions and drawings to log at each validation."""
    verify_shards: bool = True
    """Check the SHA-256 of all token shards before the first step, each by one process; shards that have not changed since
    they were checked are not read again."""
    compile: bool = False
    """torch.compile each block."""
    num_workers: int = 0
    """Processes that load batches."""
    validation: list[SourceConfig] = field(default_factory=list)
    generation: GenerationConfig | None = None
    """How the trained model is asked and sampled; null: as the bundle that it starts from."""

    def __post_init__(self) -> None:
        check_least(self.global_batch_size, 1, "global_batch_size")
        for name in ("micro_batch_size", "num_workers", "num_samples", "image_loss_weight", "z_loss"):
            check_least(getattr(self, name), 0, name)


@dataclass
class PretrainRecipe(TrainRecipe):
    """`chameleon pretrain`: next-token prediction on documents (arXiv 2405.09818, section 2)."""


@dataclass
class FinetuneRecipe(TrainRecipe):
    """`chameleon finetune`: answers of conversations (arXiv 2405.09818, section 3)."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="cosine", warmup_steps=0, min_lr_ratio=0.0)
    )


@dataclass
class PipelineRecipe:
    """`chameleon demo`: everything from data to a fine-tuned model. The recipes' folders are replaced by the run's."""

    shards: dict[str, str]
    """Name of a folder of token shards → its source; `{0..3}` in a source stands for as many sources."""
    finetune: str
    bundle: str | None = None
    """Bundle to go on from. Its tokenizers stay, and it takes the place of pretraining: the next four are left out."""
    text_sources: list[str] = field(default_factory=list)
    """Sources that the text tokenizer is trained on."""
    text_pieces: int = 0
    """Pieces of the text tokenizer."""
    image: str | None = None
    """Recipe of the image tokenizer."""
    pretrain: str | None = None
    concepts: int | None = None
    """Evaluate on this many concepts of the embedded set; None takes all."""
    drawings: int = 200
    """Drawings to evaluate."""
    processes: int = 1
    """Processes that tokenize documents, each some of the sources."""

    def validate(self) -> None:
        """Raise `BadInput` unless there is either a bundle or all that makes one."""
        makers = (self.text_sources, self.text_pieces, self.image, self.pretrain)
        if (self.bundle is None and not all(makers)) or (self.bundle is not None and any(makers)):
            raise BadInput("give either bundle, or text_sources, text_pieces, image and pretrain", where="recipe")


def read_recipe(kind: type[R], path: str | Path | None, overrides: Sequence[str] = ()) -> R:
    """Return the recipe of dataclass `kind` from a YAML file, or a shipped recipe's name, and `key.sub=value` overrides.

    Raises `BadInput` that names file and key for what is unknown, missing, or of the wrong type.
    """
    return read_config(kind, None if path is None else find_recipe(path), overrides)


def find_recipe(path: str | Path) -> Path:
    """Return the file at `path`, or the shipped recipe of that name. Raise `BadInput` that lists the shipped ones."""
    for candidate in (Path(path), SHIPPED / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
    raise BadInput("no such recipe", where=path, remedy=f"give a file or one of: {names}")


def to_plain(recipe: Any) -> dict[str, Any]:
    """Return the recipe as plain values."""
    return dataclasses.asdict(recipe)
