"""Bundles, recipes, training and the command: what is saved comes back, and what is wrong is named."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_file
from PIL import Image as PILImage

from chameleon import bundle as bundle_module
from chameleon import tensor_files
from chameleon.average import average
from chameleon.bundle import SHIPPED, Bundle
from chameleon.cli import main
from chameleon.device import supports_packed_bfloat16
from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.streaming import complete_utf8_length
from chameleon.model.fastest_format import candidates
from chameleon.model.transformer import Transformer
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.optimizer import OptimizerConfig, lr_at
from chameleon.train.recipe import (
    FinetuneRecipe,
    PretrainRecipe,
    RunConfig,
    read_recipe,
)
from chameleon.train.run import train
from chameleon.train.trainer import build_trainer, effective_precision


def test_a_bundle_comes_back(bundle: Bundle, bundle_folder: Path) -> None:
    again = Bundle.load(bundle_folder, dtype=torch.float32)
    assert again.vocabulary == bundle.vocabulary
    assert again.prompting == "conversation"
    assert again.tokenizer.fingerprint == bundle.tokenizer.fingerprint
    for name, value in bundle.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value.bfloat16().float())


def test_an_average_is_the_weighted_mean(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle.save(tmp_path / "a")
    before = Bundle.load(tmp_path / "a", dtype=torch.float32)
    with torch.no_grad():
        for value in bundle.model.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    bundle.provenance = {"kind": "the later one", "training": [{"recipe": "first"}], "evaluation": {"of": "the later one"}}
    bundle.save(tmp_path / "b", dtype=torch.float32)
    after = Bundle.load(tmp_path / "b", dtype=torch.float32)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    main(["average", *both, "--weights", "1", "3", "--out", str(tmp_path / "mean"), "--json"])
    summary = json.loads(capsys.readouterr().out)
    mean = Bundle.load(tmp_path / "mean", dtype=torch.float32)
    for name, value in mean.model.state_dict().items():
        interpolated = torch.lerp(before.model.state_dict()[name], after.model.state_dict()[name], 0.75)
        assert torch.allclose(value, interpolated, atol=1e-6)
    assert mean.provenance["kind"] == "the later one" and mean.tokenizer.fingerprint == after.tokenizer.fingerprint
    parents = [{"bundle": before.fingerprint, "weight": 0.25}, {"bundle": after.fingerprint, "weight": 0.75}]
    image_files = [(tmp_path / name / "image_tokenizer.safetensors").read_bytes() for name in ("b", "mean")]
    assert image_files[0] == image_files[1]
    assert summary["average_of"] == parents and "evaluation" not in mean.provenance
    assert mean.provenance["training"] == [{"recipe": "first"}, {"average_of": parents}]
    main(["average", *[str(tmp_path / "b")] * 3, "--out", str(tmp_path / "same")])
    same = Bundle.load(tmp_path / "same", dtype=torch.float32).model.state_dict()
    assert all(torch.allclose(same[name], value, atol=1e-7) for name, value in after.model.state_dict().items())


def test_an_average_keeps_the_training_of_siblings(bundle: Bundle, tmp_path: Path) -> None:
    """A stage before the last bundle is in that one's record; another branch is not, and its data have licences too."""
    stages = {"base": ["pretrain"], "left": ["pretrain", "left"], "right": ["pretrain", "right"]}
    for name, recipes in stages.items():
        bundle.provenance = {"training": [{"recipe": recipe} for recipe in recipes]}
        bundle.save(tmp_path / name)
    average_of = average([tmp_path / name for name in stages], tmp_path / "mean")["average_of"]
    assert [record.get("training") for record in average_of] == [None, [{"recipe": "pretrain"}, {"recipe": "left"}], None]


def test_dropout_may_differ_between_bundles_that_are_averaged(bundle: Bundle, tmp_path: Path) -> None:
    bundle.save(tmp_path / "finetuned")
    bundle.model.config = replace(bundle.model.config, dropout=0.1)
    bundle.save(tmp_path / "pretrained")
    average([tmp_path / "pretrained", tmp_path / "finetuned"], tmp_path / "mean")
    assert Bundle.load(tmp_path / "mean").model.config.dropout == 0


