"""Packing, the index over rows, and the order in which a run sees them."""

from __future__ import annotations

import math
import operator
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from chameleon.data.index import RowIndex
from chameleon.data.mixture import (
    PATTERN_LENGTH,
    Mixture,
    PackedBatch,
    PackedSource,
    SourceConfig,
    StageConfig,
    permuted_index,
    splitmix64,
    stage_weights,
)
from chameleon.data.packing import pack, split_long_documents
from chameleon.data.token_shards import complete_image_starts, open_shards, write_shard
from chameleon.errors import BadInput
from chameleon.tokenizers.mixed import MixedTokenizer, answer_mask
from chameleon.train.language_data import PackedBatchDataset, ValidationDataset
from chameleon.train.recipe import PretrainRecipe, read_recipe
from chameleon.vocabulary import Vocabulary

# --- packing ---


def packed_one_by_one(lengths: list[int], context_length: int) -> list[list[int]]:
    """Best fit by falling length as it is defined: each item goes into the fullest row that has room for it."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= context_length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@settings(max_examples=300)
@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_packing_is_best_fit_by_falling_length(case: tuple[int, list[int]]) -> None:
    context_length, lengths = case
    counts = np.bincount(lengths, minlength=context_length + 1) if lengths else np.zeros(context_length + 1, dtype=int)
    groups = pack(counts, context_length)
    used: dict[int, list[int]] = {}
    rows = []
    for group in groups:
        for row in range(group.num_rows):
            rows.append([run.length for run in group.item_runs for _ in range(run.per_row)])
            for length, each, first in group.item_runs:
                used.setdefault(length, []).extend(range(first + row * each, first + (row + 1) * each))
    assert all(sorted(actual) == list(range(counts[length])) for length, actual in used.items())  # each item once
    assert sum(map(len, used.values())) == len(lengths)
    expected = packed_one_by_one(lengths, context_length)
    assert sorted(map(sum, rows)) == sorted(map(sum, expected))


def test_packing_fills_captions_and_long_documents(tmp_path: Path) -> None:
    """99% and more of short captions with documents that often exceed the context, in a long and in a short one."""
    stream = np.random.default_rng(0)
    lengths = np.concatenate((stream.integers(8, 80, 20_000), stream.lognormal(6.5, 1.5, 5000).astype(int) + 2))
    v = Vocabulary.build(image_codes=4, text_pieces=4, grid=(2, 3))
    with write_shard(tmp_path / "s", "print", v) as writer:
        for length in lengths.tolist():
            writer.add(torch.full((length,), v.text_start))
    for context_length in (4096, 512):
        assert lengths.max() > 4 * context_length
        index = RowIndex(open_shards(tmp_path), context_length, v)
        assert index.num_targets == (lengths - 1).sum()
        assert index.fill > 0.99
        assert sum(piece.size for row in range(len(index)) for piece in index[row]) == index.num_targets


@settings(max_examples=300)
@given(st.lists(st.lists(st.one_of(st.integers(1, 15), st.just("picture")), max_size=12), max_size=4), st.integers(8, 30))
def test_cutting_never_parts_a_picture(documents: list[list[int | str]], context_length: int) -> None:
    v = Vocabulary.build(image_codes=4, text_pieces=4, grid=(2, 3))
    ids: list[int] = []
    offsets = [0]
    for parts in documents:
        ids.append(v.bos)
        for part in parts:
            ids += [v.boi, *[v.image_start] * 6, v.eoi] if part == "picture" else [v.text_start] * int(part)
        ids.append(v.eos)
        offsets.append(len(ids))
    bounds = np.array(offsets)
    image_starts = complete_image_starts(np.array(ids, dtype=int), v)
    image_lengths = np.full(len(image_starts), v.dialect.length(v.grid))
    output = split_long_documents(bounds[:-1], bounds[1:], image_starts, image_lengths, context_length)
    for number in range(len(documents)):
        mine = output.document == number
        begins, sizes = output.start[mine].tolist(), output.size[mine].tolist()
        targets = [t for start, size in zip(begins, sizes, strict=True) for t in range(start + 1, start + size + 1)]
        whole = ids[offsets[number] : offsets[number + 1]]
        assert targets == list(range(1, len(whole)))
        for start, size in zip(begins, sizes, strict=True):
            assert 0 < size <= context_length
            read = whole[start + 1 : start + size + 1]
            assert read.count(v.boi) == read.count(v.eoi)
            after = whole[start + size + 1 : start + size + 2]
            longer = size < context_length and after and after[0] != v.boi
            assert not longer  # no shorter than it has to be


def test_a_picture_longer_than_the_context_is_named() -> None:
    with pytest.raises(BadInput, match="an image takes 18 tokens, context_length is 10"):
        split_long_documents(np.array([0]), np.array([40]), np.array([3]), np.array([18]), 10)


# --- the mixture ---


@pytest.fixture
def mixture(tmp_path: Path, tokenizer: MixedTokenizer) -> Mixture:
    v = tokenizer.vocabulary
    stream = np.random.default_rng(0)
    picture = [v.boi, *[v.image_start] * 16, v.eoi]
    with write_shard(tmp_path / "pairs" / "s", tokenizer.fingerprint, v) as writer:
        for n in range(30):
            writer.add(torch.tensor([v.bos, *picture, *[v.text_start + n] * int(stream.integers(1, 6)), v.eos]))
    with write_shard(tmp_path / "talk" / "s", tokenizer.fingerprint, v) as writer:
        for n in range(20):
            writer.add(torch.tensor([v.bos, *[v.text_start] * 3, v.sep, *[v.text_start + n] * 4, v.eos]))
    return Mixture(
        [SourceConfig(str(tmp_path / "pairs"), 3.0), SourceConfig(str(tmp_path / "talk"), 1.0, loss="answers")],
        context_length=50,
        global_batch_size=6,
        seed=3,
        vocabulary=v,
        fingerprint=tokenizer.fingerprint,
    )


def test_any_number_of_devices_sees_the_same_batch(mixture: Mixture) -> None:
    for step in (0, 5, 1234):
        whole = mixture.batch(step)
        for world in (2, 3):
            parts = [mixture.batch(step, rank, world) for rank in range(world)]
            for rank, part in enumerate(parts):
                assert torch.equal(part.input_ids, whole.input_ids[rank::world])


def test_workers_and_resuming_change_nothing(mixture: Mixture, tokenizer: MixedTokenizer) -> None:
    """Steps 40 … 47 in order, in two worker processes, and from a mixture made anew that has seen nothing before."""
    expected = [mixture.batch(step) for step in range(48)][40:]
    configs = [source.config for source in mixture.sources]
    fixed: dict[str, Any] = {"context_length": 50, "global_batch_size": 6, "vocabulary": tokenizer.vocabulary}
    fresh = Mixture(configs, seed=3, **fixed)
    loader = DataLoader(PackedBatchDataset(fresh, 48), batch_size=None, num_workers=2, sampler=range(40, 48))
    for batch, actual in zip(expected, loader, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, actual, strict=True))
    assert not torch.equal(Mixture(configs, seed=4, **fixed).batch(40).input_ids, expected[0].input_ids)


def test_noise_replaces_codes_of_prompts_alone(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """A share between 0 and `image_noise`, the same each time; text, pictures in answers and their targets stay."""
    v = tokenizer.vocabulary
    shown, drawn = ([v.boi, *[v.image_start + code] * 16, v.eoi] for code in (0, 1))
    with write_shard(tmp_path / "talk" / "s", tokenizer.fingerprint, v) as writer:
        for n in range(400):
            writer.add(torch.tensor([v.bos, *shown, v.text_start, v.sep, *drawn, v.text_start + n % 5, v.eos]))

    def rows(**options: Any) -> list[Any]:
        config = SourceConfig(str(tmp_path / "talk"), loss="answers", **options)
        source = PackedSource(config, 45, v, tokenizer.fingerprint)
        return [source.row(row, epoch=0, seed=1) for row in range(len(source))]

    plain, noisy = rows(), rows(image_noise=0.4)
    shares = []
    for before, after, again in zip(plain, noisy, rows(image_noise=0.4), strict=True):
        assert torch.equal(after.input_ids, again.input_ids)
        is_shown = before.input_ids == v.image_start
        assert torch.equal(after.input_ids[~is_shown], before.input_ids[~is_shown])
        assert v.is_image(after.input_ids[is_shown]).all()
        assert torch.equal(after.targets[after.loss_weights > 0], before.targets[before.loss_weights > 0])
        assert torch.equal(after.loss_weights, before.loss_weights)
        shares.append(float((after.input_ids != before.input_ids)[is_shown].float().mean()))
    expected = 0.2 * (1 - 1 / v.num_image_codes)  # the mean of the shares; one code in so many is replaced by itself
    assert len(shares) == 400 and np.mean(shares) == pytest.approx(expected, abs=0.03)
    assert np.std(shares) > 0.12  # that of one share for all documents would be 0.1
    with pytest.raises(BadInput, match="image_noise of talk"):
        stage_weights([SourceConfig("talk", image_noise=0.1)], [])


def test_a_row_reads_its_own_documents_alone(mixture: Mixture) -> None:
    source = mixture.sources[0]
    before = [source.row(number, 0, 3) for number in range(len(source))]
    (shard,) = source.shards
    path, offsets = shard.folder / "ids.bin", shard.offsets
    whole = path.read_bytes()
    for number, row in enumerate(before):
        kept = bytearray(len(whole))
        for piece in source.index[number]:
            mine = slice(4 * int(offsets[piece.document]), 4 * int(offsets[piece.document + 1]))
            kept[mine] = whole[mine]
        path.write_bytes(kept)
        assert all(torch.equal(a, b) for a, b in zip(source.row(number, 0, 3), row, strict=True))


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order(mixture: Mixture) -> None:
    seen: dict[tuple[int, int], list[int]] = {}
    for number in range(4000):
        source, epoch, row = mixture.locate(number)
        seen.setdefault((source, epoch), []).append(row)
    for source in (0, 1):
        count = len(mixture.sources[source])
        first, second = seen[source, 0], seen[source, 1]
        assert sorted(first) == sorted(second) == list(range(count))
        assert first != second


def tokens_drawn(mixture: Mixture, first: int, last: int) -> np.ndarray:
    """Shares of the targets in a stretch of rows, by source."""
    sources = np.array([mixture.locate(number)[0] for number in range(first, last)])
    tokens = np.bincount(sources, minlength=len(mixture.sources)) * [source.tokens_per_row for source in mixture.sources]
    return tokens / tokens.sum()


def test_weights_are_shares_of_tokens(mixture: Mixture) -> None:
    assert tokens_drawn(mixture, 0, PATTERN_LENGTH) == pytest.approx([0.75, 0.25], abs=1e-3)
    assert len({round(source.tokens_per_row) for source in mixture.sources}) == 2  # so rows would not do


def test_rows_hold_targets_positions_and_masks(mixture: Mixture) -> None:
    v = mixture.sources[0].vocabulary
    batch = mixture.batch(0)
    for ids, targets, weights, numbers, positions in zip(*batch, strict=True):
        for number in numbers.unique().tolist():
            here = numbers == number
            assert torch.equal(positions[here], torch.arange(int(here.sum())))
            if (ids[here] == v.pad).all():
                assert not weights[here].any()
                continue
            document = torch.cat((ids[here], targets[here][-1:]))
            assert document[0] == v.bos and document[-1] == v.eos
            assert torch.equal(document[1:], targets[here])
            if (document == v.sep).any():
                assert torch.equal(weights[here].bool(), torch.from_numpy(answer_mask(document.numpy(), v)[1:]))
            else:
                assert weights[here].all()


def test_a_conversation_cut_in_two_keeps_its_targets_and_its_mask(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    """Each id but the first is a target once, and the loss lies where it lies in the whole conversation."""
    v, stream = tokenizer.vocabulary, np.random.default_rng(1)
    ids = [v.bos]
    for _ in range(12):
        prompt, answer = ([v.text_start + int(n) for n in stream.integers(0, 50, stream.integers(1, 9))] for _ in range(2))
        ids += [*prompt, v.sep, *answer, v.eos]
    whole = torch.tensor(ids)
    with write_shard(tmp_path / "s", "print", v) as writer:
        writer.add(whole)
    source = PackedSource(SourceConfig(str(tmp_path), loss="answers"), 24, v, "print")
    pieces = [source.index[number] for number in range(len(source))]
    assert sum(map(len, pieces)) > 3
    actual: dict[int, tuple[int, float]] = {}
    for number, row in enumerate(pieces):
        output = source.row(number, 0, 0)
        place = 0
        for piece in row:
            for target in range(piece.start + 1, piece.start + piece.size + 1):
                assert target not in actual
                actual[target] = (int(output.targets[place]), float(output.loss_weights[place]))
                assert int(output.input_ids[place]) == ids[target - 1]
                place += 1
    assert sorted(actual) == list(range(1, len(ids)))
    assert [actual[n][0] for n in sorted(actual)] == ids[1:]
    assert [bool(actual[n][1]) for n in sorted(actual)] == answer_mask(whole.numpy(), v)[1:].tolist()


def test_rows_that_do_not_divide_by_devices_are_refused(mixture: Mixture) -> None:
    with pytest.raises(BadInput, match="global_batch_size 6 is not divisible by 4 devices; 4 is"):
        mixture.batch(0, 0, 4)


@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (3, 2), (2, 50)])
def test_validation_sees_each_row_of_each_source_once(mixture: Mixture, world: int, batch_size: int) -> None:
    """Whatever the weights, 3 and 1 here, of sources that have other numbers of rows."""
    expected = [source.row(number, 0, 3) for source in mixture.sources for number in range(len(source))]
    assert len({len(source) for source in mixture.sources}) == 2
    seen = []
    for rank in range(world):
        dataset = ValidationDataset(mixture, batch_size, rank=rank, world=world)
        batches = [dataset[index] for index in range(len(dataset))]
        assert len(batches) == math.ceil(len(expected) / (world * batch_size))
        for row in (row for batch in batches for row in zip(*batch, strict=True)):
            if PackedBatch(*row).loss_weights.any():
                seen.append(row)
    key = operator.methodcaller("tolist")
    assert sorted([key(v) for v in row] for row in seen) == sorted([key(v) for v in row] for row in expected)


def test_a_source_without_answers_is_refused_where_the_loss_is_on_them(mixture: Mixture, tokenizer: MixedTokenizer) -> None:
    pairs = mixture.sources[0].config.shards
    with pytest.raises(BadInput, match=r"pairs: no answer to take the loss on; use loss: all"):
        PackedSource(SourceConfig(pairs, loss="answers"), 50, tokenizer.vocabulary, None)


def test_half_of_the_pairs_have_their_text_first(mixture: Mixture) -> None:
    source = mixture.sources[0]
    v = source.vocabulary
    first = 0
    for epoch in range(20):
        for number in range(30):
            ids = source.maybe_swap(source.shards[0][number], (3, epoch, number))
            first += bool(v.is_text(torch.tensor(ids[1])))
            assert sorted(ids) == sorted(source.shards[0][number])
    assert 0.42 < first / 600 < 0.58


@pytest.mark.parametrize(
    ("sources", "stages", "message"),
    [
        ([], [], "no source"),
        ([SourceConfig("a", 0.0)], [], "positive weights"),
        ([SourceConfig("a"), SourceConfig("b", -1.0)], [], "weight of b is -1.0"),
        ([SourceConfig("a", float("nan"))], [], "weight of a is nan"),
        ([SourceConfig("a"), SourceConfig("b", 0.0)], [], "weight of b is 0 in all stages"),
        ([SourceConfig("x/a"), SourceConfig("y/a")], [], "two sources are named a"),
        ([SourceConfig("a")], [StageConfig(1.5)], "stage starts at 1.5"),
        ([SourceConfig("a")], [StageConfig(0.5), StageConfig(0.5)], "rising fractions"),
        ([SourceConfig("pairs")], [StageConfig(0.5, {"pair": 1})], "no source pair; did you mean pairs?"),
        ([SourceConfig("a")], [StageConfig(0.5, {"a": -2})], "weight of a is -2"),
    ],
)
def test_invalid_mixtures_are_refused(
    sources: list[SourceConfig], stages: list[StageConfig], message: str, tokenizer: MixedTokenizer
) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        Mixture(
            sources,
            context_length=8,
            global_batch_size=1,
            seed=0,
            vocabulary=tokenizer.vocabulary,
            stages=stages,
            max_steps=10,
        )


def test_stages_change_weights_and_lose_no_row(mixture: Mixture, tokenizer: MixedTokenizer) -> None:
    sources = [source.config for source in mixture.sources]
    sources[1].weight = 0.0
    steps = 5000
    staged = Mixture(
        sources,
        context_length=50,
        global_batch_size=6,
        seed=3,
        vocabulary=tokenizer.vocabulary,
        stages=[StageConfig(0.4, {"talk": 1.0}), StageConfig(0.8, {"pairs": 1.0, "talk": 4.0})],
        max_steps=steps,
    )
    bounds = [0, 12_000, 24_000, 30_000]
    shares = [tokens_drawn(staged, *pair)[1] for pair in pairwise(bounds)]
    assert shares == pytest.approx([0, 0.25, 0.8], abs=0.01)
    # Over the bounds of stages too, each source gives its rows one after the other: whole epochs, nothing twice.
    for source in (0, 1):
        given = [staged.locate(number)[1:] for number in range(30_000) if staged.locate(number)[0] == source]
        count = len(staged.sources[source])
        for epoch in range(len(given) // count):
            part = given[epoch * count : (epoch + 1) * count]
            assert {number for number, _ in part} == {epoch} and len({row for _, row in part}) == count


def test_the_shipped_recipe_has_the_papers_stages() -> None:
    recipe = read_recipe(PretrainRecipe, "7b-pretrain")
    first, second = stage_weights(recipe.mixture, recipe.stages)
    names = [source.display_name for source in recipe.mixture]
    assert recipe.stages[0].start == 0.8 and recipe.global_batch_size * (recipe.context_length or 0) == 2**23
    assert first[:3] == pytest.approx([2.9, 1.5, 0.4]) and not first[3:].any()
    assert second[:3] == pytest.approx(first[:3] / 2)
    pictures = [n for n, name in enumerate(names) if "pairs" in name or "interleaved" in name]
    shares = [row[pictures].sum() / row.sum() for row in (first, second)]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert recipe.run.max_steps * 2**23 == pytest.approx(9.2e12, rel=1e-6)


def test_balance_of_modalities(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    picture = [v.boi, *[v.image_start] * 16, v.eoi]
    answers = {"draw": picture, "say": [v.text_start] * 9, "code": [v.text_start] * 20}
    for name, answer in answers.items():
        with write_shard(tmp_path / name / "s", "print", v) as writer:
            for _ in range(40):
                writer.add(torch.tensor([v.bos, *picture, v.sep, *answer, v.eos]))
    sources = [
        SourceConfig(str(tmp_path / name), weight, "answers") for name, weight in (("say", 3), ("draw", 1), ("code", 1))
    ]
    fixed: dict[str, Any] = {
        "context_length": 60,
        "global_batch_size": 2,
        "seed": 0,
        "vocabulary": v,
        "balance_modalities": True,
    }
    actual = Mixture(sources, **fixed)
    assert tokens_drawn(actual, 0, PATTERN_LENGTH) == pytest.approx([0.375, 0.5, 0.125], abs=2e-3)
    with pytest.raises(BadInput, match="no source whose answers are mostly images"):
        Mixture([sources[0], sources[2]], **fixed)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_shuffling_is_a_permutation(count: int, key: int) -> None:
    assert sorted(permuted_index(place, count, key) for place in range(count)) == list(range(count))


def test_shuffling_looks_random() -> None:
    """Where the first of twenty goes over many keys, and its distance to the second: each place as often (chi-square)."""
    count, keys = 20, 20_000
    for function in (
        lambda key: permuted_index(0, count, key),
        lambda key: (permuted_index(1, count, key) - permuted_index(0, count, key)) % count - 1,
    ):
        values = np.bincount([function(splitmix64(7, key)) for key in range(keys)])
        expected = keys / len(values)
        degrees = len(values) - 1
        assert ((values - expected) ** 2 / expected).sum() < degrees + 5 * np.sqrt(2 * degrees)


def test_epochs_see_the_variants_in_turn(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    with write_shard(tmp_path / "s", "print", v, variants=3) as writer:
        for n in range(4):
            writer.add(
                torch.tensor(
                    [[v.bos, v.boi, *[v.image_start + view] * 16, v.eoi, v.text_start + n, v.eos] for view in range(3)]
                )
            )
    source = PackedSource(SourceConfig(str(tmp_path)), 30, v, "print")
    for epoch in range(7):
        ids = source.row(0, epoch, 0).input_ids
        assert set(ids[v.is_image(ids)].tolist()) == {v.image_start + epoch % 3}


def test_sources_in_braces_share_rows(tmp_path: Path, tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    for name, length in (("a", 31), ("b", 21)):
        with write_shard(tmp_path / name / "s", "print", v) as writer:
            for _ in range(10):
                writer.add(torch.full((length,), v.text_start))
    source = PackedSource(SourceConfig(str(tmp_path / "{a,b}")), 50, v, "print")
    assert len(source) == 10 and source.index.fill == 1.0
