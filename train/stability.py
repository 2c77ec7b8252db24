"""Training stability: which steps are skipped, when a run rolls back, and which signs of divergence raise an alarm.

Everything here sees plain numbers that are the same on every process, and its state fits in a checkpoint.

The host learns of a step while the next one runs. So that a run does not depend on when it learns, a step is judged by the
norms up to the last but one.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass

from torch import Tensor, float64, int64, tensor

from chameleon.errors import check_least


@dataclass
class StabilityConfig:
    """When a step is skipped, when a run rolls back, and when it warns."""

    max_grad_norm_ratio: float = 20.0
    """Skip a step whose gradient norm is more than this many times the median of the last `window_steps`; 0 skips only
    steps that are not finite."""
    window_steps: int = 50
    """Steps that medians are taken over; nothing is judged before that many."""
    max_consecutive_skips: int = 5
    """Skipped steps in a row after which the run rolls back to its last checkpoint and continues with later batches (PaLM,
    arXiv 2204.02311, section 5.1); it ends when that failed three times. 0 never rolls back."""
    alarms: bool = True
    """Warn of growing output norms and other signs of divergence."""
    max_output_norm_growth: float = 3.0
    """Warn when the output norm has grown by this factor over its lowest median (arXiv 2405.09818, figure 5a), and again
    each time it has grown as much. Checked after warm-up and two windows: until then every model's norm grows."""
    max_attention_logit: float = 100.0
    """Warn of attention logits above this, where softmax is almost one-hot (arXiv 2309.14322)."""
    max_slowdown: float = 1.5
    """Warn of a process that takes more than this many times the median for its layers, three logged steps in a row."""
    max_log_z: float = 30.0
    """Warn where log Z is larger in magnitude: the output logits have drifted, which z-loss prevents (PaLM)."""

    def __post_init__(self) -> None:
        check_least(self.max_grad_norm_ratio, 0, "stability.max_grad_norm_ratio")
        check_least(self.window_steps, 1, "stability.window_steps")
        check_least(self.max_consecutive_skips, 0, "stability.max_consecutive_skips")