def test_bundles_that_do_not_go_together_are_not_averaged(bundle: Bundle, bundle_folder: Path, tmp_path: Path) -> None:
    def refused(*bundles: Path, weights: tuple[float, ...] | None = None) -> str:
        with pytest.raises(BadInput) as error:
            average(bundles, tmp_path / "mean", weights)
        assert not (tmp_path / "mean").exists()
        return str(error.value)

    message = refused(SHIPPED, bundle_folder)
    assert str(SHIPPED) in message and "layers" in message and "vocabulary" in message
    other_codes = Bundle(bundle.model, copy.deepcopy(bundle.tokenizer))
    with torch.no_grad():
        next(other_codes.tokenizer.image.network.parameters()).add_(1)
    other_codes.save(tmp_path / "other codes")
    assert "they differ in tokenizers" in refused(tmp_path / "other codes", bundle_folder)
    deeper = replace(bundle.model.config, layers=bundle.model.config.layers + 1)
    Bundle(Transformer(deeper), bundle.tokenizer).save(tmp_path / "deeper")
    assert refused(tmp_path / "deeper", bundle_folder).endswith("they differ in layers")
    assert "give 2 or more" in refused(bundle_folder)
    with pytest.raises(BadInput, match="is there already"):
        average([bundle_folder, bundle_folder], bundle_folder)
    for weights in ((), (1.0,), (1.0, 2.0, 3.0)):
        assert f"{len(weights)} weights for 2 bundles" in refused(bundle_folder, bundle_folder, weights=weights)
    for weights in ((1.0, -1.0), (float("nan"), 1.0), (float("inf"), 1.0)):
        assert "their sum must be above 0 and finite" in refused(bundle_folder, bundle_folder, weights=weights)


def test_big_models_are_saved_in_several_files(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 20_000)
    bundle.save(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 1
    again = Bundle.load(tmp_path / "b")
    assert torch.equal(again.model.head.weight, bundle.model.head.weight.bfloat16())


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "text_tokenizer.model", "image_tokenizer.safetensors"]
)
def test_missing_and_altered_files_are_named(bundle_folder: Path, name: str) -> None:
    path = bundle_folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadInput, match=f"{name}: file was altered"):
        Bundle.load(bundle_folder)
    path.unlink()
    with pytest.raises(BadInput, match=f"{name}: file is missing"):
        Bundle.load(bundle_folder)


def test_bundles_that_do_not_fit_together_are_refused(bundle_folder: Path) -> None:
    def rewrite(name: str, change: Callable[[dict[str, Any]], object]) -> None:
        path = bundle_folder / name
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    def load() -> None:
        Bundle.load(bundle_folder, verify=False)

    load()
    rewrite("config.json", lambda value: value["vocabulary"].update(grid=[2, 8]))
    with pytest.raises(BadInput, match=r"vocabulary has \(2, 8\) codes per image, the tokenizers have \(4, 4\)"):
        load()
    rewrite("config.json", lambda value: value.pop("vocabulary"))
    with pytest.raises(BadInput, match="no key vocabulary"):
        load()
    rewrite("provenance.json", lambda value: value.pop("sha256"))
    with pytest.raises(BadInput, match="no checksums"):
        Bundle.load(bundle_folder)


def test_a_weight_map_names_files_of_its_folder_only(bundle: Bundle, bundle_folder: Path) -> None:
    (bundle_folder / "model.safetensors").unlink()
    (bundle_folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}')
    with pytest.raises(BadInput, match="must name files of this folder"):
        Bundle.load(bundle_folder, verify=False)


