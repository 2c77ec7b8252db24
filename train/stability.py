"""What keeps a run on its way: signs that foretell divergence, and steps that are better not taken.

Both see plain numbers, the same on every process, and keep nothing that a checkpoint could not.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from torch import Tensor, float64, tensor


@dataclass
class StabilityConfig:
    """When a step is left out, when a run goes back, and when it warns."""

    spike: float = 20.0
    """A step whose gradient norm is this many times the median of the last `window` is left out; 0: only what is not
    finite is."""
    window: int = 50
    """Steps that medians are taken over; nothing is judged before as many were seen."""
    patience: int = 5
    """Steps left out in a row after which the run goes back to its last checkpoint and on behind their batches (PaLM,
    arXiv 2204.02311, 5.1); it ends where that was in vain three times. 0 never goes back."""
    alarms: bool = True
    """Warn of growing output norms and of the other signs."""
    output_growth: float = 3.0
    """Times its lowest median at which the output norm's growth is a sign (arXiv 2405.09818, fig. 5a), and again each time
    it has grown as much. Looked at once warm-up and two windows are over: until then every model's norm grows."""
    largest_attention_logit: float = 100.0
    """An attention logit beyond which the softmax is as good as one-hot (arXiv 2309.14322)."""
    largest_log_z: float = 30.0
    """Size of log Z beyond which the output logits have drifted (PaLM's reason for z-loss)."""


class Guard:
    """Says which steps are not to be taken."""

    def __init__(self, config: StabilityConfig) -> None:
        self.config = config
        self.norms: list[float] = []
        """Gradient norms of the last steps that were taken."""
        self.skipped = 0
        self.in_a_row = 0
        self.returns = 0
        """How often the run went back."""

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step of this loss and gradient norm is not to be taken; None where it is."""
        reason = None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss is {loss:g}, gradient norm {norm:g}"
        elif self.config.spike and len(self.norms) >= self.config.window:
            usual = statistics.median(self.norms)
            if norm > self.config.spike * usual:
                reason = f"gradient norm {norm:.3g} is {norm / max(usual, 1e-30):.0f} times the usual {usual:.3g}"
        if reason is None:
            self.in_a_row = 0
            self.norms = [*self.norms, norm][-self.config.window :]
        else:
            self.skipped += 1
            self.in_a_row += 1
        return reason

    @property
    def gives_up(self) -> bool:
        """Whether the run has to go back."""
        return bool(self.config.patience) and self.in_a_row >= self.config.patience

    def went_back(self) -> None:
        self.in_a_row = 0
        self.returns += 1

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {
            "norms": tensor(self.norms, dtype=float64),
            "counts": tensor([self.skipped, self.in_a_row, self.returns]),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.norms = state["norms"].tolist()
        self.skipped, self.in_a_row, self.returns = map(int, state["counts"])


class Alarm:
    """Names the signs that the paper saw before a loss blew up."""

    def __init__(self, config: StabilityConfig, warmup: int = 0) -> None:
        self.config = config
        self.settled = warmup + 2 * config.window
        self.norms: list[float] = []
        self.lowest = math.inf
        self.told = {"attention": False, "log_z of text": False, "log_z of image": False}

    def output_norm(self, step: int, norm: float) -> str | None:
        """A warning where the last block's output norm has grown; to be told the norm of every step."""
        self.norms = [*self.norms, norm][-self.config.window :]
        if not self.config.alarms or step < self.settled or len(self.norms) < self.config.window:
            return None
        usual = statistics.median(self.norms)
        if math.isnan(usual) or usual <= self.config.output_growth * self.lowest:
            self.lowest = min(self.lowest, usual)
            return None
        text = f"output norm has grown {usual / self.lowest:.1f} times, from {self.lowest:.3g} to {usual:.3g}"
        self.lowest = usual  # so that it is told again only once it has grown as much again
        return f"{text}: a sign that comes before the loss diverges (lower the rate, or use qk_norm, z_loss, dropout)"

    def attention_logit(self, largest: float, layer: int) -> str | None:
        """A warning, once, where attention logits are too large."""
        if not self.first("attention", largest > self.config.largest_attention_logit):
            return None
        return f"attention logits of layer {layer} reach {largest:.0f}: its softmax is near one-hot (use qk_norm)"

    def log_z(self, size: float, modality: str) -> str | None:
        """A warning, once, where output logits have drifted."""
        if not self.first(f"log_z of {modality}", abs(size) > self.config.largest_log_z):
            return None
        return f"log Z of {modality} is {size:.0f}: the output logits have drifted (raise z_loss)"

    def first(self, sign: str, seen: bool) -> bool:
        """Whether a sign is seen that was not seen at the last look."""
        new = self.config.alarms and seen and not self.told[sign]
        self.told[sign] = seen
        return new

    def state(self) -> dict[str, Tensor]:
        told = [float(self.told[sign]) for sign in sorted(self.told)]
        return {"norms": tensor(self.norms, dtype=float64), "rest": tensor([self.lowest, *told], dtype=float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.norms = state["norms"].tolist()
        self.lowest, *told = state["rest"].tolist()
        self.told = {sign: bool(value) for sign, value in zip(sorted(self.told), told, strict=True)}
