"""The plan against models really built, run and stepped."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint
from conftest import random_model

from chameleon.cli import main
from chameleon.errors import BadInput
from chameleon.model.config import ModelConfig, named_size
from chameleon.model.transformer import Transformer, block_diagonal_causal_mask
from chameleon.plan import TrainingSetup, plan_training, saved_bytes, training_bytes
from chameleon.train.optimizer import OptimizerConfig, build_optimizers


def small(**changes: object) -> ModelConfig:
    return replace(random_model(300).config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_gradients_and_optimizer_are_those_of_a_built_model(
    kind: str, precision: str, dtype: torch.dtype, tied: bool
) -> None:
    model = Transformer(small(tied_head=tied)).to(dtype)
    model.init_weights()
    optimizers = build_optimizers(model, OptimizerConfig(kind=kind))  # type: ignore[arg-type]
    model.logits(model(torch.zeros(1, 8, dtype=torch.int64))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    setup = TrainingSetup(context_length=8, precision=precision, optimizer=kind)  # type: ignore[arg-type]
    planned = training_bytes(model, setup)
    assert planned.parameters == sum(p.nbytes for p in model.parameters())
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert planned.optimizer == sum(value.nbytes for value in states)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 5},
        {"layers": 3, "norm_order": "swin", "kv_heads": 2, "qk_norm_shards": 2},
        {"layers": 4, "dropout": 0.1},
        {"layers": 3, "qk_norm": False},
    ],
)
def test_activations_are_what_autograd_saves(precision: str, changes: dict[str, object]) -> None:
    config, rows, context_length = small(**changes), 3, 24
    model = Transformer(config).to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    ids = torch.zeros(rows, context_length, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext():
        real = saved_bytes(lambda: model(ids, ids, block_diagonal_causal_mask(ids)), list(model.parameters()))
    planned = plan_training(
        config, TrainingSetup(micro_batch_size=rows, context_length=context_length, precision=precision)
    ).training.activations
    assert planned == pytest.approx(real, rel=0.15)


def test_checkpointing_keeps_one_block_and_the_stream_between_blocks() -> None:
    config, rows, context_length = small(layers=6), 3, 24
    model = Transformer(config)
    ids = torch.zeros(rows, context_length, dtype=torch.int64)
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *a, f=forward: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)  # type: ignore[method-assign]
    kept = saved_bytes(lambda: model(ids, ids, block_diagonal_causal_mask(ids)), list(model.parameters()))
    setup = TrainingSetup(micro_batch_size=rows, context_length=context_length, precision="32-true")
    full = plan_training(config, setup).training.activations
    planned = plan_training(config, replace(setup, activation_checkpointing="full")).training.activations
    one = (full - plan_training(replace(config, layers=1), setup).training.activations) / 5
    assert planned == pytest.approx(kept + one, rel=0.15) and planned < full / 2


def test_known_sums() -> None:
    """The figures everyone knows: 16 bytes a parameter, and the cache of LLaMA-2's shape, half a MiB per token."""
    plan = plan_training(named_size("7b", dropout=0.0), TrainingSetup())
    states = plan.training.parameters + plan.training.gradients + plan.training.optimizer
    assert states / plan.config.parameters == pytest.approx(16, rel=1e-6)
    assert named_size("7b", vocab_size=32000, qk_norm=False).parameters == 6_738_415_616  # LLaMA-2 7B
    assert plan.inference.kv_cache == 4096 * 2**19
    assert plan.flops_per_token == pytest.approx(6 * plan.config.parameters, rel=0.1)
    assert states > 80e9 and plan.spare_bytes("h100") < 80e9 - states - plan.training.activations
    # arXiv 2307.09288, table 2: LLaMA-2 7B saw 2e12 tokens in 184,320 hours of A100s, at 4,096 tokens a row.
    assert plan.days("a100", 2e12) * 24 == pytest.approx(184_320, rel=0.3)


