"""Chunked cross-entropy against the plain formula, in value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon.model import loss
from chameleon.model.loss import chunked_cross_entropy, cut_cross_entropy


def plain(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, z: float) -> torch.Tensor:
    logits = hidden @ head.t()
    each = F.cross_entropy(logits, targets, reduction="none") + z * logits.logsumexp(1).square()
    return (each * weights).sum()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 50),
    chunk=st.integers(1, 64),
    z=st.sampled_from([0.0, 1e-5, 0.1]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_equal_the_plain_formula(rows: int, vocabulary: int, chunk: int, z: float, seed: int) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(vocabulary, 6, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, vocabulary, (rows,)), torch.rand(rows) * (torch.rand(rows) > 0.3)
    ours = chunked_cross_entropy(hidden, head, targets, weights, z_loss=z, chunk=chunk).loss
    ours.backward()
    ours_grads = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    expected = plain(hidden, head, targets, weights.double(), z)
    expected.backward()
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-5)
    for got, grad in zip(ours_grads, (hidden.grad, head.grad), strict=True):
        torch.testing.assert_close(got, grad, atol=1e-5, rtol=1e-4)


def test_processes_with_parts_of_other_sizes_use_the_same_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They exchange numbers for each chunk. Rows 32,769 and 32,768 would give 255 and 256 tokens."""
    chunks = []

    def apply(hidden: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        chunks.append(arguments[4])
        return (torch.zeros(len(hidden)),) * 3

    monkeypatch.setattr(loss.ChunkedCrossEntropy, "apply", apply)
    assert loss.loss_chunk_size(32_769, "cpu") != loss.loss_chunk_size(32_768, "cpu")
    for rows in (32_769, 32_768):
        part = loss.VocabularyPart(first_row=0, max_rows=32_769, group=None)
        hidden, head, targets = torch.zeros(2, 1), torch.zeros(rows, 1), torch.zeros(2, dtype=torch.int64)
        chunked_cross_entropy(hidden, head, targets, torch.ones(2), part=part)
    assert chunks[0] == chunks[1]


def test_scaled_loss_scales_gradients() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets, weights = torch.randint(0, 9, (5,)), torch.ones(5)
    chunked_cross_entropy(hidden, head, targets, weights).loss.backward()
    once = hidden.grad.clone()
    hidden.grad = None
    (3 * chunked_cross_entropy(hidden, head, targets, weights).loss).backward()
    torch.testing.assert_close(hidden.grad, 3 * once)


def test_rows_of_weight_zero_cost_and_report_nothing() -> None:
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(6, 4), torch.randn(9, 4), torch.randint(0, 9, (6,))
    weights = torch.tensor([1.0, 0, 1, 0, 0, 1])
    result = chunked_cross_entropy(hidden, head, targets, weights)
    assert torch.equal(result.nll == 0, weights == 0)
    nll = F.cross_entropy(hidden @ head.t(), targets, reduction="none")
    torch.testing.assert_close(result.nll[weights > 0], nll[weights > 0])
    torch.testing.assert_close(result.log_z[weights > 0], (hidden @ head.t()).logsumexp(1)[weights > 0])


def test_all_weights_zero() -> None:
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    result = chunked_cross_entropy(hidden, head, torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    result.loss.backward()
    assert result.loss.item() == 0 and not hidden.grad.any()


def test_never_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = torch.Tensor.logsumexp

    def watched(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "logsumexp", watched)
    hidden = torch.randn(1000, 8, requires_grad=True)
    head = torch.randn(64, 8, requires_grad=True)
    chunked_cross_entropy(hidden, head, torch.zeros(1000, dtype=torch.int64), torch.ones(1000), chunk=100)
    assert largest == 100 * 64


@pytest.mark.slow
def test_cut_cross_entropy_is_the_same() -> None:
    """By the package's own implementation for CPUs; its kernels need a GPU."""
    pytest.importorskip("cut_cross_entropy")
    torch.manual_seed(0)
    hidden, head = torch.randn(200, 32, requires_grad=True), torch.randn(300, 32, requires_grad=True)
    targets, weights = torch.randint(0, 300, (200,)), torch.rand(200) * (torch.arange(200) % 3 > 0)
    ours, theirs = (f(hidden, head, targets, weights, z_loss=1e-2) for f in (chunked_cross_entropy, cut_cross_entropy))
    for name in ("nll", "log_z"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(result.loss, (hidden, head)) for result in (ours, theirs)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