def test_a_full_disk_leaves_what_was_there(bundle: Bundle, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in bundle_folder.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "write_safetensors", full)
    with pytest.raises(BadInput, match="No space left"):
        bundle.save(bundle_folder)
    assert {path.name: path.read_bytes() for path in bundle_folder.iterdir()} == before
    assert [path.name for path in bundle_folder.parent.iterdir()] == [bundle_folder.name]


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_used_where_it_is_fast(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    for place in ("chameleon.model.fastest_format", "chameleon.train.trainer"):
        monkeypatch.setattr(f"{place}.fast_bfloat16", lambda *_: fast)
    assert ("bfloat16" in {form.dtype for form in candidates()}) == supports_packed_bfloat16()
    plain = Chameleon.load(bundle_folder, weight_format="plain")  # its dtype is not measured
    assert plain.model.head.weight.dtype == (torch.bfloat16 if fast else torch.float32)
    assert Chameleon.load(bundle_folder, dtype="bfloat16").model.head.weight.dtype == torch.bfloat16
    run = RunConfig(out=str(bundle_folder.parent / "run"), accelerator="cpu")
    if fast:
        assert effective_precision(run) == build_trainer(run).precision == "bf16-mixed"
    else:
        with pytest.warns(UserWarning, match="slow on this processor: 32-true instead of bf16-mixed"):
            assert effective_precision(run) == build_trainer(run).precision == "32-true"
    with pytest.raises(BadInput, match="float16 is for inference"):
        build_trainer(replace(run, precision="16-mixed"))


def test_unknown_and_wrong_keys_are_named(tmp_path: Path) -> None:
    for key, near in (
        ("global_batch_sise", "global_batch_size"),
        ("run.max_stepz", "run.max_steps"),
        ("optimizer.lrr", "optimizer.lr"),
    ):
        with pytest.raises(BadInput, match=f"unknown key {key}; did you mean {near}"):
            read_recipe(PretrainRecipe, "demo-pretrain", [f"{key}=1"])
    path = tmp_path / "r.yaml"
    path.write_text("mixture:\n  - {shard: x}\n")
    with pytest.raises(BadInput, match=r"r\.yaml: unknown key mixture\.shard; did you mean mixture\.shards"):
        read_recipe(PretrainRecipe, path)
    with pytest.raises(BadInput, match="global_batch_size"):
        read_recipe(PretrainRecipe, "demo-pretrain", ["global_batch_size=many"])
    with pytest.raises(BadInput, match="no such recipe"):
        read_recipe(PretrainRecipe, "nothing")


def test_learning_rates_follow_the_paper() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="exponential", min_lr_ratio=0.01)
    assert lr_at(0, 110, config) == pytest.approx(0.1)
    assert lr_at(10, 110, config) == pytest.approx(1.0)
    assert lr_at(60, 110, config) == pytest.approx(0.1)
    assert lr_at(110, 110, config) == pytest.approx(0.01)
    cosine = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="cosine", min_lr_ratio=0.0)
    assert lr_at(50, 100, cosine) == pytest.approx(0.5)


