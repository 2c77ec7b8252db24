"""The training module of the Transformer, for pretraining and fine-tuning alike; the two differ in their recipes only."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from chameleon.bundle import Prompting
from chameleon.data.mixture import Mixture, PackedBatch, PackedSource
from chameleon.data.token_shards import TokenShard, verify_shards
from chameleon.device import matmul_peak
from chameleon.model.loss import TokenLoss
from chameleon.model.transformer import Transformer
from chameleon.plan import flops_per_token
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.adapters import fold_adapters, initial_lora_value, plain_name
from chameleon.train.language_data import TimedLoader
from chameleon.train.language_metrics import MODALITIES, StepTotals, local_totals, mean, sources_of_rows
from chameleon.train.monitors import AttentionLogitMonitor, LayerTimer, UpdateRatioMonitor
from chameleon.train.objective import Objective
from chameleon.train.optimizer import (
    build_optimizers,
    clip_factor,
    local_grad_square,
    lr_at,
    scale_grads,
    set_lr,
    step_unless,
)
from chameleon.train.parallel import (
    consecutive_runs,
    copy_full_tensor,
    fill_parameters,
    fused_row_order,
    parallelize,
)
from chameleon.train.processes import num_processes, on_first_process, process_rank, run_on_all_processes
from chameleon.train.recipe import FinetuneRecipe, TrainRecipe
from chameleon.train.sharded_tensors import Box, full_tensor
from chameleon.train.stability import DivergenceAlarm
from chameleon.train.step_module import StepModule
from chameleon.train.step_result import StepResult
from chameleon.train.trainer import effective_precision, fsdp_param_dtype
from chameleon.train.training_start import TrainingStart, add_adapters
from chameleon.vocabulary import Modality, Vocabulary


class LanguageModule(StepModule):
    """The Transformer with its loss, optimisers and monitors."""

    def __init__(self, start: TrainingStart, recipe: TrainRecipe, mixture: Mixture, context_length: int) -> None:
        super().__init__(recipe.run, recipe.stability)
        self.start, self.recipe, self.mixture = start, recipe, mixture
        with torch.device("meta"):
            model = Transformer(start.config)
        add_adapters(model, start, recipe)
        self.objective = Objective(model, z_loss=recipe.z_loss, attention=recipe.attention, loss=recipe.loss)
        self.alarm = DivergenceAlarm(recipe.stability, recipe.optimizer.warmup_steps)
        self.flops_per_token = flops_per_token(start.config, context_length)
        self.matmul_peak = 0.0
        self.output_norm = torch.zeros(())
        """Mean norm of the last block's output in the latest forward pass."""
        self.loader: TimedLoader | None = None
        """The training loader, for the share of time spent waiting for it."""
        self.wait_clock = (0.0, 0.0)
        """Start of the training: (time, seconds waited for the loader)."""
        self.prompting: Prompting = "conversation" if isinstance(recipe, FinetuneRecipe) else "document"
        """How the trained model is to be prompted."""
        self.shards_to_verify: list[TokenShard] = []
        """Shards whose checksums are compared before the first step, each by one process."""
        self.sample_sources: Sequence[PackedSource] = mixture.sources
        """Sources of the pictures and texts of `SampleLogger`."""

    @property
    def model(self) -> Transformer:
        return self.objective.model

    @property
    def tokenizer(self) -> MixedTokenizer:
        return self.start.tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        return self.start.tokenizer.vocabulary

    # --- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Forward, loss, backward, gradient norm, clipping, optimiser step, log.

        The loss is normalised by the number of weighted tokens of the global batch, over all devices and micro-batches.
        That is known once all processes have told theirs, with the gradient norm; until then the number of all targets
        stands for it.
        """
        start_time = time.perf_counter()
        recipe, optimizers = self.recipe, self.optimizer_list()
        lr = lr_at(self.completed_steps, recipe.run.max_steps, recipe.optimizer)
        is_logged, is_monitored = self.is_logged_step, self.is_logged_step and recipe.monitors
        attention_monitor = AttentionLogitMonitor(self.model) if is_monitored else None
        timer = LayerTimer(self.model) if is_monitored and self.trainer.world_size > 1 else None

        modality = self.vocabulary.modality(batch.targets)
        loss_weights = torch.where(modality == Modality.IMAGE, recipe.image_loss_weight, 1.0) * batch.loss_weights.float()
        loss_weights = loss_weights / loss_weights.numel()

        batch_size = len(batch.input_ids)
        micro_batch_size = recipe.micro_batch_size or batch_size
        loss, output_norm = (torch.zeros((), device=self.device) for _ in range(2))
        token_losses = []
        for first_row in range(0, batch_size, micro_batch_size):
            rows = slice(first_row, first_row + micro_batch_size)
            micro_batch = PackedBatch(*(column[rows] for column in batch))
            is_last = first_row + micro_batch_size >= batch_size
            with ExitStack() as stack:
                if attention_monitor is not None:
                    stack.enter_context(attention_monitor.recording(micro_batch.document_ids))
                if timer is not None:
                    stack.enter_context(timer.recording())
                token_loss = self.objective(micro_batch, loss_weights[rows])
            with nullcontext() if is_last else self.no_grad_sync():
                self.manual_backward(token_loss.loss)
            loss = loss + token_loss.loss.detach()
            token_losses.append(token_loss)
            output_norm = output_norm + self.output_norm * (len(micro_batch.input_ids) / batch_size)

        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        grad_square = local_grad_square(parameters, self.trainer.world_size)
        means = [loss_weights.sum(), loss, output_norm]  # over data-parallel processes, as gradients are
        totals = []
        if is_logged:
            totals = self.local_totals(batch._replace(loss_weights=loss_weights), modality, token_losses)
        local = torch.stack([value.double().to(self.device) for value in (grad_square, *means)])
        sums, requested = self.sum_over_processes(torch.cat((local, *totals)))
        weight, loss, output_norm = (sums[1:4] / self.trainer.world_size).unbind()
        weight = weight.clamp(min=1e-30)  # where no token counts, everything is 0
        loss, grad_norm = loss / weight, sums[0].sqrt() / weight

        skip = self.decide_to_skip(loss, grad_norm)
        scale_grads(parameters, clip_factor(grad_norm, recipe.optimizer.max_grad_norm) / weight)
        update_monitor = UpdateRatioMonitor(self.model) if is_monitored else None
        for optimizer in optimizers:
            set_lr(optimizer.optimizer, lr)
            step_unless(skip, optimizer)
            optimizer.zero_grad()
        result = self.record_step(skip, loss, grad_norm, requested, output_norm)
        if is_logged:
            step_totals = StepTotals.from_list((sums[4:] / recipe.run.tensor_parallel_size).tolist())
            metrics = {"train/loss": result.loss, "train/output_norm": result.values[0]}
            metrics |= step_totals.metrics([source.config.display_name for source in self.mixture.sources])
            metrics |= {"train/grad_norm": result.grad_norm, "lr": lr}
            metrics |= {"stability/skipped_steps": float(self.guard.skipped_steps)}
            if attention_monitor is not None and update_monitor is not None:
                metrics |= {"monitor/update_ratio": float(update_monitor.ratio())}
                metrics |= self.attention_metrics(attention_monitor)
            self.check_log_z(step_totals)
            metrics |= self.speed_metrics(batch, start_time)
            if timer is not None:
                metrics |= self.slowest_process(timer.seconds())
            self.write_metrics(self.current_step, metrics)

    @contextmanager
    def no_grad_sync(self) -> Iterator[None]:
        """Leave gradients of all micro-batches but the last on their process, where the recipe says so."""
        if self.recipe.run.data_parallel == "ddp":
            block_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
            with block_sync():
                yield
        elif self.recipe.gradient_sync == "step" and isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(False)
            yield
            self.objective.set_requires_gradient_sync(True)
        else:
            yield

    def local_totals(self, batch: PackedBatch, modality: Tensor, token_losses: list[TokenLoss]) -> list[Tensor]:
        """Return this process's terms of `StepTotals`."""
        rank, world = self.data_parallel_rank, self.data_parallel_size
        source_of_row = torch.tensor(sources_of_rows(self.mixture, self.batches_seen, rank, world), device=self.device)
        return local_totals(batch, modality, token_losses, source_of_row, len(self.mixture.sources))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.model, self.recipe.optimizer)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        on_first_process(self.start.verify)
        own = self.shards_to_verify[process_rank() :: num_processes()]
        run_on_all_processes(lambda: verify_shards(own))
        self.matmul_peak = matmul_peak(self.device, self.product_dtype)
        self.wait_clock = (time.perf_counter(), self.loader.seconds_waited if self.loader else 0.0)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of matrix products in training."""
        return torch.float32 if effective_precision(self.recipe.run) == "32-true" else torch.bfloat16

    # --- monitoring ------------------------------------------------------------------------------------------------

    def record_output_norm(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        """Record the mean norm of the last block's output, whose growth precedes divergence (arXiv 2405.09818, fig. 5a)."""
        self.output_norm = output.detach().float().norm(dim=-1).mean()

    def check_result(self, result: StepResult) -> None:
        self.report(self.alarm.check_output_norm(result.step - 1, result.values[0]), result.step)

    def check_log_z(self, totals: StepTotals) -> None:
        """Report drifted output logits."""
        for kind, modality_totals in zip(MODALITIES, totals.modalities, strict=True):
            log_z = mean(modality_totals.log_z, modality_totals.tokens)
            self.report(self.alarm.check_log_z(log_z, kind.name.lower()), self.current_step)

    def report(self, warning: str | None, step: int) -> None:
        if warning is not None:
            self.events.add(step, "alarm", warning)

    def attention_metrics(self, monitor: AttentionLogitMonitor) -> dict[str, float]:
        """Return the largest attention logit of each layer over all processes, and report where it is too large."""
        largest = torch.stack(monitor.largest)
        if self.trainer.world_size > 1:
            largest = torch.as_tensor(self.all_gather(largest)).amax(dim=0)
        values = largest.tolist()
        layer = max(range(len(values)), key=values.__getitem__)
        self.report(self.alarm.check_attention_logit(values[layer], layer), self.current_step)
        return {f"monitor/attention_logit_{layer}": value for layer, value in enumerate(values)}

    def speed_metrics(self, batch: PackedBatch, start_time: float) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else the clock would stop before the work does
        tokens_per_second = batch.input_ids.numel() / (time.perf_counter() - start_time)
        flops = tokens_per_second * self.flops_per_token / self.recipe.run.tensor_parallel_size
        metrics = {
            "speed/tokens_per_second": tokens_per_second * self.data_parallel_size,
            "speed/matmul_utilization": flops / self.matmul_peak,
        }
        if self.loader is not None:
            training_start, waited_before = self.wait_clock
            waited = self.loader.seconds_waited - waited_before
            metrics["speed/data_wait_share"] = waited / (time.perf_counter() - training_start)
        return metrics

    def slowest_process(self, seconds: float) -> dict[str, float]:
        """Return which process takes longest for the layers of a forward pass, and report one that is slow each time."""
        mine = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        of_processes = torch.as_tensor(self.all_gather(mine)).flatten()
        slowest, median = int(of_processes.argmax()), float(of_processes.median())
        ratio = float(of_processes.max()) / max(median, 1e-9)
        self.report(self.alarm.check_slowest_process(slowest, ratio), self.current_step)
        return {"speed/slowest_process": slowest, "speed/slowest_to_median": ratio, "speed/layer_seconds": median}

    # --- validation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.validation_sums = torch.zeros(len(MODALITIES), 2, dtype=torch.float64, device=self.device)
        """[modalities, (sum of nll, tokens)]."""

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        modality = self.vocabulary.modality(batch.targets)
        token_loss = self.objective(batch, batch.loss_weights.float())
        for index, kind in enumerate(MODALITIES):
            is_kind = (batch.loss_weights.flatten() > 0) & (modality.flatten() == kind)
            self.validation_sums[index] += torch.stack((token_loss.nll[is_kind].sum().double(), is_kind.sum().double()))

    def on_validation_epoch_end(self) -> None:
        self.validation_sums = self.all_reduce_sum(self.validation_sums)
        metrics = {
            f"validation/{kind.name.lower()}_loss": nll / tokens
            for kind, (nll, tokens) in zip(MODALITIES, self.validation_sums.tolist(), strict=True)
            if tokens
        }
        self.write_metrics(self.completed_steps, metrics)

    # --- parameters on their devices -------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard the model over the devices, then give each its part of the initial values."""
        if not any(parameter.is_meta for parameter in self.model.parameters()):
            return
        recipe = self.recipe
        mesh = self.device_mesh if recipe.run.data_parallel == "fsdp" else None
        tensors = (*self.objective.named_parameters(), *self.objective.named_buffers(remove_duplicate=False))
        kept = {name: value.detach().clone() for name, value in tensors if not value.is_meta}
        parallelize(
            self.objective,
            mesh,
            activation_checkpointing=recipe.activation_checkpointing,
            compile=recipe.compile,
            param_dtype=fsdp_param_dtype(recipe.run) if mesh is not None else None,
        )
        self.objective.to_empty(device="cpu" if mesh is None else self.trainer.strategy.root_device)
        if self.start.config.tied_head:
            self.model.head.weight = self.model.embed.weight
        fill_parameters(self.objective, self.initial_part, kept)
        self.model.blocks[-1].register_forward_hook(self.record_output_norm)

    def initial_part(self, name: str, box: Box) -> Tensor:
        """Return a part of the initial value of a parameter of the objective, its rows in tensor-parallel order."""
        plain = plain_name(name.removeprefix("model."))
        if ".lora_" in name:
            shape = dict(self.objective.named_parameters())[name].shape
            return initial_lora_value(name, shape, self.recipe.run.seed + zlib.crc32(plain.encode()))[box]
        order = fused_row_order(plain, self.start.config, self.recipe.run.tensor_parallel_size)
        if order is None:
            return self.start.initial_part(plain, box)
        runs = consecutive_runs(order[box[0]]) or [slice(0, 0)]  # the last processes may have no row
        return torch.cat([self.start.initial_part(plain, (rows, *box[1:])) for rows in runs])

    def reorder_fused_rows(self, before: int, now: int, optimizers: list[torch.optim.Optimizer]) -> None:
        if before == now:
            return
        for name, parameter in self.named_parameters():
            old_order, new_order = (fused_row_order(plain_name(name), self.start.config, size) for size in (before, now))
            if old_order is None and new_order is None:
                continue
            states = [state for optimizer in optimizers for state in optimizer.state.get(parameter, {}).values()]
            for tensor in (parameter.detach(), *(state for state in states if state.shape == parameter.shape)):
                rows = full_tensor(tensor)
                rows = rows if old_order is None else rows[old_order.argsort()]
                copy_full_tensor(tensor, rows if new_order is None else rows[new_order])

    def full_model(self) -> Transformer | None:
        """Return the plain model with the current weights, on the CPU of the first process; None on the others.

        A collective operation: every process must call it.
        """
        state = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            full = full_tensor(value.detach())
            if self.trainer.is_global_zero:
                order = fused_row_order(plain_name(name), self.start.config, self.recipe.run.tensor_parallel_size)
                state[name] = (full if order is None else full[order.argsort()]).cpu().clone()
        if not self.trainer.is_global_zero:
            return None
        with torch.device("meta"):
            model = Transformer(self.start.config)
        add_adapters(model, self.start, self.recipe)
        model.load_state_dict(state, assign=True)
        if self.start.config.tied_head:
            model.head.weight = model.embed.weight
        fold_adapters(model)
        return model.requires_grad_(False).eval()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Tensor]:
        return super().extra_state() | {f"alarm.{name}": value for name, value in self.alarm.state().items()}

    def load_extra_state(self, extra: dict[str, Tensor]) -> None:
        super().load_extra_state(extra)
        self.alarm.load_state({name: extra[f"alarm.{name}"] for name in ("output_norms", "rest")})

    def describe_batch(self, batch_index: int) -> str:
        size = self.mixture.global_batch_size
        rows = [self.mixture.locate(batch_index * size + row) for row in range(min(size, 8))]
        names = [f"{self.mixture.sources[source].config.display_name} {row}" for source, _, row in rows]
        return f"(batch {batch_index}: rows {', '.join(names)}{' …' if size > 8 else ''})"
