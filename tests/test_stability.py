"""Steps that are left out, runs that go back, signs that are told in time, and monitors against plain formulas."""

from __future__ import annotations

import csv
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model, recipe_file
from hypothesis import given
from hypothesis import strategies as st

from chameleon.errors import BadInput
from chameleon.model.transformer import apply_rope, block_diagonal_causal_mask, rope_cos_sin
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.language_module import LanguageModule
from chameleon.train.monitors import AttentionLogitMonitor, UpdateRatioMonitor
from chameleon.train.recipe import PretrainRecipe, read_recipe
from chameleon.train.run import train
from chameleon.train.stability import DivergenceAlarm, StabilityConfig, StepGuard


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "log" / "metrics.csv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("lr")]


def events(out: Path) -> list[dict[str, Any]]:
    path = out / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def judge(guard: StepGuard, step: int, norm: float, loss: float = 1.0) -> str | None:
    """As a run does: the limit of a step decides, then it is observed. Why the step is skipped."""
    return guard.observe(step, loss, norm, is_skipped=not (math.isfinite(loss) and norm <= guard.limit(step)))


@given(st.lists(st.floats(0.5, 2.0), min_size=11, max_size=60), st.floats(21, 1e6))
def test_a_guard_skips_spikes_only(norms: list[float], size: float) -> None:
    guard = StepGuard(StabilityConfig(window_steps=10, max_grad_norm_ratio=10.0, max_consecutive_skips=3))
    assert all(judge(guard, step, norm) is None for step, norm in enumerate(norms))
    again = StepGuard(guard.config)
    again.load_state(guard.state())
    step = len(norms)
    for one in (guard, again):
        assert one.limit(step) == 10 * statistics.median(norms[-11:-1])  # the last one is not known in time
        assert one.limit(step + 1) == 10 * statistics.median(norms[-10:])
        assert judge(one, step, size * 2.0) is not None
        assert judge(one, step + 1, 1.0, loss=math.nan) is not None and not one.needs_rollback
        assert judge(one, step + 2, math.inf) is not None and one.needs_rollback
        assert one.skipped_steps == 3 and list(one.grad_norms.values())[-10:] == norms[-10:]
        assert judge(one, step + 3, 1.0) is None and not one.needs_rollback


@given(st.lists(st.booleans(), min_size=30, max_size=60), st.randoms())
def test_when_the_host_learns_of_a_step_makes_no_difference(late: list[bool], random: Any) -> None:
    """The limits of a run whose host reads results at once are those of one whose host reads some a step later."""
    norms = [random.choice([1.0, 2.0, 3.0, 99.0]) for _ in late]
    limits = []
    for is_late in ([False] * len(late), late):
        guard = StepGuard(StabilityConfig(window_steps=5, max_grad_norm_ratio=10.0))
        unread: list[tuple[int, float, bool]] = []
        limits.append([])
        for step, norm in enumerate(norms):
            limits[-1].append(guard.limit(step))
            unread.append((step, norm, norm > guard.limit(step)))
            while len(unread) > is_late[step]:
                earlier, value, is_skipped = unread.pop(0)
                guard.observe(earlier, 1.0, value, is_skipped=is_skipped)
    assert limits[0] == limits[1] and len(set(limits[0])) > 1


def test_a_guard_without_ratio_accepts_finite_norms() -> None:
    guard = StepGuard(StabilityConfig(max_grad_norm_ratio=0.0, window_steps=2))
    assert all(judge(guard, step, norm) is None for step, norm in enumerate((1.0, 1.0, 1e9)))
    assert judge(guard, 3, 1.0, loss=math.inf)


def test_an_alarm_waits_for_growth_and_repeats_after_as_much() -> None:
    alarm = DivergenceAlarm(StabilityConfig(window_steps=10, max_output_norm_growth=2.0), warmup_steps=5)
    reported = [step for step in range(200) if alarm.check_output_norm(step, 1.05**step)]
    apart = math.log(2) / math.log(1.05)
    assert 25 < reported[0] < 25 + apart + 2
    assert all(abs(later - earlier - apart) < 2 for earlier, later in pairwise(reported))
    steady = DivergenceAlarm(StabilityConfig(window_steps=10))
    assert not any(steady.check_output_norm(step, 5 + math.sin(step)) for step in range(200))
    quiet = DivergenceAlarm(StabilityConfig(window_steps=10, alarms=False))
    assert not any(quiet.check_output_norm(step, 2.0**step) for step in range(200))
    assert steady.check_attention_logit(99.0, 3) is None
    assert "layer 3" in (steady.check_attention_logit(101.0, 3) or "") and steady.check_attention_logit(140.0, 3) is None
    assert "drifted" in (steady.check_log_z(-31.0, "image") or "")
    assert steady.check_log_z(1.0, "text") is None and steady.check_log_z(-32.0, "image") is None  # told once