def test_training_learns_and_micro_batches_change_nothing(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    path = recipe_file(tmp_path, tokenizer)
    whole, figures = train(read_recipe(PretrainRecipe, path, ["run.max_steps=60"]))
    changes = ["run.max_steps=60", "micro_batch_size=1", f"run.out={tmp_path / 'micro'}"]
    micro, _ = train(read_recipe(PretrainRecipe, path, changes))
    chance = math.log(tokenizer.vocabulary.size)
    assert figures["train/image_loss"] < chance / 2
    assert figures["train/text_loss"] < chance / 2
    for first, second in zip(whole.model.parameters(), micro.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=2e-4, rtol=2e-3)
    assert (tmp_path / "run" / "log" / "metrics.csv").is_file()
    assert Bundle.load(tmp_path / "run" / "bundle").provenance["training"][0]["recipe"]["global_batch_size"] == 4
    tuned, _ = train(
        read_recipe(
            FinetuneRecipe,
            path,
            ["tokenizers=null", "size=null", "model={}", f"bundle={tmp_path / 'run' / 'bundle'}", "run.max_steps=2"],
        )
    )
    assert tuned.prompting == "conversation"


def test_shards_of_other_tokenizers_stop_training(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    path = recipe_file(tmp_path, tokenizer)
    description = tmp_path / "shards" / "s" / "shard.json"
    value = json.loads(description.read_text())
    description.write_text(json.dumps({**value, "fingerprint": "other"}))
    with pytest.raises(BadInput, match="written with tokenizers other"):
        train(read_recipe(PretrainRecipe, path))


def test_api_on_a_random_model(chameleon: Chameleon) -> None:
    picture = PILImage.new("RGB", (16, 16), "red")
    assert isinstance(chameleon.caption(picture), str)
    assert isinstance(chameleon.answer(picture, "what is it?"), str)
    assert chameleon.draw("orange heart", seed=3).size == (16, 16)
    document = Document((Text("a"), Image(picture)))
    output = chameleon.generate(document, max_new_tokens=40)
    streamed = Document(tuple(chameleon.stream(document, max_new_tokens=40)))
    assert streamed.text == output.text
    assert len(streamed.images) == len(output.images)
    ids = chameleon.encode(document)
    assert chameleon.logits(ids[None]).shape == (1, len(ids), chameleon.vocabulary.size)
    with pytest.raises(BadInput, match="shorten it"):
        chameleon.answer(picture, "what is it? " * 100)


def test_complete_utf8_length_never_splits_a_character() -> None:
    text = "aé漢🧑‍🚀"
    data = text.encode()
    for end in range(len(data) + 1):
        whole = complete_utf8_length(data[:end])
        assert text.startswith(data[:whole].decode())
        assert end - whole < 4
    assert complete_utf8_length(b"\xff") == 1


def test_command_on_a_bundle(bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = tmp_path / "p.png", tmp_path / "o.png"
    PILImage.new("RGB", (16, 16), "red").save(picture)
    options = ["--model", str(bundle_folder), "--json"]
    main(["caption", str(picture), *options])
    assert json.loads(capsys.readouterr().out)[0]["image"] == str(picture)
    main(["answer", str(picture), "what is it?", *options])
    assert "answer" in json.loads(capsys.readouterr().out)
    for asked in (["caption", str(picture)], ["answer", str(picture), "what is it?"]):
        with pytest.raises(SystemExit):
            main([*asked, "--views", "33", *options])
        assert "33 views; use 1 to 32" in capsys.readouterr().err
    main(["draw", "heart", "--out", str(out), *options])
    assert PILImage.open(out).size == (16, 16)
    capsys.readouterr()
    document = tmp_path / "d.json"
    document.write_text('{"parts": [{"type": "text", "text": "orange"}]}')
    main(["generate", str(document), "--max-new-tokens", "30", *options])
    assert "parts" in json.loads(capsys.readouterr().out)
    main(["--json", "info", str(bundle_folder)])  # before the verb, as after it
    assert json.loads(capsys.readouterr().out)["image codes"] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "none.png"], "none.png: no such image"),
        (["caption"], "required"),
        (["draw", "x", "--out", "x.xyz"], "not the extension of an image"),
        (["info", "nowhere"], "no such folder"),
        (["pretrain", "--config", "demo-pretrain", "global_batch_sise=1"], "did you mean global_batch_size"),
        (["tokenize", "nothing*.tar", "--out", "x"], "no file matches"),
        (["generate", "none.json"], "no such file"),
        (["evaluate", "emoji", "parts=[nothing]"], "use reconstruction"),
        (["evaluate", "emoji", "concepts=1"], "use more"),
        (["evaluate", "emoji", "views=0"], "use 1 to 32"),
        (["evaluate", "emoji", "views=2", "--server", "http://127.0.0.1:9"], "leave out --server"),
        (["evaluate", "emoji", "--again", "x.json"], "x.json: file is missing"),
        (["compare", "x.json", "y.json"], "x.json: file is missing"),
        (["study", "nowhere"], "no study here"),
        (["pretrain", "--config", "demo-pretrain", "run.out=[a"], "not YAML"),
        (["pretrain", "--config", "demo-pretrain", "tokenizers=x", "model={widht: 3}"], "did you mean model.width"),
        (["info", "--json", "."], "no token shard"),
        (["generate", "."], "Is a directory"),
        (["draw", "x", "--out", "x.psd"], "not the extension of an image"),
        (["draw", "x", "--out", "x.png", "--device", "gpu"], "cannot be used"),
        (["draw", "x", "--out", "x.png", "--temperature", "-1"], "must be 0 (greedy) or more"),
        (["tokenize", "emoji:pairs?concepts=abc", "--out", "x"], "option is not a number"),
        (["tokenize", "emoji:words", "--out", "/proc/x"], "could not be written"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""


def test_the_shipped_bundle_loads(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(SHIPPED, copy)
    bundle = Bundle.load(copy)
    assert bundle.prompting == "conversation"
    assert bundle.provenance["evaluation"]["reconstruction / psnr_db"]["value"] > 20
