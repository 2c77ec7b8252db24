"""The number of threads: by the work of an operation, by what other processes leave free, or as it is set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st

from chameleon.errors import BadInput
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.constraints import OutputConstraints
from chameleon.generation.engine import Engine
from chameleon.generation.request import Request
from chameleon.model.quantization import convert_weights
from chameleon.threads import (
    LOAD,
    THREADS,
    WORK_PER_THREAD,
    LoadMeter,
    Sample,
    ThreadPolicy,
    matrix_work,
    read_clocks,
    set_threads,
)
from chameleon.tokenizers.mixed import MixedTokenizer


class Readings:
    """Clocks of a machine of 4 processors on which others keep `others` of them busy, and this process one."""

    def __init__(self, others: float = 0.0) -> None:
        self.others, self.now, self.busy, self.own = others, 100.0, 7.0, 3.0

    def __call__(self) -> Sample:
        self.now += 1
        self.own += 1
        self.busy += 1 + self.others
        return Sample(self.now, self.busy, self.own)


def meter(others: float, monkeypatch: pytest.MonkeyPatch) -> LoadMeter:
    monkeypatch.setattr("chameleon.threads.MIN_INTERVAL", -1e9)  # each question reads the clocks anew
    return LoadMeter(Readings(others), processors=4)


def policy(others: float, monkeypatch: pytest.MonkeyPatch, threads: int | None = None) -> ThreadPolicy:
    result = ThreadPolicy(threads, meter(others, monkeypatch))
    result.maximum = 4
    return result


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = torch.get_num_threads(), THREADS.maximum
    yield
    assert torch.get_num_threads() == before[0]
    THREADS.threads, THREADS.meter, THREADS.maximum = None, LOAD, before[1]


def test_more_work_uses_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [policy(0, monkeypatch).choose(WORK_PER_THREAD * factor) for factor in (0, 0.5, 1.9, 2, 3.5, 4, 1000)]
    assert chosen == [1, 1, 1, 2, 3, 4, 4]
    assert policy(0, monkeypatch).choose() == 4
    assert matrix_work(1, 1000) < matrix_work(8, 1000) < matrix_work(8, 2000)


def test_processors_that_others_use_are_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for others, expected in ((0.1, 4), (0.9, 3), (1.0, 3), (2.2, 2), (3.0, 1), (4.0, 1), (40.0, 1)):
        assert policy(others, monkeypatch).choose() == expected, others


def test_a_number_that_is_set_is_used_whatever_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy(4, monkeypatch, threads=3).choose(0) == 3
    for count in (0, -1):
        with pytest.raises(BadInput, match=f"{count} threads; use 1 or more"):
            set_threads(count)
    set_threads(2)
    assert THREADS.choose(0) == THREADS.choose() == 2
    set_threads(None)
    assert THREADS.choose(0) == 1


def test_the_load_is_read_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chameleon.threads.MIN_INTERVAL", 1e9)
    readings = Readings(1.0)
    slow = LoadMeter(readings, processors=4)
    first = readings.now
    assert [slow.free_processors() for _ in range(100)] == [4.0] * 100  # nothing is known of so short a time
    assert readings.now == first


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-3, 10), st.floats(-3, 10)), min_size=1, max_size=5))
def test_odd_clocks_are_no_error(steps: list[tuple[float, float, float]]) -> None:
    """As of containers whose system tells nothing, or that were moved to another machine."""
    samples = iter([Sample(0, 0, 0), *(Sample(*step) for step in steps)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chameleon.threads.MIN_INTERVAL", -1e9)
        odd = LoadMeter(lambda: next(samples), processors=4)
        assert all(odd.free_processors() <= 4 for _ in steps)


def test_this_machine_has_clocks() -> None:
    before = read_clocks()
    while read_clocks().own - before.own < 0.03:  # some work of this process
        sum(range(10_000))
    after = read_clocks()
    assert after.time > before.time and after.busy >= before.busy


def test_the_threads_are_as_before_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.get_num_threads() + 1

    def fail() -> None:
        with policy(0, monkeypatch, threads=other).apply():
            assert torch.get_num_threads() == other
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def watch_threads(model: torch.nn.Module) -> list[tuple[int, int]]:
    """(tokens, threads) of each pass from here on."""
    seen: list[tuple[int, int]] = []

    def note(module: Any, inputs: Any) -> None:
        seen.append((inputs[0].shape[1], torch.get_num_threads()))

    model.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("others", [0.0, 3.0])
def test_passes_use_what_their_tokens_are_worth(
    tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch, others: float
) -> None:
    v = tokenizer.vocabulary
    model = random_model(v.size)
    largest = max(p.numel() for p in model.blocks[0].parameters())  # type: ignore[union-attr]
    assert model.config.largest_matrix == largest
    convert_weights(model, "packed")  # whose matrices are no parameters any more
    monkeypatch.setattr("chameleon.threads.WORK_PER_THREAD", matrix_work(20, largest) / 2)
    THREADS.meter, THREADS.maximum = meter(others, monkeypatch), 4
    seen = watch_threads(model)
    prompt = (v.bos, *[v.text_start] * 40, v.sep)
    Engine(model, v, weight_format="packed").generate([Request(prompt, OutputConstraints(5))])
    assert seen[0] == (42, 3 if others == 0 else 1)
    assert set(seen[1:]) == {(1, 1)}


def test_pictures_use_what_is_free(chameleon: Chameleon, bundle_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But data are tokenized with one number of threads, so that codes do not depend on the load."""
    model = Chameleon.load(bundle_folder, dtype="float32", weight_format="plain")
    monkeypatch.setattr("chameleon.threads.WORK_PER_THREAD", 1.0)
    THREADS.meter, THREADS.maximum = meter(2.0, monkeypatch), 4
    seen: list[int] = []
    for network in (model.tokenizer.image.network, chameleon.tokenizer.image.network):
        for name in ("encode", "decode"):
            method = getattr(network, name)
            monkeypatch.setattr(network, name, lambda x, m=method: (seen.append(torch.get_num_threads()), m(x))[1])
    (image,) = model.draw_samples("heart", 1)
    model.tokenizer.image.encode([image])
    assert seen == [2, 2]
    before = torch.get_num_threads()
    chameleon.tokenizer.image.encode([image])
    assert seen[2:] == [before]
