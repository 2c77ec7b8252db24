"""Sampling, modality constraints, guidance and the engine, each against something independent."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from scipy.stats import chi2, kstest
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from chameleon.document import Document, Image, Text
from chameleon.errors import BadInput
from chameleon.generation import sampling as sampling_module
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import AllowedNext, OutputConstraints, OutputState
from chameleon.generation.engine import Engine
from chameleon.generation.guidance import Guidance, combine_logits, image_only, mean_with, three_way, two_way
from chameleon.generation.request import Request
from chameleon.generation.sampling import (
    GREEDY,
    BatchSampling,
    Sampling,
    exponential_noise,
    penalize_repetition,
    sample,
    top_k_top_p_filter,
)
from chameleon.generation.views import views_of_document
from chameleon.model.kv_cache import KVCache
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.vocabulary import Vocabulary

# --- sampling ---

DEVICE = torch.device("cpu")


def cut_by(logits: torch.Tensor, **settings_: float) -> torch.Tensor:
    return top_k_top_p_filter(logits, BatchSampling([Sampling(1.0, **{"top_p": 1.0, **settings_})] * len(logits)))  # type: ignore[arg-type]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_equals_hugging_faces(top_p: float) -> None:
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(1)) * 3
    assert torch.equal(cut_by(logits, top_p=top_p), TopPLogitsWarper(top_p)(None, logits))


@pytest.mark.parametrize("top_k", [1, 5, 60])
def test_top_k_equals_hugging_faces(top_k: int) -> None:
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cut_by(logits, top_k=top_k), TopKLogitsWarper(top_k)(None, logits))


def test_both_equal_hugging_faces_one_after_the_other() -> None:
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(2)) * 2
    expected = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(9)(None, logits))
    assert torch.equal(cut_by(logits, top_k=9, top_p=0.8), expected)


def test_repetition_penalty_equals_hugging_faces() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(10, 30), torch.randint(0, 30, (10, 7))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    seen = torch.zeros(10, 30, dtype=torch.bool).scatter_(1, ids, True)
    torch.testing.assert_close(penalize_repetition(logits, seen, torch.full((10, 1), 1.3)), expected)


def drawn(logits: torch.Tensor, sampling: Sampling, seeds: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """What is drawn from the same logits [V] by each (seed, number) [N]."""
    rows = logits.expand(len(seeds), -1)
    return sample(rows, BatchSampling([sampling] * len(rows)), seeds, numbers, torch.arange(len(logits)))


SAMPLINGS = [
    Sampling(1.0, 1.0),
    Sampling(0.7, 0.9),
    Sampling(2.0, 1.0, top_k=5),
    Sampling(1.3, 0.6, top_k=8, repetition_penalty=1.4),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("vary", ["seed", "number"])
def test_drawn_ids_follow_the_distribution(sampling: Sampling, vary: str) -> None:
    torch.manual_seed(0)
    logits, count = torch.randn(12) * 1.5, 20_000
    running, still = torch.arange(count), torch.full((count,), 7)
    seeds, numbers = (running, still) if vary == "seed" else (still, running)
    seen = torch.arange(12) % 3 == 0
    rows = BatchSampling([sampling] * count)
    ids = sample(logits.expand(count, -1), rows, seeds, numbers, torch.arange(12), seen.expand(count, -1))
    row = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen.nonzero().T, logits[None].clone())
    row = TopKLogitsWarper(sampling.top_k or 12)(None, row / sampling.temperature)
    expected = TopPLogitsWarper(sampling.top_p)(None, row)[0].softmax(0) * count
    actual = torch.bincount(ids, minlength=12)
    assert not actual[expected == 0].any()
    kept = expected > 0
    chi_square = float(((actual[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert chi_square < chi2.ppf(1 - 1e-4, int(kept.sum()) - 1)


def test_draws_of_neighbouring_seeds_and_numbers_are_independent() -> None:
    logits, count = torch.zeros(4), 20_000
    numbers = torch.arange(count)
    for seeds, others in ((0, 1), (0, 2**32), (5, 2**62)):
        first = drawn(logits, Sampling(1.0, 1.0), torch.full((count,), seeds), numbers)
        second = drawn(logits, Sampling(1.0, 1.0), torch.full((count,), others), numbers)
        for one, other in ((first, second), (first[:-1], first[1:])):
            table = torch.bincount(one * 4 + other, minlength=16)
            expected = len(one) / 16
            assert float(((table - expected) ** 2 / expected).sum()) < chi2.ppf(1 - 1e-4, 15)


def test_times_are_exponential() -> None:
    actual = exponential_noise(torch.tensor([3]), torch.tensor([9]), torch.arange(50_000))[0]
    assert kstest(actual.numpy(), "expon").pvalue > 1e-3
    assert bool((actual > 0).all()) and bool(actual.isfinite().all())
    assert len(actual[actual < 0.01].unique()) == (actual < 0.01).sum()  # small ones are not rounded together


def test_the_longest_time_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits set: rounded to float32 they would be 1."""
    monkeypatch.setattr(sampling_module, "mix_bits", lambda bits: torch.full_like(bits, -1))
    (longest,) = exponential_noise(torch.tensor([3]), torch.tensor([9]), torch.arange(1)).flatten().tolist()
    assert longest == pytest.approx(24 * math.log(2))