class StepGuard:
    """Decides which steps are skipped."""

    def __init__(self, config: StabilityConfig) -> None:
        self.config = config
        self.grad_norms: dict[int, float] = {}
        """Step → gradient norm of the last steps that were not skipped."""
        self.skipped_steps = 0
        self.consecutive_skips = 0
        self.rollbacks = 0
        """Rollbacks since the last checkpoint was written."""

    def median(self, step: int) -> float | None:
        """Return the median norm that `step` is judged by; None while there are fewer than `window_steps`."""
        norms = [norm for earlier, norm in self.grad_norms.items() if earlier < step - 1][-self.config.window_steps :]
        return statistics.median(norms) if len(norms) == self.config.window_steps else None

    def limit(self, step: int) -> float:
        """Return the gradient norm above which a step is skipped; the largest number where any finite norm will do."""
        median = self.median(step) if self.config.max_grad_norm_ratio else None
        return sys.float_info.max if median is None else self.config.max_grad_norm_ratio * median

    def observe(self, step: int, loss: float, grad_norm: float, *, is_skipped: bool) -> str | None:
        """Record what became of a step. Return why it was skipped, or None."""
        if not is_skipped:
            self.consecutive_skips = 0
            kept = list(self.grad_norms.items())[-self.config.window_steps :]
            self.grad_norms = {**dict(kept), step: grad_norm}
            return None
        self.skipped_steps += 1
        self.consecutive_skips += 1
        median = self.median(step)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)) or median is None:
            return f"loss is {loss:g}, gradient norm {grad_norm:g}"
        return f"gradient norm {grad_norm:.3g} is {grad_norm / max(median, 1e-30):.0f} times the median {median:.3g}"

    @property
    def needs_rollback(self) -> bool:
        """Whether so many steps in a row were skipped that the run has to roll back."""
        return bool(self.config.max_consecutive_skips) and self.consecutive_skips >= self.config.max_consecutive_skips

    def rolled_back(self) -> None:
        """Record a rollback."""
        self.consecutive_skips = 0
        self.rollbacks += 1

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores."""
        return {
            "steps": tensor(list(self.grad_norms), dtype=int64),
            "grad_norms": tensor(list(self.grad_norms.values()), dtype=float64),
            "counts": tensor([self.skipped_steps, self.consecutive_skips, self.rollbacks]),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.grad_norms = dict(zip(state["steps"].tolist(), state["grad_norms"].tolist(), strict=True))
        self.skipped_steps, self.consecutive_skips, self.rollbacks = map(int, state["counts"])


class DivergenceAlarm:
    """Warns of the signs that precede divergence. Each method returns a warning, or None."""

    def __init__(self, config: StabilityConfig, warmup_steps: int = 0) -> None:
        self.config = config
        self.first_checked_step = warmup_steps + 2 * config.window_steps
        self.output_norms: list[float] = []
        self.lowest_median = math.inf
        self.is_raised = {"attention": False, "log_z of text": False, "log_z of image": False}
        """Whether each sign was present at the previous check, so that it is reported once."""
        self.slow_process = (-1, 0)
        """The process that was slow at the latest checks, and how many in a row; not part of the state."""

    def check_output_norm(self, step: int, output_norm: float) -> str | None:
        """Check the norm of the last block's output, of every step, for growth."""
        self.output_norms = [*self.output_norms, output_norm][-self.config.window_steps :]
        is_settled = step >= self.first_checked_step and len(self.output_norms) >= self.config.window_steps
        if not self.config.alarms or not is_settled:
            return None
        median = statistics.median(self.output_norms)
        if math.isnan(median) or median <= self.config.max_output_norm_growth * self.lowest_median:
            self.lowest_median = min(self.lowest_median, median)
            return None
        growth = median / self.lowest_median
        message = f"output norm has grown {growth:.1f} times, from {self.lowest_median:.3g} to {median:.3g}"
        self.lowest_median = median  # report again only after it has grown as much again
        return f"{message}: a sign that precedes divergence (lower the lr, or use qk_norm, z_loss, dropout)"

    def check_attention_logit(self, attention_logit: float, layer: int) -> str | None:
        """Check the largest attention logit of all layers, which is that of `layer`."""
        if not self.is_new("attention", attention_logit > self.config.max_attention_logit):
            return None
        return f"attention logits of layer {layer} reach {attention_logit:.0f}: its softmax is almost one-hot (use qk_norm)"

    def check_log_z(self, log_z: float, modality: str) -> str | None:
        """Check the mean log Z of the tokens of a modality."""
        if not self.is_new(f"log_z of {modality}", abs(log_z) > self.config.max_log_z):
            return None
        return f"log Z of {modality} is {log_z:.0f}: the output logits have drifted (raise z_loss)"

    def check_slowest_process(self, rank: int, ratio: float) -> str | None:
        """Check the time that the slowest process takes for its layers, as a multiple of the median."""
        is_slow = ratio > self.config.max_slowdown
        self.slow_process = (rank, self.slow_process[1] + 1 if self.slow_process[0] == rank else 1) if is_slow else (-1, 0)
        if not self.config.alarms or self.slow_process[1] != 3:
            return None
        return f"process {rank} takes {ratio:.1f} times as long as the median for its layers: a slow or busy device"

    def is_new(self, sign: str, is_seen: bool) -> bool:
        """Return whether a sign is present that was absent at the previous check."""
        is_new = self.config.alarms and is_seen and not self.is_raised[sign]
        self.is_raised[sign] = is_seen
        return is_new

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores."""
        raised = [float(self.is_raised[sign]) for sign in sorted(self.is_raised)]
        return {
            "output_norms": tensor(self.output_norms, dtype=float64),
            "rest": tensor([self.lowest_median, *raised], dtype=float64),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.output_norms = state["output_norms"].tolist()
        self.lowest_median, *raised = state["rest"].tolist()
        self.is_raised = {sign: bool(value) for sign, value in zip(sorted(self.is_raised), raised, strict=True)}
