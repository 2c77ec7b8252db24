"""What runs on this processor: weight formats against the products they stand for, the fastest form, exact generation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from chameleon.bundle import Bundle
from chameleon.compiled_code import keep_compiled_code
from chameleon.device import has_fbgemm, supports_packed_bfloat16
from chameleon.document import Document, Text
from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import OutputConstraints
from chameleon.generation.engine import Engine
from chameleon.generation.request import Request
from chameleon.generation.sampling import GREEDY, Sampling
from chameleon.model import fastest_format, quantization
from chameleon.model.fastest_format import WeightForm, candidates, choose_weight_form, format_table
from chameleon.model.kv_cache import BatchLayout, KVCache, cache_dtype
from chameleon.model.quantization import (
    Float16Linear,
    Int4Linear,
    Int8Linear,
    Int8ProductLinear,
    PackedLinear,
    convert_weights,
    make_exact,
    make_linear,
)
from chameleon.tokenizers.mixed import MixedTokenizer

needs_fbgemm = pytest.mark.skipif(not has_fbgemm(), reason="this build of PyTorch has no FBGEMM")
needs_bfloat16 = pytest.mark.skipif(not supports_packed_bfloat16(), reason="this processor does not pack bfloat16")
FORMS = [
    WeightForm("float32", "plain"),
    WeightForm("float32", "packed"),
    pytest.param(WeightForm("float32", "float16"), marks=needs_fbgemm),
    pytest.param(WeightForm("float32", "int8"), marks=needs_fbgemm),
    WeightForm("bfloat16", "plain"),
    pytest.param(WeightForm("bfloat16", "packed"), marks=needs_bfloat16),
    WeightForm("bfloat16", "int8"),
    WeightForm("bfloat16", "int4"),
]


# --- layers ---


@pytest.mark.parametrize(
    ("dtype", "weight_format", "least", "most"),
    [
        (torch.float32, "packed", 0, 1e-6),
        pytest.param(torch.float32, "float16", 1e-5, 3e-4, marks=needs_fbgemm),
        pytest.param(torch.float32, "int8", 1e-3, 0.02, marks=needs_fbgemm),
        pytest.param(torch.bfloat16, "packed", 0, 0.004, marks=needs_bfloat16),
        (torch.bfloat16, "int8", 1e-3, 0.012),
        (torch.bfloat16, "int4", 0.02, 0.12),
    ],
)
def test_weight_formats_are_near_the_weights(dtype: torch.dtype, weight_format: Any, least: float, most: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64).to(dtype)
    layer = make_linear(weight, weight_format)
    for inputs in (torch.randn(1, 3, 64).to(dtype), torch.randn(40, 64).to(dtype)):
        expected = inputs.double() @ weight.double().T
        actual = layer(inputs).double()
        assert actual.shape == expected.shape
        assert least <= float((actual - expected).norm() / expected.norm()) < most
    if weight_format == "packed":
        assert torch.equal(layer.weight, weight)


def test_quantised_products_are_with_what_was_stored() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(48, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    layer = Int8Linear(weight)
    stored = layer.quantized.double() * layer.scales.double().unsqueeze(1)
    assert float((layer(inputs).double() - inputs.double() @ stored.T).abs().max()) < 0.02 * float(inputs.abs().sum())
    assert bool(((stored - weight.double()).abs().amax(1) <= layer.scales.double() * 0.6).all())


@needs_fbgemm
def test_float16_sums_the_rounded_weights_in_float32() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(48, 64), torch.randn(5, 64)
    layer = Float16Linear(weight)
    assert torch.equal(layer.weight, weight.half().float())
    expected = inputs.double() @ weight.half().double().T
    torch.testing.assert_close(layer(inputs).double(), expected, rtol=1e-5, atol=1e-5)


@needs_fbgemm
@pytest.mark.parametrize("max_input", [127, 63])
def test_int8_products_are_integer_sums(monkeypatch: pytest.MonkeyPatch, max_input: int) -> None:
    """Weights are rounded to steps of a 127th of their row's largest, inputs to steps of their token's."""
    monkeypatch.setattr(quantization, "max_int8_input", lambda: max_input)
    torch.manual_seed(0)
    weight, inputs = torch.randn(16, 200), torch.randn(7, 200) * torch.logspace(-3, 3, 7).unsqueeze(1)
    scales = weight.abs().amax(1, keepdim=True) / 127
    largest = inputs.abs().amax(1, keepdim=True)
    integers = (inputs / largest * max_input).round().long() @ (weight / scales).round().long().T
    expected = integers.double() * largest.double() / max_input * scales.double().T
    actual = Int8ProductLinear(weight)(inputs)
    # A value half-way between two integers may be rounded to either.
    difference = (actual.double() - expected).abs() / (largest.double() / max_input * weight.abs().amax(1).double())
    assert float(difference.max()) < 1.01
    assert float((difference > 1e-3).double().mean()) < 0.05


@needs_fbgemm
def test_int8_products_of_odd_inputs() -> None:
    weight = torch.randn(4, 8)
    layer = Int8ProductLinear(weight)
    assert not layer(torch.zeros(2, 8)).any() and not Int8ProductLinear(torch.zeros(4, 8))(torch.randn(2, 8)).any()
    assert layer(torch.zeros(0, 8)).shape == (0, 4)
    inputs = torch.randn(3, 8)
    inputs[1, 2] = torch.nan
    output = layer(inputs)
    assert not output[1].isfinite().any() and bool(output[[0, 2]].isfinite().all())


@needs_fbgemm
def test_inputs_have_7_bits_where_sums_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    product = quantization.int8_product

    def saturating(x: Tensor, packed: Any, max_input: int) -> Tensor:
        return product(x, packed, max_input).clamp(max=127 * 256 * (1.0 if max_input <= 63 else 0.9))

    quantization.max_int8_input.cache_clear()
    monkeypatch.setattr(quantization, "int8_product", saturating)
    assert quantization.max_int8_input() == 63
    monkeypatch.undo()
    quantization.max_int8_input.cache_clear()
    assert quantization.max_int8_input() in (63, 127)


# --- models ---


@pytest.mark.parametrize("form", FORMS)
def test_engines_run_on_every_weight_format(tokenizer: MixedTokenizer, form: WeightForm) -> None:
    v, dtype = tokenizer.vocabulary, getattr(torch, form.dtype)
    model, plain = (random_model(v.size, width=64, ffn_width=96).to(dtype) for _ in range(2))
    convert_weights(model, form.weight_format)
    token_ids = torch.randint(0, v.size, (2, 12))
    near = nn.functional.cosine_similarity(model(token_ids).float(), plain(token_ids).float(), dim=-1)
    assert float(near.min()) > (0.9 if form.weight_format == "int4" else 0.99)
    requests = [
        Request((v.bos, v.text_start + n, v.sep), OutputConstraints(v.dialect.length(v.grid) + 4, max_images=1), GREEDY)
        for n in range(3)
    ]
    engine = Engine(model, v, weight_format=form.weight_format)
    assert all(engine.generate(requests))
    heads = {type(part) for part in engine.decoder.heads.codes.layers + engine.decoder.heads.text.layers}
    assert heads <= {nn.Linear, PackedLinear, Float16Linear, Int8Linear, Int8ProductLinear, Int4Linear}
    assert (nn.Linear in heads) == (form.weight_format == "plain")


def test_weight_formats_that_do_not_fit_are_named(bundle_folder: Path) -> None:
    if not supports_packed_bfloat16():
        with pytest.raises(BadInput, match="does not support packed bfloat16; use float16 or int8"):
            Chameleon.load(bundle_folder, dtype="bfloat16", weight_format="packed")
    with pytest.raises(BadInput, match=r"int4 weights need dtype bfloat16, not torch\.float32"):
        Chameleon.load(bundle_folder, dtype="float32", weight_format="int4")
    with pytest.raises(BadInput, match=r"packed weights need dtype bfloat16 or float32, not torch\.float64"):
        Chameleon.load(bundle_folder, dtype="float64", weight_format="packed")
    with pytest.raises(BadInput, match="int4 needs a width divisible by 32"):
        convert_weights(random_model(20, width=48).bfloat16(), "int4")
    with pytest.raises(BadInput, match="no weight format 'int7'"):
        convert_weights(random_model(20), "int7")  # type: ignore[arg-type]


@needs_fbgemm
def test_weights_beyond_float16_are_packed_instead(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest_format, "fastest", lambda _: WeightForm("float32", "float16"))
    bundle.save(tmp_path / "small")
    with torch.no_grad():
        bundle.model.blocks[0].ffn.down.weight[0, 0] = 70_000  # type: ignore[index, union-attr]
    bundle.save(tmp_path / "large")
    assert Chameleon.load(tmp_path / "small").engine.decoder.weight_format == "float16"
    assert Chameleon.load(tmp_path / "large").engine.decoder.weight_format == "packed"
    with pytest.raises(BadInput, match=r"a weight of 7\.\d+e\+04 exceeds float16; use packed or plain"):
        Chameleon.load(tmp_path / "large", weight_format="float16")


def test_a_packed_model_can_be_saved_a_quantised_one_says_why_not(bundle_folder: Path, tmp_path: Path) -> None:
    Chameleon.load(bundle_folder, dtype="float32", weight_format="packed").bundle.save(tmp_path / "again")
    plain, again = (
        Chameleon.load(path, dtype="float32", weight_format="plain") for path in (bundle_folder, tmp_path / "again")
    )
    for one, other in zip(plain.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for weight_format in ("int8", "float16") if has_fbgemm() else ("int8",):
        with pytest.raises(BadInput, match="quantised weights are for inference only"):
            Chameleon.load(bundle_folder, weight_format=weight_format).bundle.save(tmp_path / "other")  # type: ignore[arg-type]


# --- the fastest form ---


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path / "cache"))
    format_table.cache_clear()
    yield tmp_path / "cache" / fastest_format.TABLE_FILE
    format_table.cache_clear()


def test_the_table_is_measured_once(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure() -> dict[str, list[float]]:
        measured.append(1)
        return {str(form): [1.0, 2.0, 3.0] for form in candidates()}

    monkeypatch.setattr(fastest_format, "measure", measure)
    for damage in (None, "{", '{"a": {"b": [1]}}', "[]"):
        measured.clear()
        if damage is not None:
            own_table.write_text(damage)
        for _ in range(2):
            format_table.cache_clear()
            assert set(format_table()) == {str(form) for form in candidates()}
        assert len(measured) == 1
    (key,) = json.loads(own_table.read_text())
    assert torch.__version__ in key
    assert [path.name for path in own_table.parent.iterdir()] == [own_table.name]


def test_a_cache_folder_that_cannot_be_written_is_no_error(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_table.parent.write_text("a file, not a folder")
    monkeypatch.setattr(fastest_format, "measure", lambda: {str(form): [1.0, 1.0, 1.0] for form in candidates()})
    assert len(format_table()) == len(candidates())


def test_measured_times_are_of_all_candidates(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest_format, "ROWS", 64)
    monkeypatch.setattr(fastest_format, "COLUMNS", 64)
    table = fastest_format.measure()
    assert set(table) == {str(form) for form in candidates()}
    assert all(0 < time < 10 for times in table.values() for time in times)


def test_the_choice_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [
        WeightForm("float32", "plain"),
        WeightForm("float32", "packed"),
        WeightForm("float32", "float16"),
        WeightForm("bfloat16", "packed"),
    ]
    monkeypatch.setattr(fastest_format, "candidates", lambda: forms)
    for best in forms:
        times = {str(form): [2.0, 2.0, 2.0] for form in forms} | {str(best): [1.0, 1.0, 1.0]}
        monkeypatch.setattr(fastest_format, "format_table", lambda times=times: times)
        assert choose_weight_form("auto", "auto", "cpu") == best
        of_float32 = choose_weight_form("float32", "auto", "cpu")
        assert (
            of_float32 == best if best in forms[:2] else of_float32 in forms[:2]
        )  # float16 would round what was asked for
        assert choose_weight_form("bfloat16", "auto", "cpu") == forms[3]
    # A prompt's products and new tokens count, not one of them alone.
    prompt, new = {str(forms[0]): [1e-3, 1e-3, 1.0]}, {str(forms[0]): [1e-1, 1e-1, 1e-3]}
    assert fastest_format.request_seconds(prompt[str(forms[0])]) == pytest.approx(4 + 256e-3 * (1 + 1 / 8) / 2)
    assert fastest_format.request_seconds(new[str(forms[0])]) == pytest.approx(4e-3 + 25.6 * (1 + 1 / 8) / 2)


def test_other_devices_use_plain_weights() -> None:
    assert choose_weight_form("auto", "auto", "cuda") == WeightForm("bfloat16", "plain")
    assert choose_weight_form("auto", "auto", "mps") == WeightForm("float32", "plain")

    assert choose_weight_form("auto", "int4", "cpu") == WeightForm("bfloat16", "int4")
    assert choose_weight_form("auto", "int8", "cpu") == WeightForm("float32" if has_fbgemm() else "bfloat16", "int8")
    assert choose_weight_form("float64", "auto", "cpu") == WeightForm("float64", "plain")


def test_compiled_code_is_kept_by_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path))
    folders = []
    for name in ("one", "one", "another"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as PyTorch sets it
        monkeypatch.setattr("chameleon.compiled_code.processor_name", lambda name=name: name)
        keep_compiled_code()
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folders[0] == folders[1] != folders[2]
    assert all(Path(folder).is_relative_to(tmp_path) for folder in folders)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == folders[2]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


@pytest.mark.parametrize("form", [FORMS[1], pytest.param(FORMS[3], marks=pytest.mark.slow)])
def test_a_second_model_of_the_same_shape_compiles_nothing(tokenizer: MixedTokenizer, form: WeightForm) -> None:
    """Compiled code gets weights of any format as inputs: that of the first model, kept on disk, serves the second."""
    from torch._dynamo.utils import counters

    v = tokenizer.vocabulary
    sampling = {"text_sampling": GREEDY, "image_sampling": GREEDY}
    requests = [
        Request((v.bos, v.text_start + n, v.sep), OutputConstraints(v.dialect.length(v.grid) + 4, max_images=1), **sampling)
        for n in range(2)
    ]
    outputs = []
    for seed in (1, 2):
        engines = []
        for compile in (False, True):
            model = random_model(v.size, seed, layers=1, width=64, ffn_width=96)
            convert_weights(model, form.weight_format)
            engines.append(Engine(model, v, weight_format=form.weight_format, compile=compile))
        counters.clear()
        torch.compiler.reset()  # as in a new process
        plain, compiled = (engine.generate(requests) for engine in engines)
        assert compiled == plain
        outputs.append(compiled)
    assert outputs[0] != outputs[1]
    assert counters["inductor"]["fxgraph_cache_hit"] > 0 and not counters["inductor"]["fxgraph_cache_miss"]


# --- exact generation ---


def hidden_states(model: Any, sequences: list[list[int]], passes: list[list[int]]) -> list[Tensor]:
    """Return the hidden states of each sequence; in pass p, sequence s gets its next passes[p][s] tokens."""
    cache = KVCache(model.config, len(sequences), 128, dtype=cache_dtype(model.norm.weight.dtype, "cpu"))
    cached, parts = [0] * len(sequences), [list[Tensor]() for _ in sequences]
    for counts in passes:
        token_ids = [i for s, n, c in zip(sequences, counts, cached, strict=True) for i in s[c : c + n]]
        layout = BatchLayout.exact(cache, cached, counts)
        states = model(torch.tensor([token_ids]), layout=layout)[0].split(counts)
        for part, state in zip(parts, states, strict=True):
            part.append(state)
        cached = [c + n for c, n in zip(cached, counts, strict=True)]
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("form", FORMS)
def test_hidden_states_are_exact_in_any_batch(form: WeightForm) -> None:
    """Bit by bit, for sequences alone a token at a time, and together in passes of any sizes."""
    model = random_model(200, layers=3, width=64, ffn_width=96).to(getattr(torch, form.dtype))
    convert_weights(model, form.weight_format)
    make_exact(model)
    model.join_qk_norms()
    torch.manual_seed(1)
    sequences = [torch.randint(0, 200, (length,)).tolist() for length in (70, 23, 41)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            alone = [hidden_states(model, [s], [[1]] * len(s))[0] for s in sequences]
            together = hidden_states(model, sequences, [[33, 0, 5], [1, 20, 1], [36, 3, 35]])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_exact_codes_of_pictures_do_not_depend_on_others(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chameleon.load(bundle_folder, exact=True)
    network, sizes = model.tokenizer.image.network, []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda values: sizes.append(len(values)) or encode(values))
    model.caption_batch([PILImage.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")])
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("form", FORMS[:6])
def test_exact_drawings_depend_on_the_seed_alone(bundle_folder: Path, form: WeightForm) -> None:
    options: dict[str, Any] = {"dtype": form.dtype, "weight_format": form.weight_format, "exact": True}
    prompts, sampling = ["orange heart", "waving hand", "noto", "style"], Sampling(1.0, 0.9)
    model = Chameleon.load(bundle_folder, **options)
    threads = torch.get_num_threads()
    alone = [model.draw(p, seed=n, guidance_scale=2.0, sampling=sampling) for n, p in enumerate(prompts)]
    assert torch.get_num_threads() == threads
    for draft_length in (1, 3):
        others = Chameleon.load(bundle_folder, draft_length=draft_length, **options)
        together = others.draw_batch(prompts, guidance_scale=2.0, sampling=sampling)
        assert [image.tobytes() for image in together] == [image.tobytes() for image in alone]


def test_exact_is_refused_where_it_is_not_known(bundle_folder: Path) -> None:
    with pytest.raises(BadInput, match="exact generation is for uncompiled models on CPUs"):
        Chameleon.load(bundle_folder, exact=True, compile=True)


# --- devices without float64 ---


class NoFloat64(TorchDispatchMode):
    """Raises where an operation gives a float64 tensor, which Apple's GPUs do not have."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else [output]:
            assert not (isinstance(value, Tensor) and value.dtype == torch.float64), f"{function} gives float64"
        return output