def test_similar_distributions_mostly_draw_the_same() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 30)
    other = one + 0.2 * other
    seeds = torch.arange(4000)
    same = drawn(one, Sampling(1.0, 1.0), seeds, seeds) == drawn(other, Sampling(1.0, 1.0), seeds, seeds)
    distance = float((one.softmax(0) - other.softmax(0)).abs().sum() / 2)
    assert float(same.double().mean()) > (1 - distance) / (1 + distance) - 0.02  # arXiv 2408.07978, theorem 1


def test_cutting_the_head_does_not_change_what_is_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 30)
    masked = logits.clone()
    masked[:, :10] = -torch.inf
    masked[:, 20:] = -torch.inf
    rows, seeds = BatchSampling([Sampling(0.8, 0.9)] * 50), torch.arange(50)
    whole = sample(masked, rows, seeds, seeds, torch.arange(30))
    assert torch.equal(whole, sample(logits[:, 10:20], rows, seeds, seeds, torch.arange(10, 20)) + 10)


def test_each_row_has_settings_of_its_own() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 20), torch.arange(20)
    rows = [GREEDY, Sampling(1.0, 0.5), Sampling(2.0, 1.0, top_k=3)]
    seeds, numbers = torch.tensor([3, 7, 9]), torch.tensor([0, 4, 2])
    together = sample(logits, BatchSampling(rows), seeds, numbers, ids)
    alone = [
        sample(logits[n : n + 1], BatchSampling(rows[n : n + 1]), seeds[n : n + 1], numbers[n : n + 1], ids).item()
        for n in range(3)
    ]
    assert together.tolist() == alone
    assert together[0] == logits[0].argmax()


def test_settings_out_of_range_are_named() -> None:
    for name, value in (("temperature", -1), ("temperature", float("nan")), ("top_p", 0.0), ("top_k", -1)):
        with pytest.raises(BadInput, match=name):
            Sampling(**{name: value})  # type: ignore[arg-type]
    for seed in (-1, 2**63):
        with pytest.raises(BadInput, match="out of range"):
            Request((1,), OutputConstraints(1), seed=seed)


# --- guidance ---


def test_guidance_is_the_formula() -> None:
    torch.manual_seed(0)
    full, images, nothing = torch.randn(3, 2, 9)
    weights = torch.tensor([two_way([1], 3.0).weights] * 2)
    torch.testing.assert_close(
        combine_logits(torch.stack((full, nothing), dim=1), weights), nothing + 3.0 * (full - nothing)
    )
    weights = torch.tensor([three_way([1], [1], 1.2, 3.0).weights] * 2)
    got = combine_logits(torch.stack((full, images, nothing), dim=1), weights)
    torch.testing.assert_close(got, nothing + 1.2 * (images - nothing) + 3.0 * (full - images))


# --- modality ---