def test_a_slow_process_is_told_of_once_it_stays_slow() -> None:
    alarm = DivergenceAlarm(StabilityConfig(max_slowdown=1.5))
    assert [alarm.check_slowest_process(3, ratio) for ratio in (2.0, 2.0, 1.2, 2.0, 2.0)] == [None] * 5
    assert alarm.check_slowest_process(1, 2.0) is None  # another one
    assert alarm.check_slowest_process(1, 2.0) is None
    assert "process 1 takes 2.0 times" in (alarm.check_slowest_process(1, 2.0) or "")
    assert alarm.check_slowest_process(1, 2.0) is None  # told


def spoil(monkeypatch: pytest.MonkeyPatch, bad: set[int], stop: int = -1) -> list[tuple[int, int]]:
    """Losses of the batches `bad` are not numbers; what is given back fills with (step, batch). Step `stop` fails once."""
    seen: list[tuple[int, int]] = []
    step = LanguageModule.training_step

    def spoiled(module: LanguageModule, batch: Any, number: int) -> None:
        seen.append((module.completed_steps, module.batches_seen))
        if len(seen) == stop:
            raise RuntimeError("killed")
        if module.batches_seen in bad:
            batch = batch._replace(loss_weights=batch.loss_weights * math.nan)
        step(module, batch, number)

    monkeypatch.setattr(LanguageModule, "training_step", spoiled)
    return seen


def test_a_step_that_is_not_finite_is_skipped(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.max_steps=6", "run.log_every_n_steps=1"])
    spoil(monkeypatch, {3})
    bundle, _ = train(recipe)
    assert bundle is not None and all(value.isfinite().all() for value in bundle.model.state_dict().values())
    log = rows(tmp_path / "run")
    assert [float(row["stability/skipped_steps"]) for row in log] == [0, 0, 0, 1, 1, 1]
    assert [float(row["monitor/update_ratio"]) > 0 for row in log] == [True, True, True, False, True, True]
    (event,) = events(tmp_path / "run")
    assert event["step"] == 4 and "loss is nan" in event["text"] and "batch 3: rows shards" in event["text"]


def test_a_run_rolls_back_and_skips_the_batches(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches 5, 6 and 7 are bad: from the checkpoint of step 4 on with batch 8. Killed later, it ends the same."""
    settings = [
        "run.max_steps=9",
        "run.log_every_n_steps=1",
        "run.save_every_n_steps=4",
        "stability.max_consecutive_skips=3",
    ]
    path = recipe_file(tmp_path, tokenizer)
    whole = read_recipe(PretrainRecipe, path, [*settings, f"run.out={tmp_path}/whole"])
    with monkeypatch.context() as patch:
        seen = spoil(patch, {5, 6, 7})
        bundle, _ = train(whole)
    assert seen == [(n, n) for n in range(8)] + [(4 + n, 8 + n) for n in range(5)]
    assert [event["kind"] for event in events(tmp_path / "whole")] == ["skipped step"] * 3 + ["rollback"]
    assert float(rows(tmp_path / "whole")[-1]["stability/skipped_steps"]) == 3
    killed = read_recipe(PretrainRecipe, path, [*settings, f"run.out={tmp_path}/killed"])
    with monkeypatch.context() as patch:
        spoil(patch, {5, 6, 7}, stop=13)
        with pytest.raises(RuntimeError, match="killed"):
            train(killed)
    killed.run.resume = True
    seen = spoil(monkeypatch, {5, 6, 7})
    again, _ = train(killed)
    assert seen == [(8, 12)]
    assert bundle is not None and again is not None
    for name, value in bundle.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def only_checkpoint(run: Path) -> int:
    """The step of the one checkpoint that a run has."""
    (folder,) = (run / "checkpoints").iterdir()
    return int(folder.name.removeprefix("step-"))


def test_a_run_that_is_ended_while_steps_are_skipped_writes_a_checkpoint(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From batch 4 on all are skipped; the run goes on after the last of them."""
    changes = ["run.max_steps=30", "stability.max_consecutive_skips=0"]
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), changes)
    with monkeypatch.context() as patch:
        seen = spoil(patch, set(range(4, 99)))
        spoiled = LanguageModule.training_step

        def ended(module: LanguageModule, batch: Any, number: int) -> None:
            module.requests["stop"] = number == 8
            spoiled(module, batch, number)

        patch.setattr(LanguageModule, "training_step", ended)
        with pytest.raises(SystemExit):
            train(recipe)
    stored_step = only_checkpoint(tmp_path / "run")
    assert stored_step == len(seen) < 12
    recipe.run.resume = True
    seen = spoil(monkeypatch, set())
    train(recipe)
    assert seen[0] == (stored_step, stored_step)