def test_generation_uses_no_float64(bundle_folder: Path) -> None:
    model = Chameleon.load(bundle_folder, dtype="float32", weight_format="plain")
    with NoFloat64():
        sampling = Sampling(0.9, 0.8, top_k=20, repetition_penalty=1.2)
        (image,) = model.draw_samples("orange heart", 1, guidance_scale=2.0, sampling=Sampling(1.0, 0.9, top_k=9))
        model.caption(image, sampling=sampling)
        document = Document((Text("waving"),))
        model.generate(document, max_new_tokens=40, text_sampling=sampling, guidance_scale=1.5)
        model.rank([image], "orange heart")
    with pytest.raises(AssertionError, match="gives float64"), NoFloat64():
        torch.zeros(1).double()


@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 2**32))
def test_exact_layouts_attend_to_what_precedes(lengths: list[int], seed: int) -> None:
    """Each token is in one group, whose keys are a multiple of 64 and whose mask allows its own position and earlier."""
    torch.manual_seed(seed)
    model = random_model(20)
    cache = KVCache(model.config, len(lengths), 192, dtype=torch.float32)
    cached = [int(torch.randint(0, 100, ())) for _ in lengths]
    layout = BatchLayout.exact(cache, cached, lengths)
    covered = []
    for group in layout.groups:
        covered += list(range(group.tokens.start, group.tokens.stop))
        assert group.kv_length % 64 == 0 and group.slots.stop - group.slots.start == 1
        assert group.mask is not None
        positions = layout.positions[group.tokens]
        assert torch.equal(group.mask.flatten(1).sum(1), positions + 1)
        assert all(group.kv_length == (p // 64 + 1) * 64 for p in positions.tolist())
    assert covered == list(range(sum(lengths)))