def allowed(state: OutputState, v: Vocabulary) -> torch.Tensor:
    """bool [V]: the ids that may come next."""
    kind = state.allowed_next()
    if state.image is not None and kind in (AllowedNext.SIZE, AllowedNext.ROW_END):
        mask = torch.zeros(v.size, dtype=torch.bool)
        mask[state.image.next_sizes() if kind == AllowedNext.SIZE else v.dialect.row_end] = True
        return mask
    names = {AllowedNext.IMAGE_START: "boi", AllowedNext.IMAGE_END: "eoi", AllowedNext.END: "eos"}
    return v.mask(
        text=bool(kind & AllowedNext.TEXT),
        image=bool(kind & AllowedNext.CODE),
        specials=[name for flag, name in names.items() if flag & kind],
    )


def letters(ids: list[int], v: Vocabulary) -> str:
    """One letter an id: boi, eoi, code, text."""
    return "".join("b" if t == v.boi else "e" if t == v.eoi else "c" if t in v.image_ids else "t" for t in ids)


def generated_by(constraints: OutputConstraints, v: Vocabulary, choices: list[int]) -> str:
    """What some choice of allowed ids makes."""
    state, output = OutputState(constraints, v, [v.bos]), []
    for choice in choices:
        if state.is_exhausted:
            break
        options = allowed(state, v).nonzero().flatten().tolist()
        token = options[choice % len(options)]
        if token == v.eos:
            break
        output.append(token)
        state.append(token)
    return letters(output, v)


CHOICES = st.lists(st.integers(0, 10**6), min_size=60, max_size=60)
SMALL = Vocabulary.build(image_codes=5, text_pieces=6, grid=(2, 3))
PICTURE = "bcccccce"


@settings(max_examples=200)
@given(
    max_new_tokens=st.integers(1, 40),
    max_images=st.integers(0, 3),
    max_text_tokens=st.none() | st.integers(1, 5),
    choices=CHOICES,
)
def test_any_choice_of_allowed_tokens_gives_complete_images(
    max_new_tokens: int, max_images: int, max_text_tokens: int | None, choices: list[int]
) -> None:
    output = generated_by(OutputConstraints(max_new_tokens, max_images, max_text_tokens), SMALL, choices)
    assert len(output) <= max_new_tokens
    assert set(output.replace(PICTURE, "")) <= {"t"}
    assert output.count("b") <= max_images
    assert max_text_tokens is None or "t" * (max_text_tokens + 1) not in output


FORMATS = {
    ("text",): "t+",
    ("image",): PICTURE,
    ("text", "image", "text"): f"t+{PICTURE}t+",
    ("image", "image", "text"): f"{PICTURE}{PICTURE}t+",
    (): "",
}


@settings(max_examples=200)
@given(
    parts=st.sampled_from(list(FORMATS)),
    spare=st.integers(0, 9),
    max_text_tokens=st.none() | st.integers(1, 5),
    choices=CHOICES,
)
def test_a_format_is_kept_whatever_is_chosen(
    parts: tuple[str, ...], spare: int, max_text_tokens: int | None, choices: list[int]
) -> None:
    constraints = OutputConstraints(1, max_text_tokens=max_text_tokens, format=parts)  # type: ignore[arg-type]
    constraints = replace(constraints, max_new_tokens=max(1, constraints.min_tokens(SMALL) + spare))
    output = generated_by(constraints, SMALL, choices)
    assert re.fullmatch(FORMATS[parts], output), output
    assert len(output) <= constraints.max_new_tokens
    assert max_text_tokens is None or "t" * (max_text_tokens + 1) not in output


def test_a_prompt_may_end_inside_a_picture() -> None:
    v = SMALL
    state = OutputState(OutputConstraints(10, format=()), v, [v.bos, v.boi, 6, 7])
    kinds = []
    for _ in range(6):
        kinds.append(state.allowed_next())
        state.append(v.eoi if kinds[-1] == AllowedNext.IMAGE_END else v.image_start)
    assert kinds == [AllowedNext.CODE] * 4 + [AllowedNext.IMAGE_END, AllowedNext.END]