def test_a_checkpoint_that_is_due_while_steps_are_skipped_comes_later(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["run.max_steps=12", "run.save_every_n_steps=6", "run.save_every_n_minutes=0"]
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), changes)
    spoil(monkeypatch, {4, 5})
    train(recipe)
    assert 6 < only_checkpoint(tmp_path / "run") <= 9


def test_without_a_checkpoint_to_roll_back_to_it_raises(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["run.max_steps=9", "run.save_every_n_minutes=0", "stability.max_consecutive_skips=2"]
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), changes)
    spoil(monkeypatch, {4, 5})
    with pytest.raises(BadInput, match="2 steps in a row were skipped"):
        train(recipe)


def test_repeated_rollbacks_end_the_run(tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["run.max_steps=60", "run.save_every_n_steps=4", "stability.max_consecutive_skips=2"]
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), changes)
    seen = spoil(monkeypatch, set(range(5, 120)))
    with pytest.raises(BadInput, match="3 rollbacks did not help"):
        train(recipe)
    # The host learns of the second bad step while a third one runs.
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 4, 5, 6, 4, 5, 6]


def test_output_norm_alarm_precedes_divergence(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """A rate that grows without end, as in a search for the largest one: first the norm grows, then the loss."""
    ramp = "optimizer={lr: 0.003, warmup_steps: 2, eps: 1.0e-8, min_lr_ratio: 300.0, max_grad_norm: 0}"
    changes = ["run.max_steps=400", "run.log_every_n_steps=1", "model.qk_norm=false", "z_loss=0", "num_samples=0"]
    changes += ["stability={window_steps: 20, max_grad_norm_ratio: 0, max_consecutive_skips: 0}"]
    path = recipe_file(tmp_path, tokenizer)
    train(read_recipe(PretrainRecipe, path, [*changes, ramp]))
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "run")]
    blown = next(step for step, loss in enumerate(losses) if step > 50 and loss > min(losses[:step]) + 0.5)
    reported = [event for event in events(tmp_path / "run") if event["text"].startswith("output norm has grown")]
    assert reported[0]["step"] < blown - 10
    train(read_recipe(PretrainRecipe, path, [*changes, "run.max_steps=150"]))
    assert events(tmp_path / "run") == []


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_logits_are_those_of_the_formula(kv_heads: int) -> None:
    model = random_model(20, layers=2, kv_heads=kv_heads)
    ids = torch.randint(0, 20, (3, 300))
    documents = torch.randint(0, 2, (3, 300)).sort(dim=1).values
    watch = AttentionLogitMonitor(model)
    with torch.no_grad():
        with watch.recording(documents):
            model(ids, mask=block_diagonal_causal_mask(documents))
        x, turn = model.embed(ids), rope_cos_sin(torch.arange(300).expand(3, 300), 8, model.config.rope_theta)
        for layer, block in enumerate(model.blocks):
            a = block.attention
            q, k, _ = a.qkv(block.attention_norm(x)).view(3, 300, -1, 8).split((4, kv_heads, kv_heads), dim=2)
            q, k = (apply_rope(norm(part), *turn).transpose(1, 2) for norm, part in ((a.q_norm, q), (a.k_norm, k)))
            logits = torch.einsum("bhqc,bhkc->bhqk", q, k.repeat_interleave(4 // kv_heads, dim=1)) / math.sqrt(8)
            expected = logits.masked_fill(~block_diagonal_causal_mask(documents), -math.inf).max()
            torch.testing.assert_close(watch.largest[layer], expected)
            x = block(x, turn, block_diagonal_causal_mask(documents))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_share_of_an_update() -> None:
    model = random_model(20).requires_grad_(True)
    watch = UpdateRatioMonitor(model)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(watch.ratio(), (before * 0.1).norm() / (before * 1.1).norm())