def test_sharding_divides_and_fits() -> None:
    config = named_size("7b")
    alone = plan_training(config, TrainingSetup(activation_checkpointing="full"))
    eight = plan_training(config, TrainingSetup(activation_checkpointing="full", data_parallel="fsdp", devices=8))
    ddp = plan_training(config, TrainingSetup(activation_checkpointing="full", data_parallel="ddp", devices=8))
    for name in ("parameters", "gradients", "optimizer"):
        assert getattr(eight.training, name) == -(-getattr(alone.training, name) // 8)
        assert getattr(ddp.training, name) == getattr(alone.training, name)
    assert eight.training.activations == alone.training.activations
    assert alone.spare_bytes("h100") < 0 < eight.spare_bytes("h100")
    assert eight.tokens_per_second("h100") == 8 * alone.tokens_per_second("h100")


def test_a_thousand_devices_and_the_network() -> None:
    """By hand: what FSDP gathers and reduces, what tensor parallelism exchanges, and which of them products wait for."""
    config = named_size("7b")
    setup = TrainingSetup(activation_checkpointing="full", data_parallel="fsdp", devices=1024)
    one_row, eight_rows = (plan_training(config, replace(setup, micro_batch_size=rows)) for rows in (1, 8))
    bytes_sent = config.parameters * (2 + 2 + 4) * 1023 / 1024
    assert one_row.network_bytes() == pytest.approx(bytes_sent) == eight_rows.network_bytes()
    seconds = one_row.seconds_of_step("h100")
    assert seconds.network == pytest.approx(bytes_sent / 50e9) and seconds.limit == "network"
    assert seconds.products == pytest.approx(4096 * one_row.flops_per_token / (0.4 * 989e12))
    assert one_row.tokens_per_second("h100") == pytest.approx(1024 * 4096 / seconds.network)
    assert eight_rows.seconds_of_step("h100").limit == "products"
    once = plan_training(config, replace(setup, micro_batches=4, gradient_sync="step"))
    assert once.network_bytes() == pytest.approx(config.parameters * (4 * (2 + 2) + 4) * 1023 / 1024)
    assert once.training.gradients == one_row.training.gradients + 4 * config.parameters  # it holds all of them
    split = plan_training(config, replace(setup, tensor_parallel_size=8))
    assert split.network_bytes() == pytest.approx(config.parameters / 8 * 8 * 127 / 128)
    assert split.link_bytes() == pytest.approx(7 / 8 * 8 * 32 * 4096 * 4096 * 2)
    for name in ("parameters", "gradients", "optimizer"):  # both kinds of devices split them
        assert getattr(split.training, name) == getattr(one_row.training, name)
    for name in ("activations", "logits", "communication"):
        assert getattr(split.training, name) < getattr(one_row.training, name) / 3


def test_gradients_of_a_block_take_the_place_of_its_activations() -> None:
    """At the peak either all activations are held, or one block's less with that block's gradients."""
    config = named_size("tiny", vocab_size=300, layers=4, width=64, heads=4, kv_heads=4, ffn_width=128, context_length=64)
    with torch.device("meta"):
        model = Transformer(config)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - 4 * block
    for rows, is_large in ((1, False), (64, True)):
        setup = TrainingSetup(
            micro_batch_size=rows,
            context_length=64,
            precision="32-true",
            data_parallel="fsdp",
            devices=2,
            device_type="cpu",
        )
        planned, gathered, reduced = plan_training(config, setup).training, 4 * (root + 2 * block), 12 * block
        per_block = planned.activations // 4
        assert (per_block >= reduced) == is_large
        assert planned.communication == gathered + max(0, reduced - per_block)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp8"}, "bf16-mixed"),
        ({"devices": 2}, "ddp or fsdp"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"data_parallel": "fsdp", "devices": 6, "tensor_parallel_size": 4}, "must divide the devices"),
        ({"data_parallel": "ddp", "devices": 4, "tensor_parallel_size": 2}, "it needs fsdp"),
        ({"utilization": 1.5}, "utilization"),
    ],
)
def test_a_setup_that_cannot_be(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        TrainingSetup(**changes)  # type: ignore[arg-type]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "plan",
            "34b",
            "--data-parallel",
            "fsdp",
            "--devices",
            "64",
            "--activation-checkpointing",
            "full",
            "--micro-batch-size",
            "4",  # with one row the network is the limit
            "--tokens",
            "1e12",
            "--json",
        ]
    )
    actual = json.loads(capsys.readouterr().out)
    assert actual["parameters"] == named_size("34b").parameters and actual["setup"]["devices"] == 64
    # 64 H100s at 40% of 989 TFLOP/s, and 6 FLOPs for each parameter and token but for the attention products.
    days = 6 * 34.2e9 * 1e12 / (64 * 0.4 * 989e12) / 86400
    assert days < actual["devices"]["h100"]["days"] < 1.2 * days
    main(["plan", "7b", "--tokens", "1e12", "--device", "h100"])
    text = capsys.readouterr().out
    assert "h100      does not fit" in text and "a100" not in text and "optimizer" in text
    main(["plan", "tiny", "--tokens", "1e12", "--device", "h100"])
    assert "fits" in (text := capsys.readouterr().out) and "days" in text
    main(["plan", "emoji-pretrain", "--json"])
    actual = json.loads(capsys.readouterr().out)
    assert actual["model"]["layers"] == 8 and actual["setup"]["optimizer"] == "muon"
    for wrong, word in ((["9b"], "no such recipe or size"), (["7b", "--context-length", "9999"], "exceeds")):
        with pytest.raises(SystemExit) as exit_:
            main(["plan", *wrong])
        assert exit_.value.code == 2 and word in capsys.readouterr().err