def test_views_are_the_picture_and_small_changes_of_it() -> None:
    picture = PILImage.new("RGB", (80, 60), (10, 60, 200))
    picture.paste((250, 250, 0), (30, 20, 50, 40))
    document = Document((Text("what is it?"), Image(picture)))
    same, *others = views_of_document(document, 5)
    assert same == document and len(others) == 4
    centres = []
    for view in others:
        assert view.parts[0] == document.parts[0]
        pixels = np.asarray(view.images[0], dtype=float)
        assert (np.abs(pixels[[0, -1]] - (10, 60, 200)) <= 1).all()  # the border's colour comes in from outside
        rows, columns = np.nonzero(pixels[..., 0] > 130)
        assert len(rows) == pytest.approx(400, rel=0.15)
        centres.append((rows.mean(), columns.mean()))
    assert max(abs(row - 29.5) for row, _ in centres) < 3.5 and max(abs(column - 39.5) for _, column in centres) < 4.5
    assert len(set(centres)) == 4


def test_a_caption_by_one_view_is_the_caption(chameleon: Chameleon) -> None:
    pictures = [PILImage.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    plain = chameleon.caption_batch(pictures, max_new_tokens=8)
    assert chameleon.caption_batch(pictures, max_new_tokens=8, views=1) == plain
    several = chameleon.caption_batch(pictures, max_new_tokens=8, views=3)
    assert several == [chameleon.caption(picture, max_new_tokens=8, views=3) for picture in pictures]
    for scale in (math.nan, math.inf, (1.0, math.nan)):
        with pytest.raises(BadInput, match=r"guidance_scale: .* is not finite"):
            chameleon.draw("a", guidance_scale=scale)
    for views in (0, 33):
        with pytest.raises(BadInput, match=f"{views} views; use 1 to 32"):
            chameleon.caption(pictures[0], views=views)


def test_views_are_read_by_the_mean_of_their_logits(chameleon: Chameleon) -> None:
    rng = np.random.default_rng(0)
    dotted = [PILImage.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(6)]
    by_mean = []
    for picture in dotted:
        document = chameleon.prompts.answer_document(picture, "which?")
        prompts = [chameleon.prompts.token_ids(view) for view in views_of_document(document, 3)]
        request = Request(prompts[0], OutputConstraints(8), GREEDY, guidance=mean_with(prompts[1:]))
        by_mean.append(chameleon.decode(reference(chameleon.engine, request)).text.strip())
    asked = [(picture, "which?") for picture in dotted]
    assert chameleon.answer_batch(asked, max_new_tokens=8, views=3) == by_mean
    assert chameleon.answer_batch(asked, max_new_tokens=8) != by_mean


# --- the engine ---


def make_engine(tokenizer: MixedTokenizer, options: dict[str, Any] | None = None, **changes: object) -> Engine:
    model = random_model(tokenizer.vocabulary.size, **changes).double()
    return Engine(model, tokenizer.vocabulary, **(options or {}))


def reference(engine: Engine, request: Request) -> list[int]:
    """The same request without cache, batch or head slices: every step reads the whole sequence anew."""
    v = engine.vocabulary
    state, output = OutputState(request.validate(v, engine.model.config.context_length, 32), v, list(request.prompt)), []
    while not state.is_exhausted:
        kind = state.allowed_next()
        rows = [torch.tensor([[*prompt, *output]]) for prompt in request.prompts]
        if request.guidance is not None and request.guidance.restarts and kind == AllowedNext.CODE:
            start = len(output) - 1 - output[::-1].index(v.boi)
            rows[1] = torch.tensor([output[start:]])
        logits = [engine.model.logits(engine.model(ids))[0, -1] for ids in rows]
        row = logits[0]
        tokens = {AllowedNext.CODE: "codes", AllowedNext.SIZE: "sizes"}.get(kind, "texts")
        if request.guidance is not None and request.guidance.applies_to == tokens:
            row = sum(w * part for w, part in zip(request.guidance.weights, logits, strict=True))  # type: ignore[assignment]
        seen = torch.zeros(1, v.size, dtype=torch.bool)
        for token in (*request.prompt, *output):
            seen[0, token] = token in v.text_ids
        in_image = kind in (AllowedNext.CODE, AllowedNext.SIZE)
        setting = request.image_sampling if in_image else request.text_sampling
        token = int(
            sample(
                row.masked_fill(~allowed(state, v), -torch.inf).unsqueeze(0),
                BatchSampling([setting]),
                torch.tensor([request.seed]),
                torch.tensor([len(output)]),
                torch.arange(v.size),
                None if in_image else seen,
            )
        )
        if state.image is not None and kind == AllowedNext.CODE and state.num_images == 1:
            given = request.fixed_codes[state.image.num_codes :]
            token = given[0] if given and given[0] >= 0 else token
        if token == v.answer_end:
            break
        output.append(token)
        state.append(token)
    return output


def requests(vocabulary: Vocabulary, sampling: Sampling) -> list[Request]:
    v, t = vocabulary, vocabulary.text_start
    codes = tuple(range(v.image_start, v.image_start + math.prod(v.grid)))
    picture = (*v.started_image(codes, v.grid), *([] if v.dialect.row_end is None else [v.dialect.row_end]), v.eoi)
    longest, shared = v.dialect.max_length, (v.bos, *picture, *range(t + 10, t + 30))
    one = OutputConstraints(longest, format=("image",))
    alone = None if v.dialect.row_end is None else image_only(v.boi, 3.0)
    return [
        Request((v.bos, t + 3, t + 4, v.sep), OutputConstraints(12), sampling, sampling, seed=1),
        Request((v.bos, *picture, v.sep), OutputConstraints(30, max_images=1), sampling, sampling, seed=2),
        Request((v.bos, t + 9, t + 8, t + 7, v.sep), one, sampling, sampling, two_way((v.bos, v.sep), 3.0), seed=3),
        Request((v.bos, t + 1, *picture, t + 2, v.sep), OutputConstraints(40, max_images=2), sampling, sampling, seed=4),
        Request(
            (v.bos, *picture, t + 5), one, sampling, sampling, three_way((v.bos, *picture), (v.bos,), 1.2, 3.0), seed=5
        ),
        # one prefix, behind which some differ, and some do not
        Request(
            (*shared, t + 1, v.sep), OutputConstraints(30, format=("text", "image", "text")), sampling, sampling, seed=6
        ),
        Request((*shared, t + 2, v.sep), OutputConstraints(4), sampling, sampling, seed=7),
        Request(
            (*shared, t + 1, v.sep), OutputConstraints(25, max_images=1, max_text_tokens=3), sampling, sampling, seed=8
        ),
        # completes a picture, and one of which some codes are given
        Request((v.bos, *v.started_image(codes[:5], v.grid)), OutputConstraints(26, format=()), sampling, sampling, seed=9),
        Request(
            (v.bos, t + 4, v.sep),
            replace(one, grid=v.dialect.grids[-1]),
            sampling,
            GREEDY,
            seed=10,
            fixed_codes=(-1, codes[3], codes[4], -1, codes[1]),
        ),
        # guidance by the picture alone, which begins anew with each
        Request(
            (v.bos, t + 6, v.sep),
            OutputConstraints(2 * longest + 4, format=("text", "image", "text", "image"), max_text_tokens=2),
            sampling,
            sampling,
            alone,
            seed=11,
        ),
        # the mean of several prompts, in texts alone
        Request(
            (v.bos, *picture, t + 3, v.sep),
            OutputConstraints(longest + 12, format=("text", "image", "text"), max_text_tokens=5),
            sampling,
            sampling,
            mean_with([(v.bos, t + 3, v.sep), (v.bos, t + 5, *picture, v.sep)]),
            seed=12,
        ),
    ]


DRAWN = Sampling(0.9, 0.9, repetition_penalty=1.2)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small batches": {"max_batch_size": 3},
    "draft of 3": {"draft_length": 3},
    "draft of 16": {"draft_length": 16, "max_batch_size": 7},
}


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "sampled"])
@pytest.mark.parametrize("norm_order", ["pre", "swin"])
@pytest.mark.parametrize("dialect", ["tokenizer", "sized_tokenizer"])
@pytest.mark.parametrize("way", WAYS)
def test_engine_equals_the_reference_alone_and_in_any_batch(
    dialect: str, sampling: Sampling, norm_order: str, way: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(dialect)
    engine = make_engine(tokenizer, WAYS[way], norm_order=norm_order)
    queries = requests(tokenizer.vocabulary, sampling)
    expected = [reference(engine, request) for request in queries]
    assert all(expected) and len({tuple(ids) for ids in expected}) > 7
    for _ in range(2):  # the second time prefixes are there
        assert engine.generate(queries) == expected
    assert engine.generate(queries[::-1]) == expected[::-1]
    engine.clear()
    for request, ids in zip(queries, expected, strict=True):
        assert engine.generate([request]) == [ids]
    assert engine.is_idle and not engine.manager.sequences and not engine.scheduler.requests


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_coming_and_going_changes_nothing(seed: int, request: pytest.FixtureRequest) -> None:
    """Requests join while others run, some are cancelled, the host looks now and then only."""
    tokenizer = request.getfixturevalue("sized_tokenizer" if seed % 2 else "tokenizer")
    stream = random.Random(seed)
    engine = make_engine(tokenizer, {"max_batch_size": stream.randint(3, 8), "draft_length": stream.choice([1, 1, 4])})
    queries = requests(tokenizer.vocabulary, DRAWN)
    expected = [engine.generate([request])[0] for request in queries]
    order = stream.sample(range(len(queries)), len(queries))
    pending: dict[int, int] = {}
    while order or not engine.is_idle:
        for _ in range(stream.randint(0, 3)):
            if order:
                number = order.pop()
                pending[engine.submit(queries[number])] = number
        if pending and stream.random() < 0.1:
            request_id = stream.choice(sorted(pending))
            engine.cancel(request_id)
            del pending[request_id]
        engine.step(stream.choice([None, 1, 5]))
        assert [sequence.slot for sequence in engine.manager.sequences] == list(range(len(engine.manager.sequences)))
    for request_id, number in pending.items():
        assert list(engine.scheduler.requests[request_id].unread) == expected[number]
    assert not engine.manager.sequences


def test_prefixes_are_prefilled_once(tokenizer: MixedTokenizer) -> None:
    """Counted in ids that the model reads: samples of one prompt, guidance branches, a prompt seen in an earlier call."""
    v = tokenizer.vocabulary
    engine = make_engine(tokenizer)
    prompt = (v.bos, *range(v.text_start, v.text_start + 40), v.sep)
    read: list[int] = []
    hook = engine.model.embed.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    engine.generate([Request(prompt, OutputConstraints(1), GREEDY, seed=seed) for seed in range(6)])
    assert sum(read) == len(prompt) + 5
    read.clear()
    engine.generate([Request((*prompt[:30], v.sep), OutputConstraints(1), GREEDY)])
    assert sum(read) == 1
    read.clear()
    branches = two_way(prompt[:35], 2.0)
    engine.clear()
    engine.generate([Request(prompt, OutputConstraints(v.dialect.length(v.grid), format=("image",)), guidance=branches)])
    # both prompts, the shared part once and boi behind them; then two rows for each code but the last
    assert sum(read) == len(prompt) + 1 + 1 + 1 + 2 * (math.prod(v.grid) - 1)
    hook.remove()


def test_no_host_synchronisation_inside_images(tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    v = tokenizer.vocabulary
    engine = make_engine(tokenizer)
    looks = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (looks.append(self.numel()), tolist(self))[1])
    for name in ("item", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("a look"))
    constraints = OutputConstraints(v.dialect.length(v.grid), format=("image",))
    queries = [
        Request((v.bos, v.text_start + n, v.sep), constraints, guidance=two_way((v.bos, v.sep), 2.0)) for n in range(3)
    ]
    looks.clear()
    engine.generate(queries)
    assert looks == [3 * math.prod(v.grid)]


def test_drafts_save_passes(tokenizer: MixedTokenizer) -> None:
    """A model that always says the same code is right about all drafts from the second row on."""
    v = tokenizer.vocabulary
    request = Request(
        (v.bos, v.text_start, v.sep), OutputConstraints(v.dialect.length(v.grid), format=("image",)), image_sampling=GREEDY
    )
    passes = {}
    for window in (1, 4):
        engine = make_engine(tokenizer, {"draft_length": window})
        with torch.no_grad():
            for block in engine.model.blocks:
                block.attention.out.weight.zero_()  # type: ignore[union-attr]
                block.ffn.down.weight.zero_()  # type: ignore[union-attr]
            engine.model.embed.weight[v.image_ids.ids] = engine.model.embed.weight[v.boi].clone()
        engine.generate([request])
        passes[window] = engine.decoder.num_forward_passes
    assert passes == {1: math.prod(v.grid), 4: 1 + -(-(math.prod(v.grid) - 1) // 4)}


def test_compiled_changes_nothing(tokenizer: MixedTokenizer) -> None:
    queries = requests(tokenizer.vocabulary, DRAWN)[:4]
    plain, engine = make_engine(tokenizer, layers=1), make_engine(tokenizer, {"compile": True}, layers=1)
    assert engine.generate(queries) == plain.generate(queries)
    engine.clear()  # another cache
    assert engine.generate(queries[::-1]) == plain.generate(queries[::-1])


def test_cancelling_leaves_the_engine_usable(tokenizer: MixedTokenizer) -> None:
    engine = make_engine(tokenizer)
    queries = requests(tokenizer.vocabulary, GREEDY)
    expected = engine.generate(queries)
    stream = engine.stream(queries, max_buffered_codes=2)
    for _ in range(7):
        next(stream)
    stream.close()
    assert engine.is_idle and not engine.manager.sequences and not engine.scheduler.requests
    assert engine.generate(queries) == expected


def test_a_failure_inside_a_pass_leaves_the_engine_usable(tokenizer: MixedTokenizer) -> None:
    engine = make_engine(tokenizer)
    queries = requests(tokenizer.vocabulary, GREEDY)
    expected = engine.generate(queries)
    calls = iter(range(100))

    def fail(*_: object) -> None:
        if next(calls) == 5:
            raise KeyboardInterrupt

    hook = engine.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(queries)
    hook.remove()
    assert engine.is_idle and not engine.manager.sequences
    assert engine.generate(queries) == expected


def test_requests_with_only_forced_tokens_take_no_slot(tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    engine = make_engine(tokenizer, {"max_batch_size": 3})
    whole = (v.bos, v.boi, *range(v.image_start, v.image_start + math.prod(v.grid)))
    queries = [Request(whole, OutputConstraints(5, format=()))] * 7 + requests(v, DRAWN)[:2]
    assert engine.generate(queries) == [[v.eoi]] * 7 + make_engine(tokenizer).generate(queries[7:])


def test_a_stream_of_a_cancelled_request_raises(tokenizer: MixedTokenizer) -> None:
    engine = make_engine(tokenizer)
    stream = engine.stream(requests(tokenizer.vocabulary, DRAWN)[:1])
    next(stream)
    engine.clear()
    with pytest.raises(BadInput, match="the request was cancelled"):
        list(stream)
    assert engine.generate(requests(tokenizer.vocabulary, DRAWN)[:1])[0]


def test_two_streams_may_be_read_in_turn(tokenizer: MixedTokenizer) -> None:
    engine = make_engine(tokenizer)
    queries = requests(tokenizer.vocabulary, DRAWN)[:2]
    expected = [engine.generate([request])[0] for request in queries]
    streams = [engine.stream([request]) for request in queries]
    actual: list[list[int]] = [[], []]
    for pair in zip_longest(*streams):
        for place, event in enumerate(pair):
            if event is not None:
                actual[place].append(event[1])
    assert actual == expected


def test_requests_that_do_not_fit_are_refused(tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tokenizer, context_length=16)
    v = tokenizer.vocabulary
    with pytest.raises(BadInput, match=r"the prompt has 20 tokens, the context length is 16; shorten it to 15"):
        engine.generate([Request((v.text_start,) * 20, OutputConstraints(4))])
    with pytest.raises(BadInput, match="at least one token"):
        engine.generate([Request((), OutputConstraints(4))])
    with pytest.raises(BadInput, match=f"not below {v.size}"):
        engine.generate([Request((v.size,), OutputConstraints(4))])
    with pytest.raises(BadInput, match="text and image take at least 19 tokens, but there is room for 7"):
        engine.generate([Request((v.bos,) * 10, OutputConstraints(100, format=("text", "image")))])
    with pytest.raises(BadInput, match="none is to be generated"):
        engine.generate([Request((v.bos,), OutputConstraints(4), guidance=two_way((v.bos,), 2.0))])
    guided = Request(
        (v.bos,), OutputConstraints(v.dialect.length(v.grid), format=("image",)), guidance=two_way((v.bos,), 2.0)
    )
    with pytest.raises(BadInput, match="takes 2 sequences, max_batch_size is 1"):
        make_engine(tokenizer, {"max_batch_size": 1}).generate([guided])
    rest = Request((v.bos, v.boi, v.image_start, v.image_start), OutputConstraints(20, format=("image",)))
    with pytest.raises(BadInput, match="the rest of an image and image take at least 33 tokens, but there is room for 13"):
        engine.generate([rest])
    with pytest.raises(BadInput, match="its tokens are not those of one"):
        make_engine(tokenizer).generate([Request((v.boi, *(v.image_start,) * 17), OutputConstraints(4))])
    with pytest.raises(BadInput, match=f"{v.eos} is not the token id of an image code"):
        engine.generate([Request((v.bos,), OutputConstraints(4), fixed_codes=(v.eos,))])
    with pytest.raises(BadInput, match="3 weights for 2 prompts"):
        engine.generate([Request((v.bos,), OutputConstraints(4), guidance=Guidance(((v.bos,),), (1, 2, 3)))])
    # what fits is cut to the room that is left, and no picture starts that would not fit
    output = engine.generate([Request((v.bos,) * 10, OutputConstraints(100, max_images=1), GREEDY, GREEDY)])[0]
    assert len(output) <= 7 and v.boi not in output
    # no memory: for one row it is said, for several they wait for each other
    queries = [Request((v.bos, v.text_start + n), OutputConstraints(5), GREEDY) for n in range(5)]
    expected = make_engine(tokenizer).generate(queries)
    slot_bytes = 64 * KVCache.bytes_per_token(engine.model.config, torch.float64)
    monkeypatch.setattr("chameleon.generation.kv_cache_manager.free_memory", lambda device: slot_bytes - 1)
    with pytest.raises(BadInput, match=r"the KV cache of 1 sequence of 64 tokens takes .* GB .* 63 tokens fit"):
        make_engine(tokenizer).generate(queries)
    monkeypatch.setattr("chameleon.generation.kv_cache_manager.free_memory", lambda device: 2 * slot_bytes)
    engine = make_engine(tokenizer)
    assert engine.generate(queries) == expected
    assert engine.manager.cache is not None and engine.manager.cache.num_slots == 2


@pytest.mark.slow
def test_a_thousand_requests_with_cancellations_leave_nothing_behind(tokenizer: MixedTokenizer) -> None:
    engine = make_engine(tokenizer, {"max_batch_size": 12, "draft_length": 2})
    queries = requests(tokenizer.vocabulary, DRAWN)
    expected = [engine.generate([request])[0] for request in queries]
    stream = random.Random(0)
    pending: dict[int, int] = {}
    submitted, cancelled = 0, 0
    while submitted < 1000 or not engine.is_idle:
        for _ in range(stream.randrange(8)):
            if submitted < 1000:
                number = stream.randrange(len(queries))
                pending[engine.submit(queries[number])] = number
                submitted += 1
        if pending and stream.random() < 0.3:
            request_id = stream.choice(sorted(pending))
            engine.cancel(request_id)
            del pending[request_id]
            cancelled += 1
        engine.step(stream.choice([None, 1, 4]))
        for request_id in [request_id for request_id in pending if engine.is_finished(request_id)]:
            assert engine.take_output(request_id) == expected[pending.pop(request_id)]
    assert cancelled > 50 and not pending
    assert (
        not engine.manager.sequences
        and not engine.scheduler.waiting
        and not engine.scheduler.running
        and not engine.scheduler.requests
    )
    assert (
        engine.manager.cache is not None
        and engine.manager.cache.num_slots <= 12
        and len(engine.manager.index.token_ids) <= engine.manager.cache.num_slots
    )
