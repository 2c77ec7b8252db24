"""Training of the Transformer under Lightning, for pretraining and for tuning alike.

One step sees the whole batch of rows: its loss is normalised by the batch's own count of weighted ids over all devices,
then micro-batches add up their gradients. What differs between the two verbs is the recipe, nothing here.
"""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chameleon.bundle import Prompting, read_header, stored_names
from chameleon.data.mixture import Mixture, PackedSource, Rows
from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig, named_size
from chameleon.model.loss import TokenLoss
from chameleon.model.transformer import Transformer, initial
from chameleon.plan import flops_per_token, matmul_peak
from chameleon.tensor_files import SafetensorsFiles
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.adapters import add_codebook_rows, add_lora, fold, initial_adapter, open_image_head, plain_name
from chameleon.train.monitors import AttentionWatch, UpdateWatch
from chameleon.train.objective import Objective
from chameleon.train.optimizer import build_optimizers, clip_gradients, gradient_norm, rate_at, set_rate, whole
from chameleon.train.parallel import fill, parallelize, put, row_order
from chameleon.train.recipe import FinetuneRecipe, TrainRecipe
from chameleon.train.stability import Alarm
from chameleon.train.steps import StepModule
from chameleon.train.trainer import low_dtype
from chameleon.vocabulary import Modality, Vocabulary

KINDS = (Modality.TEXT, Modality.IMAGE)


class StepRows(Dataset[Rows]):
    """Item n is batch first + n, the part of one device. There are more batches than steps: see `StepModule.batches`."""

    def __init__(self, mixture: Mixture, count: int, first: int = 0) -> None:
        self.mixture, self.count, self.first = mixture, count, first
        self.rank, self.world = 0, 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Rows:
        return self.mixture.batch(self.first + number, self.rank, self.world)


class TimedLoader:
    """A loader that knows how long it was waited for."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.waited = 0.0
        """Seconds, in all."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - began
            yield batch


@dataclass
class Start:
    """What training starts from."""

    config: ModelConfig
    tokenizer: MixedTokenizer
    values: Callable[[str], Tensor]
    """Name of a parameter of the plain model → its whole value, float32."""
    provenance: dict[str, Any] = field(default_factory=dict)


def start(recipe: TrainRecipe) -> Start:
    """A new model with given tokenizers, or a bundle's own. No weight is read yet."""
    if (recipe.bundle is None) == (recipe.tokenizers is None):
        raise BadInput("give either bundle or tokenizers", where="recipe")
    if recipe.bundle is not None:
        return start_from_bundle(Path(recipe.bundle), recipe)
    assert recipe.tokenizers is not None
    if "vocab_size" in recipe.model:
        raise BadInput("the tokenizers give the number of ids; leave vocab_size out", where="recipe.model")
    config = named_size(recipe.size or "mini", **recipe.model)
    tokenizer = MixedTokenizer.load(Path(recipe.tokenizers))
    config = replace(config, vocab_size=tokenizer.vocabulary.size)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Transformer(config).named_parameters()}
    return Start(config, tokenizer, lambda name: initial(name, shapes[name], config, recipe.run.seed))


def start_from_bundle(place: Path, recipe: TrainRecipe) -> Start:
    """Raises `BadInput` where the recipe asks for another shape than the bundle's."""
    if not place.is_dir():
        raise BadInput("no bundle here", where=place, remedy="give the folder that a training or `convert` wrote")
    header = read_header(place)
    if set(recipe.model) - {"dropout"}:
        raise BadInput("the shape of a bundle's model is fixed; only dropout can be set", where="recipe.model")
    if recipe.size is not None:
        wanted = named_size(recipe.size)
        for name in ("layers", "width", "heads", "kv_heads", "ffn_width", "norm_order"):
            if getattr(wanted, name) != (found := getattr(header.model, name)):
                raise BadInput(
                    f"the recipe is for {recipe.size}, whose {name} is {getattr(wanted, name)}; the bundle's is {found}",
                    where=place,
                    remedy="use the recipe of its size, or set size to null",
                )
    config = replace(header.model, dropout=recipe.model.get("dropout", header.model.dropout))
    files: Mapping[str, Tensor] = SafetensorsFiles.of_folder(place)
    missing = set(stored_names(config)) - set(files)
    if missing:
        raise BadInput(f"no tensor {min(missing)}", where=place)
    tokenizer = MixedTokenizer.load(place, header.vocabulary)
    return Start(config, tokenizer, lambda name: files[name].float(), header.provenance)


