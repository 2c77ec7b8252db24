"""What one sees of a run, and what is said where one cannot be: memory, devices, disk, other optimisers."""

from __future__ import annotations

import io
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, recipe_file
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounter

from chameleon import progress
from chameleon.cli import main
from chameleon.errors import BadInput
from chameleon.model.activation_checkpointing import apply_activation_checkpointing
from chameleon.model.document_attention import document_attention, document_groups
from chameleon.model.transformer import block_diagonal_causal_block_mask, block_diagonal_causal_mask, rope_cos_sin
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train import checkpoint, checkpoint_files, memory, trainer
from chameleon.train.recipe import PretrainRecipe, read_recipe
from chameleon.train.run import train


def test_a_run_shows_its_state_its_curves_and_what_the_model_makes(
    tmp_path: Path, tokenizer: MixedTokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=shown, width=400))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    path = recipe_file(tmp_path, tokenizer)
    shutil.copytree(tmp_path / "shards", tmp_path / "others")
    mixture = f"mixture=[{{shards: {tmp_path}/shards}}, {{shards: {tmp_path}/others}}]"
    settings = [
        "run.max_steps=12",
        "run.log_every_n_steps=2",
        "run.validate_every_n_steps=4",
        "run.save_every_n_steps=5",
        "run.progress=true",
    ]
    main(["pretrain", "--config", str(path), *settings, mixture, f"validation=[{{shards: {tmp_path}/shards}}]"])
    run = tmp_path / "run"
    lines = shown.getvalue().splitlines()
    assert len(lines) == 12 and lines[4].startswith("step 5 of 12, loss ")
    assert all(word in lines[4] for word in ("text ", "image ", "tokens/s", "left", "validation text"))
    capsys.readouterr()
    main(["info", str(run), "--json"])
    message = json.loads(capsys.readouterr().out)
    assert (message["state"], message["step"]) == ("finished", "12 of 12")
    assert message["checkpoints"] == ["step-00000005", "step-00000010"]
    assert {"source/shards_loss", "source/others_loss", "train/image_log_z", "validation/text_loss"} <= message.keys()
    with PILImage.open(message["curves"]) as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").getdata())) > 50
    log = EventAccumulator(str(run / "log"))
    log.Reload()
    assert log.Tags()["images"] == ["samples/drawing_0", "samples/drawing_1"]
    drawn = log.Images("samples/drawing_0")
    assert [event.step for event in drawn] == [4, 8, 12] and (drawn[0].width, drawn[0].height) == (32, 16)
    assert "samples/caption_1/text_summary" in log.Tags()["tensors"]
    shutil.rmtree(run / "bundle")
    main(["info", str(run)])
    assert "not finished" in capsys.readouterr().out
    (run / "log" / "metrics.csv").unlink()
    with pytest.raises(SystemExit):
        main(["info", str(run)])
    assert "nothing is logged yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run.devices=3", "run.accelerator=cpu"], r"global_batch_size 4 is not divisible by 3 devices; 3 is"),
        (
            ["run.devices=3", "run.accelerator=cpu", "run.data_parallel=fsdp", "run.tensor_parallel_size=2"],
            "3 devices are not divisible by 2",
        ),
        (["run.tensor_parallel_size=2"], "tensor parallelism needs fsdp"),
        (["attention=flex", "run.accelerator=cpu"], "flex needs a GPU"),
        (["attention=flex", "run.accelerator=cuda", "activation_checkpointing=full"], "flex does not go with activation"),
        (["run.devices=0"], "neither auto nor a number"),
        (["run.accelerator=gpu"], "no GPU here; set run.accelerator=cpu"),
        (["run.data_parallel=fsdp", "model.tied_head=true", "run.devices=1"], "a tied head cannot be sharded"),
        (["run.precision=16-mixed"], "float16 is for inference"),
        (["run.data_parallel=fsdp", "run.precision=64-true"], "64-true does not go with fsdp"),
    ],
)
def test_devices_that_are_not_there_or_do_not_divide(
    changes: list[str], message: str, tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(trainer, "uses_gpus", lambda run: run.accelerator == "gpu")
    with pytest.raises(BadInput, match=message):
        train(read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), changes))


