"""The Transformer against Hugging Face's, and against itself without cache and without packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_model
from hugging_face import config_of, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers.models.chameleon.modeling_chameleon import ChameleonModel

from chameleon.errors import BadInput
from chameleon.model.config import SIZES, ModelConfig, named_size
from chameleon.model.kv_cache import BatchLayout, KVCache
from chameleon.model.transformer import Transformer, always_compiled, block_diagonal_causal_mask
from chameleon.train.monitors import uncompiled


def hugging_face(ours: Transformer) -> Any:
    """Hugging Face's model with our weights."""
    theirs = ChameleonModel(config_of(ours.config, attn_implementation="eager")).eval()
    state = theirs.state_dict()
    mine = state_of(ours)
    others = {name: value for name, value in state.items() if name.startswith("vqmodel.")}  # its pictures, not asked here
    theirs.load_state_dict(mine | others)
    return theirs


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
@pytest.mark.parametrize(("kv_heads", "shards"), [(4, 1), (2, 1), (2, 2), (4, 4)])
def test_hidden_states_equal_hugging_faces(norm_order: str, kv_heads: int, shards: int) -> None:
    model = random_model(50, kv_heads=kv_heads, qk_norm_shards=shards, norm_order=norm_order)
    ids = torch.randint(1, 50, (3, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = model(ids), hugging_face(model)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_cache_changes_nothing(qk_norm: bool) -> None:
    model = random_model(50, qk_norm=qk_norm).double()
    ids = torch.randint(0, 50, (1, 20))
    whole = model(ids)
    cache = KVCache(model.config, 1, 32, dtype=torch.float64)
    first = model(ids[:, :7], layout=BatchLayout.ragged(cache, [0], [7]))
    steps = [model(ids[:, t : t + 1], layout=BatchLayout.ragged(cache, [t], [1])) for t in range(7, 15)]
    rest = model(ids[:, 15:], layout=BatchLayout.ragged(cache, [15], [5]))
    torch.testing.assert_close(torch.cat([first, *steps, rest], dim=1), whole, atol=1e-9, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=6))
def test_rows_of_a_pass_may_be_at_any_length_with_any_number_of_new_ids(passes: list[list[int]]) -> None:
    model = random_model(50).double()
    cache = KVCache(model.config, 3, 32, dtype=torch.float64)
    rows = [torch.randint(0, 50, (sum(news[row] for news in passes),)) for row in range(3)]
    actual: list[list[torch.Tensor]] = [[], [], []]
    starts = [0, 0, 0]
    for news in passes:
        if not any(news):
            continue
        ids = torch.cat([rows[row][starts[row] : starts[row] + news[row]] for row in range(3)])
        hidden = model(ids.unsqueeze(0), layout=BatchLayout.ragged(cache, starts, news))[0]
        for row, part in enumerate(hidden.split(news)):
            actual[row].append(part)
        starts = [start + new for start, new in zip(starts, news, strict=True)]
    for row, ids in enumerate(rows):
        if len(ids):
            torch.testing.assert_close(torch.cat(actual[row]), model(ids.unsqueeze(0))[0], atol=1e-9, rtol=1e-9)


def test_what_is_always_compiled_is_so_while_monitors_watch() -> None:
    """Alone where all modules run eagerly, and as a part of what is compiled around it."""
    inner, outer = CompileCounter(), CompileCounter()
    double = always_compiled(lambda x: 2 * x.sin(), backend=inner)
    around = torch.compile(lambda x: double(x) + 1, backend=outer, fullgraph=True)
    x = torch.randn(5)
    with uncompiled():
        torch.testing.assert_close(double(x), 2 * x.sin())
        assert inner.frame_count == 1
        torch.testing.assert_close(around(x), 2 * x.sin() + 1)
    assert outer.frame_count == 0
    torch.testing.assert_close(around(x), 2 * x.sin() + 1)
    assert (inner.frame_count, outer.frame_count) == (1, 1)


def test_a_copied_prefix_is_as_good_as_a_computed_one() -> None:
    model = random_model(50).double()
    cache = KVCache(model.config, 1, 16, dtype=torch.float64)
    ids = torch.randint(0, 50, (1, 9))
    model(ids, layout=BatchLayout.ragged(cache, [0], [9]))
    larger = KVCache(model.config, 3, 24, dtype=torch.float64)
    larger.copy_from(cache)
    larger.copy_slot(0, 2, 6)
    other = torch.cat((ids[:, :6], torch.randint(0, 50, (1, 4))), dim=1)
    actual = model(other[:, 6:], layout=BatchLayout.ragged(larger, [9, 0, 6], [0, 0, 4]))
    torch.testing.assert_close(actual, model(other)[:, 6:], atol=1e-9, rtol=1e-9)


def test_packed_documents_do_not_see_each_other() -> None:
    model = random_model(50).double()
    documents = [torch.randint(0, 50, (length,)) for length in (5, 8, 3)]
    ids = torch.cat(documents).unsqueeze(0)
    numbers = torch.cat([torch.full((len(d),), n) for n, d in enumerate(documents)]).unsqueeze(0)
    positions = torch.cat([torch.arange(len(d)) for d in documents]).unsqueeze(0)
    packed = model(ids, positions, block_diagonal_causal_mask(numbers))
    alone = torch.cat([model(d.unsqueeze(0)) for d in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-9, rtol=1e-9)


def test_later_ids_do_not_change_earlier_states() -> None:
    model = random_model(50).double()
    ids = torch.randint(0, 50, (1, 12))
    changed = ids.clone()
    changed[0, 8:] = (changed[0, 8:] + 7) % 50
    torch.testing.assert_close(model(ids)[:, :8], model(changed)[:, :8])


def test_dropout_is_active_in_training_only() -> None:
    model = random_model(50, dropout=0.5)
    ids = torch.randint(0, 50, (1, 12))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("name", sorted(SIZES))
def test_parameter_count_of_every_size_is_the_built_ones(name: str) -> None:
    config = named_size(name)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters


def test_paper_sizes() -> None:
    seven, thirty_four = SIZES["7b"], SIZES["34b"]
    assert (seven.layers, seven.width, seven.heads, seven.kv_heads, seven.ffn_width) == (32, 4096, 32, 32, 11008)
    assert (thirty_four.layers, thirty_four.width, thirty_four.heads, thirty_four.kv_heads) == (48, 8192, 64, 8)
    assert seven.dropout == 0.1 and thirty_four.norm_order == "swin"
    assert 6.9e9 < seven.parameters < 7.1e9 and 33e9 < thirty_four.parameters < 35e9


def test_tied_head_shares_its_weight() -> None:
    config = ModelConfig(
        vocab_size=20, layers=1, width=16, heads=2, kv_heads=2, ffn_width=16, context_length=8, tied_head=True
    )
    model = Transformer(config)
    assert model.head.weight is model.embed.weight
    assert sum(p.numel() for p in model.parameters()) == config.parameters


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(BadInput, match="heads 4 is not divisible by 3"):
        ModelConfig(width=32, heads=4, kv_heads=3)
    with pytest.raises(BadInput, match="did you mean tiny"):
        named_size("tini")