def adapt(model: Transformer, start: Start, recipe: TrainRecipe) -> None:
    """Puts on the model what the recipe has it learn by."""
    vocabulary = start.tokenizer.vocabulary
    if recipe.codebook_rows and recipe.learn != "all":
        raise BadInput(f"codebook_rows does not go with learn={recipe.learn}", where="recipe.codebook_rows")
    if recipe.codebook_rows:
        add_codebook_rows(model, start.tokenizer.image.network.quantize.codebook(), vocabulary)
    if recipe.learn == "lora" and recipe.run.tensor_parallel > 1:
        raise BadInput(
            "adapters cannot be split by tensor_parallel", where="recipe.learn", remedy="use run.sharding=fsdp alone"
        )
    if recipe.learn == "lora":
        add_lora(model, recipe.lora)
    elif recipe.learn == "image_head":
        open_image_head(model, start.values("head.weight"), vocabulary)


def share(total: float, count: float) -> float:
    """A mean; NaN, which the log shows as such, where a batch has none of what is counted."""
    return total / count if count else math.nan


class LanguageModule(StepModule):
    """The Transformer with its loss, optimiser and monitors."""

    def __init__(self, begun: Start, recipe: TrainRecipe, mixture: Mixture, context: int) -> None:
        super().__init__(recipe.run, recipe.stability)
        self.begun, self.recipe, self.mixture = begun, recipe, mixture
        self.vocabulary: Vocabulary = begun.tokenizer.vocabulary
        with torch.device("meta"):
            model = Transformer(begun.config)
        adapt(model, begun, recipe)
        self.objective = Objective(model, z_loss=recipe.z_loss, attention=recipe.attention, loss=recipe.loss)
        self.flops = flops_per_token(begun.config, context)
        self.peak = 0.0
        self.output_norm: Tensor | None = None
        self.loader: TimedLoader | None = None
        """What training reads from, for the share of time that it waits."""
        self.marks = (0.0, 0.0)
        self.prompting: Prompting = "conversation" if isinstance(recipe, FinetuneRecipe) else "document"
        """How the trained model is prompted."""
        self.sample_sources: Sequence[PackedSource] = mixture.sources
        """Where samples are taken from that show what the model makes."""

    @property
    def model(self) -> Transformer:
        return self.objective.model

    def configure_model(self) -> None:
        """Divides the model over the devices, then gives each its part of the values."""
        if not any(parameter.is_meta for parameter in self.model.parameters()):
            return
        run, mesh = self.recipe.run, self.device_mesh if self.recipe.run.sharding == "fsdp" else None
        tensors = (*self.objective.named_parameters(), *self.objective.named_buffers(remove_duplicate=False))
        real = {name: value.detach().clone() for name, value in tensors if not value.is_meta}
        parallelize(
            self.objective,
            mesh,
            checkpointing=self.recipe.checkpointing,
            compiled=self.recipe.compile,
            low=low_dtype(run) if mesh is not None else None,
        )
        self.objective.to_empty(device="cpu" if mesh is None else self.trainer.strategy.root_device)
        if self.begun.config.tied_head:
            self.model.head.weight = self.model.embed.weight
        fill(self.objective, self.value, real)
        self.model.blocks[-1].register_forward_hook(self.watch_output)

    def value(self, name: str) -> Tensor:
        """What a parameter of the objective starts from, in the order of rows that its devices have."""
        plain = plain_name(name.removeprefix("model."))
        if ".lora_" in name:
            shape = dict(self.objective.named_parameters())[name].shape
            return initial_adapter(name, shape, self.recipe.run.seed + zlib.crc32(plain.encode()))
        value = self.begun.values(plain)
        order = row_order(plain, self.begun.config, self.recipe.run.tensor_parallel)
        return value if order is None else value[order]

    def reorder_rows(self, before: int, now: int, optimizers: list[torch.optim.Optimizer]) -> None:
        if before == now:
            return
        for name, parameter in self.named_parameters():
            old, new = (row_order(plain_name(name), self.begun.config, size) for size in (before, now))
            if old is None and new is None:
                continue
            states = [state for o in optimizers for state in o.state.get(parameter, {}).values()]
            for tensor in (parameter.detach(), *(state for state in states if state.shape == parameter.shape)):
                rows = whole(tensor)
                rows = rows if old is None else rows[old.argsort()]
                put(tensor, rows if new is None else rows[new])

    def watch_output(self, block: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        """Mean norm of the last block's output: its growth foretells divergence (arXiv 2405.09818, fig. 5a)."""
        self.output_norm = output.detach().float().norm(dim=-1).mean()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.model, self.recipe.optimizer)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.alarm = Alarm(self.recipe.stability, self.recipe.optimizer.warmup)
        self.peak = matmul_peak(self.device)
        self.marks = (time.perf_counter(), self.loader.waited if self.loader else 0.0)

    def extras(self) -> dict[str, Tensor]:
        return super().extras() | {f"alarm.{name}": value for name, value in self.alarm.state().items()}

    def restore_extras(self, extras: dict[str, Tensor]) -> None:
        super().restore_extras(extras)
        self.alarm.restore({name: extras[f"alarm.{name}"] for name in ("norms", "rest")})

    def sources_of(self, batch: int) -> str:
        rows = [self.mixture.locate(batch * self.mixture.rows + place) for place in range(self.mixture.rows)]
        named = [f"{self.mixture.sources[source].config.called} {row}" for source, _, row in rows[:8]]
        return f"(batch {batch}: rows {', '.join(named)}{' …' if len(rows) > 8 else ''})"

    def weights(self, rows: Rows, modality: Tensor) -> Tensor:
        """Weights [B, T] with image codes at `image_weight`."""
        weights = rows.weights.float()
        return torch.where(modality == Modality.IMAGE, weights * self.recipe.image_weight, weights)

    def training_step(self, rows: Rows, number: int) -> None:
        started = time.perf_counter()
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        rate = rate_at(self.done, self.recipe.run.steps, self.recipe.optimizer)
        modality = self.vocabulary.modality(rows.targets)
        weights = self.weights(rows, modality)
        total = self.on_all(weights.sum()) / self.parts[1]  # gradients are averaged over the parts of a batch
        weights = weights / total.clamp(min=1e-6)
        watch = AttentionWatch(self.model) if self.is_logged and self.recipe.monitors else None
        micro = self.recipe.micro_rows or len(rows.ids)
        loss, parts, norms = torch.zeros((), device=self.device), [], []
        for begin in range(0, len(rows.ids), micro):
            part = slice(begin, begin + micro)
            cut = Rows(*(column[part] for column in rows))
            with watch.watching(cut.document_ids) if watch else nullcontext():
                result = self.objective(cut, weights[part])
            with self.gradients_stay() if begin + micro < len(rows.ids) else nullcontext():
                self.manual_backward(result.loss)
            loss += result.loss.detach()
            parts.append(result)
            assert self.output_norm is not None
            norms.append(self.output_norm * len(cut.ids) / len(rows.ids))
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = gradient_norm(learning)
        loss = self.on_all(loss) / self.parts[1]
        self.log_step(rows._replace(weights=weights), modality, parts, loss, norm, torch.stack(norms).sum())
        moved: Tensor | float = 0.0
        if self.leaves_out(loss, norm):
            for optimizer in optimizers:
                optimizer.zero_grad()
        else:
            clip_gradients(learning, self.recipe.optimizer.clip, norm)
            update = UpdateWatch(self.model) if watch is not None else None
            for optimizer in optimizers:
                set_rate(optimizer.optimizer, rate)
                optimizer.step()
                optimizer.zero_grad()
            if update is not None:
                moved = update.share()
        if watch is not None:
            self.log("monitor/update_share", moved)
            self.log_attention(watch)
        self.log("rate", rate)
        self.log("stability/skipped", float(self.guard.skipped))
        self.log_speed(rows, started)

    def gradients_stay(self) -> Any:
        """No exchange of gradients in a backward pass that others follow; sharded ones are exchanged each time."""
        blocked = getattr(self.trainer.strategy, "block_backward_sync", None)
        return blocked() if blocked is not None and self.recipe.run.sharding == "ddp" else nullcontext()

    def log_step(
        self, rows: Rows, modality: Tensor, parts: list[TokenLoss], loss: Tensor, norm: Tensor, output_norm: Tensor
    ) -> None:
        nll, log_z = (torch.cat([getattr(part, name) for part in parts]) for name in ("nll", "log_z"))
        live = rows.weights.flatten() > 0
        # Sums of this process, which those of all others are added to: what is logged is the step's own, whoever logs it.
        sums = [output_norm]
        for kind in KINDS:
            chosen = live & (modality.flatten() == kind)
            sums += [chosen.sum(), nll[chosen].sum(), log_z[chosen].sum()]
        rank, world = self.parts
        places = range(self.batches * self.mixture.rows + rank, (self.batches + 1) * self.mixture.rows, world)
        of_row = torch.tensor([self.mixture.locate(place)[0] for place in places], device=self.device)
        by_row = torch.stack((rows.weights.gt(0).sum(1), nll.view(rows.ids.shape).sum(1)))  # [2, B]
        of_source = torch.zeros(2, len(self.mixture.sources), device=self.device).index_add(1, of_row, by_row.float())
        own = torch.cat((torch.stack([value.detach().double() for value in sums]), of_source.double().flatten()))
        totals = self.on_all(own).tolist()
        count = max(1.0, sum(totals[1 + 3 * place] for place in range(len(KINDS))))
        log_z_mean = sum(totals[3 + 3 * place] for place in range(len(KINDS))) / count
        self.log("train/loss", loss, prog_bar=True)
        warnings = [self.alarm.output_norm(self.done, totals[0] / world)]
        for place, kind in enumerate(KINDS):
            found, nll_sum, log_z_sum = totals[1 + 3 * place : 4 + 3 * place]
            name = kind.name.lower()
            self.log(f"train/{name}_loss", share(nll_sum, found), prog_bar=True)
            self.log(f"train/{name}_log_z", share(log_z_sum, found))
            warnings.append(self.alarm.log_z(share(log_z_sum, found), name))
        if len(self.mixture.sources) > 1:
            half = 1 + 3 * len(KINDS) + len(self.mixture.sources)
            counts, losses = totals[1 + 3 * len(KINDS) : half], totals[half:]
            for source, found, nll_sum in zip(self.mixture.sources, counts, losses, strict=True):
                self.log(f"source/{source.config.called}_loss", share(nll_sum, found))
        self.log_dict({"train/log_z": log_z_mean, "train/gradient_norm": norm, "train/output_norm": totals[0] / world})
        self.warn(warnings)

    def log_attention(self, watch: AttentionWatch) -> None:
        """The largest attention logit of each layer, over all processes."""
        largest = torch.stack(watch.largest)
        if self.trainer.world_size > 1:
            largest = torch.as_tensor(self.all_gather(largest)).amax(dim=0)
        values = largest.tolist()
        for layer, value in enumerate(values):
            self.log(f"monitor/attention_logit_{layer}", value)
        layer = max(range(len(values)), key=values.__getitem__)
        self.warn([self.alarm.attention_logit(values[layer], layer)])

    def warn(self, texts: list[str | None]) -> None:
        for text in filter(None, texts):
            self.events.tell(self.done, "alarm", text)

    def log_speed(self, rows: Rows, started: float) -> None:
        if self.device.type == "cuda" and self.is_logged:
            torch.cuda.synchronize(self.device)  # else the clock stops before the work does
        tokens = rows.ids.numel() / (time.perf_counter() - started)
        self.log("speed/tokens_per_second", tokens * self.parts[1])
        self.log("speed/share_of_matmul_peak", tokens * self.flops / self.peak / self.recipe.run.tensor_parallel)
        if self.loader is not None:
            began, waited = self.marks
            self.log("speed/waiting_share", (self.loader.waited - waited) / (time.perf_counter() - began))

    def validation_step(self, rows: Rows, index: int) -> None:
        modality = self.vocabulary.modality(rows.targets)
        result = self.objective(rows, rows.weights.float())
        for kind in KINDS:
            chosen = (rows.weights.flatten() > 0) & (modality.flatten() == kind)
            if chosen.any():
                name = f"validation/{kind.name.lower()}_loss"
                self.log(name, result.nll[chosen].mean(), prog_bar=True, batch_size=int(chosen.sum()))

    def trained(self) -> Transformer | None:
        """The plain model with the weights as they are, on the CPU: for the first process, but all have to ask."""
        state = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            full = whole(value.detach())
            if self.trainer.is_global_zero:
                order = row_order(plain_name(name), self.begun.config, self.recipe.run.tensor_parallel)
                state[name] = (full if order is None else full[order.argsort()]).cpu().clone()
        if not self.trainer.is_global_zero:
            return None
        with torch.device("meta"):
            model = Transformer(self.begun.config)
        adapt(model, self.begun, self.recipe)
        model.load_state_dict(state, assign=True)
        if self.begun.config.tied_head:
            model.head.weight = model.embed.weight
        fold(model)
        return model.requires_grad_(False).eval()


def data_fingerprint(mixture: Mixture) -> dict[str, str]:
    """SHA-256 over the ids of each source's token shards, all variants, by the source's name."""
    return {
        source.config.called: hashlib.sha256(
            "".join(
                digest
                for shard in source.shards
                for name, digest in sorted(shard.description["sha256"].items())
                if name.startswith("ids")
            ).encode()
        ).hexdigest()
        for source in mixture.sources
    }