def test_more_gpus_than_there_are(tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.accelerator=gpu", "run.devices=8"])
    with pytest.raises(BadInput, match=r"the recipe asks for 8 GPUs, there are 2; set run\.devices=2"):
        train(recipe)


def test_what_does_not_fit_says_by_how_much(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_per_process", lambda *_: 1e6)
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.max_steps=1"])
    with pytest.raises(
        BadInput, match=r"GB more than the 0\.0 GB that it has; try micro_batch_size=2, activation_checkpointing=full, run"
    ):
        train(recipe)
    recipe.run.force = True
    train(recipe)


def test_out_of_memory_is_one_line(tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr("chameleon.train.language_module.LanguageModule.training_step", full)
    with pytest.raises(BadInput, match=r"out of memory \(CUDA out of memory\); lower micro_batch_size"):
        train(read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer)))


def test_no_room_for_a_checkpoint_keeps_what_is_there(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.max_steps=9", "run.save_every_n_steps=2"])
    usage = namedtuple("usage", "total used free")
    calls: list[int] = []

    def free(_: object) -> usage:
        calls.append(1)
        return usage(0, 0, 10**9 if len(calls) < 3 else 1000)

    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", free)
    with pytest.raises(BadInput, match=r"a checkpoint takes .* GB, 0\.00 GB are free; free some space; earlier"):
        train(recipe)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]


def test_force_resumes_with_another_optimizer(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.max_steps=5", "run.save_every_n_steps=3"])
    train(recipe)
    recipe.run.resume, recipe.optimizer.kind = True, "muon"
    with pytest.raises(BadInput, match=r"optimizer\.kind from adamw to muon"):
        train(recipe)
    recipe.run.force = True
    with pytest.warns(UserWarning, match="another optimizer"):
        bundle, _ = train(recipe)
    assert bundle is not None


def test_blocks_attend_as_the_mask_does() -> None:
    """FlexAttention over blocks, run uncompiled, gives what the dense mask gives; it learns on GPUs only."""
    model = random_model(30, kv_heads=2)
    ids = torch.randint(0, 30, (2, 300))
    documents = torch.randint(0, 3, (2, 300)).sort(dim=1).values
    with torch.no_grad():
        one, other = (
            model(ids, mask=mask)
            for mask in (block_diagonal_causal_mask(documents), block_diagonal_causal_block_mask(documents))
        )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=3), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_documents_attend_by_themselves_as_with_the_mask(rows: list[list[int]], kv_heads: int) -> None:
    """Outputs and gradients equal those of the dense mask, in all precisions and where documents reach to a row's end."""
    length = max(map(sum, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, lengths in zip(ids, rows, strict=True):
        documents = torch.arange(len(lengths) + 1).repeat_interleave(torch.tensor([*lengths, length - sum(lengths)]))
        row.copy_(documents)
    generator = torch.Generator().manual_seed(length)
    q, k, v, weights = (
        torch.randn(len(rows), heads, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    mask, groups = block_diagonal_causal_mask(ids), document_groups(ids)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    gradients = torch.autograd.grad((exact * weights).sum(), (q, k, v))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 6e-2)):
        got = document_attention(q.to(dtype), k.to(dtype), v.to(dtype), groups)
        assert got.dtype == dtype
        got_gradients = torch.autograd.grad((got * weights).sum(), (q, k, v))
        for one, other in zip((got, *got_gradients), (exact, *gradients), strict=True):
            torch.testing.assert_close(
                one.double(), other, atol=tolerance * (1 + float(other.detach().abs().max())), rtol=0
            )


@pytest.mark.parametrize("how", ["selective", "full"])
def test_what_is_computed_again_gives_the_same_gradients(how: str) -> None:
    ids = torch.randint(0, 30, (2, 9))
    grads = []
    for kind in ("none", how):
        model = random_model(30, dropout=0.3).requires_grad_(True).train()
        for block in model.blocks:
            apply_activation_checkpointing(block, kind)  # type: ignore[arg-type]
        torch.manual_seed(5)
        model(ids).square().sum().backward()
        grads.append([parameter.grad for name, parameter in model.named_parameters() if name != "head.weight"])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_compiled_blocks_see_into_what_is_computed_again() -> None:
    counter = CompileCounter()
    block = random_model(30).blocks[0].requires_grad_(True)
    apply_activation_checkpointing(block, "full")
    block.compile(backend=counter)
    block(torch.randn(1, 5, 32), rope_cos_sin(torch.arange(5)[None], 8, 1e4)).sum().backward()
    assert counter.op_count > 0  # what is computed again counts as one


def test_a_tied_head_is_trained(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    changes = ["model.tied_head=true", "run.max_steps=30"]
    bundle, figures = train(read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), changes))
    assert bundle is not None and bundle.model.head.weight is bundle.model.embed.weight
    assert figures["train/image_loss"] < 3.5
    path = f"bundle={tmp_path / 'run' / 'bundle'}"
    more = [path, "tokenizers=null", "size=null", "model={}", "run.max_steps=2", f"run.out={tmp_path / 'on'}"]
    train(read_recipe(PretrainRecipe, tmp_path / "recipe.yaml", more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loss=cut"], "cut does not go with tensor parallelism"),
        (["context_length=47"], "context_length 47 is not divisible by 2 devices"),
    ],
)
def test_what_tensor_parallelism_cannot_do(
    changes: list[str], message: str, tmp_path: Path, tokenizer: MixedTokenizer
) -> None:
    path = recipe_file(tmp_path, tokenizer)
    split = ["run.devices=2", "run.data_parallel=fsdp", "run.tensor_parallel_size=2"]
    with pytest.raises(BadInput, match=message):
        train(read_recipe(PretrainRecipe, path, [*split, *changes]))


def test_a_run_that_cannot_be_resumed_keeps_its_log(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.max_steps=5", "run.save_every_n_steps=2"])
    train(recipe)
    log = tmp_path / "run" / "log" / "metrics.csv"
    before = log.read_text()
    for file in (tmp_path / "run").glob("checkpoints/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    recipe.run.resume = True
    with pytest.raises(BadInput, match="no checkpoint is complete"), pytest.warns(UserWarning, match="checksum"):
        train(recipe)
    assert log.read_text() == before and before.count("\n") >= 2


def test_a_resumed_run_that_fails_before_its_first_step_keeps_its_log(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.max_steps=5", "run.save_every_n_steps=2"])
    train(recipe)
    log = tmp_path / "run" / "log" / "metrics.csv"
    before = log.read_text()
    shard = next((tmp_path / "shards").rglob("ids*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    recipe.run.resume = True
    with pytest.raises(BadInput, match="checksum"):
        train(recipe)
    assert log.read_text() == before and before.count("\n") >= 2
    shard.write_bytes(data)
    train(recipe)
    assert [line.split(",")[-1] for line in log.read_text().splitlines()] == [
        line.split(",")[-1] for line in before.splitlines()
    ]


def test_a_resumed_run_validates_at_the_steps_of_the_whole_run(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Every 3 steps of the run, whose checkpoints are at others."""
    settings = ["run.max_steps=8", "run.validate_every_n_steps=3", "run.save_every_n_steps=4", "run.log_every_n_steps=1"]
    settings += [f"validation=[{{shards: {tmp_path}/shards}}]", "num_samples=0"]
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), settings)

    def validated_steps() -> list[int]:
        rows = checkpoint.read_log_rows(tmp_path / "run")
        return [row["step"] for row in rows if "validation/text_loss" in row]

    train(recipe)
    assert validated_steps() == [3, 6, 8]
    recipe.run.resume = True
    train(recipe)  # from step 4
    assert validated_steps() == [3, 6, 8]


def test_checkpoints_of_an_earlier_run_are_moved_aside(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.max_steps=5", "run.save_every_n_steps=2"])
    train(recipe)
    run = tmp_path / "run"
    (run / "checkpoints" / ".step-00000003.partial-1").mkdir()
    recipe.run.save_every_n_steps = 3
    train(recipe)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    before = sorted(path.name for path in (run / "checkpoints.before").iterdir())
    assert before == ["step-00000002", "step-00000004"]
    (run / "checkpoints" / "step-00000003" / "checkpoint.json").unlink()
    recipe.run.resume = True
    with pytest.raises(BadInput, match="no checkpoint is complete"), pytest.warns(UserWarning, match="is ignored"):
        train(recipe)
    recipe.run.save_total_limit = 0
    with pytest.raises(BadInput, match="save_total_limit is 0"):
        checkpoint.CheckpointCallback(recipe.run, {})


def test_a_disk_that_fills_while_a_checkpoint_is_written(
    tmp_path: Path, tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    recipe = read_recipe(PretrainRecipe, recipe_file(tmp_path, tokenizer), ["run.max_steps=5", "run.save_every_n_steps=2"])
    monkeypatch.setattr(checkpoint_files.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(BadInput, match=r"could not be written .*No space left"):
        train(recipe)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
