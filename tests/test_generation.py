"""Sampling, modality rules, guidance and the engine, each against something independent."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from chameleon.errors import BadInput
from chameleon.generation.engine import Engine, Request
from chameleon.generation.guidance import combine, three_way, two_way
from chameleon.generation.modality import ModalityState, Next, Rules, masks
from chameleon.generation.sampling import (
    GREEDY,
    RandomStream,
    Sampling,
    draw,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
)
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.vocabulary import Vocabulary

# --- sampling ---


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_equals_hugging_faces(top_p: float) -> None:
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(1)) * 3
    wanted = TopPLogitsWarper(top_p)(None, logits)
    got = keep_top_p(logits, torch.full((40, 1), top_p))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("top_k", [1, 5, 60])
def test_top_k_equals_hugging_faces(top_k: int) -> None:
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(keep_top_k(logits, torch.full((40, 1), top_k)), TopKLogitsWarper(top_k)(None, logits))


def test_repetition_penalty_equals_hugging_faces() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(10, 30), torch.randint(0, 30, (10, 7))
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    seen = torch.zeros(10, 30, dtype=torch.bool).scatter_(1, ids, True)
    torch.testing.assert_close(penalize_repetition(logits, seen, torch.full((10, 1), 1.3)), wanted)


def test_drawn_ids_follow_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12) * 1.5
    count = 20_000
    ids = draw(logits.expand(count, -1), torch.rand(count, dtype=torch.float64))
    expected = logits.softmax(0) * count
    chi_square = float(((torch.bincount(ids, minlength=12) - expected) ** 2 / expected).sum())
    assert chi_square < 40  # 11 degrees of freedom, p ≈ 4e-5


def test_ids_that_may_not_come_never_do() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.4999999, 0.5, 0.9999999999], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 2, 2]


def test_cutting_the_head_does_not_change_what_is_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 30)
    masked = logits.clone()
    masked[:, :10] = -torch.inf
    masked[:, 20:] = -torch.inf
    settings_ = [Sampling(0.8, 0.9)] * 50
    uniform = torch.rand(50, dtype=torch.float64).tolist()
    assert torch.equal(sample(masked, settings_, uniform), sample(logits[:, 10:20], settings_, uniform) + 10)


def test_each_row_has_settings_of_its_own() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 20)
    rows = [GREEDY, Sampling(1.0, 0.5), Sampling(2.0, 1.0, top_k=3)]
    uniform = [0.3, 0.7, 0.9]
    together = sample(logits, rows, uniform)
    alone = [sample(logits[n : n + 1], rows[n : n + 1], uniform[n : n + 1]).item() for n in range(3)]
    assert together.tolist() == alone
    assert together[0] == logits[0].argmax()


def test_settings_out_of_range_are_named() -> None:
    for name, values in (("temperature", {"temperature": -1}), ("top_p", {"top_p": 0.0}), ("top_k", {"top_k": -1})):
        with pytest.raises(BadInput, match=name):
            Sampling(**values)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="out of range"):
        RandomStream(-1)


def test_random_stream_is_a_function_of_seed_and_number() -> None:
    forwards, other = RandomStream(7), RandomStream(7)
    late = other[700]
    assert [forwards[n] for n in range(701)][700] == late
    assert RandomStream(8)[0] != forwards[0]


# --- guidance ---


def test_guidance_is_the_formula() -> None:
    torch.manual_seed(0)
    full, images, nothing = torch.randn(3, 9)
    got = combine(torch.stack((full, nothing)), two_way([1], 3.0).weights)
    torch.testing.assert_close(got, nothing + 3.0 * (full - nothing))
    got = combine(torch.stack((full, images, nothing)), three_way([1], [1], 1.2, 3.0).weights)
    torch.testing.assert_close(got, nothing + 1.2 * (images - nothing) + 3.0 * (full - images))


# --- modality ---


@settings(max_examples=200)
@given(
    max_new=st.integers(1, 40),
    max_images=st.integers(0, 3),
    text=st.booleans(),
    choices=st.lists(st.integers(0, 10**6), min_size=60, max_size=60),
)
def test_any_choice_of_allowed_ids_gives_whole_pictures(
    max_new: int, max_images: int, text: bool, choices: list[int]
) -> None:
    vocabulary = Vocabulary.own(image_codes=5, text_pieces=6, grid=(2, 3))
    state = ModalityState(Rules(max_new, max_images, text), vocabulary, [vocabulary.bos])
    allowed = masks(vocabulary)
    made = []
    for choice in choices:
        if state.done:
            break
        options = allowed[state.next()].nonzero().flatten().tolist()
        token = options[choice % len(options)]
        if token == vocabulary.eos:
            break
        made.append(token)
        state.push(token)
    assert len(made) <= max_new
    blocks = "".join(
        "b" if t == vocabulary.boi else "e" if t == vocabulary.eoi else "c" if 6 <= t < 11 else "t" for t in made
    )
    rest = blocks.replace("b" + "c" * 6 + "e", "")
    assert set(rest) <= {"t"}
    assert blocks.count("b") <= max_images
    if not text:
        assert rest == "" and blocks.count("b") == min(max_images, max_new // 8)


def test_a_prompt_may_end_inside_a_picture() -> None:
    v = Vocabulary.own(image_codes=5, text_pieces=6, grid=(2, 3))
    state = ModalityState(Rules(10), v, [v.bos, v.boi, 6, 7])
    kinds = []
    for _ in range(5):
        kinds.append(state.next())
        state.push(v.eoi if kinds[-1] == Next.IMAGE_END else v.image_start)
    assert kinds == [Next.CODE] * 4 + [Next.IMAGE_END]


# --- the engine ---


def engine(tokenizer: MixedTokenizer, **changes: object) -> Engine:
    return Engine(random_model(tokenizer.vocabulary.size, **changes).double(), tokenizer.vocabulary)


def reference(engine: Engine, request: Request) -> list[int]:
    """The same request without cache, batch or head slices: every step reads the whole sequence anew."""
    v = engine.vocabulary
    rules = engine.fitted(request)
    state, stream, made = ModalityState(rules, v, list(request.prompt)), RandomStream(request.seed), []
    allowed = masks(v)
    while not state.done:
        kind = state.next()
        rows = [torch.tensor([[*prompt, *made]]) for prompt in request.prompts]
        logits = torch.stack([engine.model.logits(engine.model(ids))[0, -1] for ids in rows]).float()
        guided = request.guidance is not None and kind == Next.CODE
        row = combine(logits, request.guidance.weights) if guided and request.guidance else logits[0]
        seen = torch.zeros(1, v.size, dtype=torch.bool)
        for token in (*request.prompt, *made):
            seen[0, token] = token in v.text_ids
        setting = request.image if kind == Next.CODE else request.text
        penalized = None if kind == Next.CODE else seen
        token = int(
            sample(row.masked_fill(~allowed[kind], -torch.inf).unsqueeze(0), [setting], [stream[len(made)]], penalized)
        )
        if token == v.eos:
            break
        made.append(token)
        state.push(token)
    return made


def requests(vocabulary: Vocabulary, sampling: Sampling) -> list[Request]:
    v, t = vocabulary, vocabulary.text_start
    picture = (v.boi, *range(v.image_start, v.image_start + v.image_length), v.eoi)
    return [
        Request((v.bos, t + 3, t + 4, v.sep), Rules(12), sampling, sampling, seed=1),
        Request((v.bos, *picture, v.sep), Rules(30, max_images=1), sampling, sampling, seed=2),
        Request(
            (v.bos, t + 9, t + 8, t + 7, v.sep),
            Rules(v.block_length, max_images=1, text=False),
            sampling,
            sampling,
            two_way((v.bos, v.sep), 3.0),
            seed=3,
        ),
        Request((v.bos, t + 1, *picture, t + 2, v.sep), Rules(40, max_images=2), sampling, sampling, seed=4),
        Request(
            (v.bos, *picture, t + 5),
            Rules(v.block_length, max_images=1, text=False),
            sampling,
            sampling,
            three_way((v.bos, *picture), (v.bos,), 1.2, 3.0),
            seed=5,
        ),
    ]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 0.9, repetition_penalty=1.2)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_engine_equals_the_reference_alone_and_in_any_batch(
    tokenizer: MixedTokenizer, sampling: Sampling, norm_order: str
) -> None:
    machine = engine(tokenizer, norm_order=norm_order)
    asked = requests(tokenizer.vocabulary, sampling)
    wanted = [reference(machine, request) for request in asked]
    assert any(wanted) and len({tuple(ids) for ids in wanted}) > 2
    assert machine.generate(asked) == wanted
    assert machine.generate(asked[::-1]) == wanted[::-1]
    for request, ids in zip(asked, wanted, strict=True):
        assert machine.generate([request]) == [ids]


def test_cancelling_leaves_the_engine_usable(tokenizer: MixedTokenizer) -> None:
    machine = engine(tokenizer)
    asked = requests(tokenizer.vocabulary, GREEDY)
    wanted = machine.generate(asked)
    stream = machine.stream(asked)
    for _ in range(7):
        next(stream)
    stream.close()
    assert machine.generate(asked) == wanted


def test_a_prompt_that_does_not_fit_says_how_long_it_is(tokenizer: MixedTokenizer) -> None:
    machine = engine(tokenizer, context=16)
    v = tokenizer.vocabulary
    with pytest.raises(BadInput, match="the prompt has 20 ids, the context 16"):
        machine.generate([Request((v.text_start,) * 20, Rules(4))])
    with pytest.raises(BadInput, match="at least one id"):
        machine.generate([Request((), Rules(4))])
    # what fits is cut to the room that is left, and no picture starts that would not fit
    made = machine.generate([Request((v.bos,) * 10, Rules(100, max_images=1), GREEDY, GREEDY)])[0]
    assert len(made) <= 7 and v.boi not in made
