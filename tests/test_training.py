"""Training: what decays, Muon against its formula, rows from the codebook, validation, several processes, the VQGAN."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model

from chameleon.errors import BadInput
from chameleon.tokenizers.mixed import MixedTokenizer
from chameleon.train.language import add_codebook_rows, fold_codebook_rows
from chameleon.train.optimizer import OptimizerConfig, build_optimizers


def test_matrices_decay_and_norms_do_not() -> None:
    """With zero gradients AdamW only decays: what shrank is what decays."""
    model = random_model(20).requires_grad_(True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    (optimizer,) = build_optimizers(model, OptimizerConfig(rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 1.0 if "norm" in name else 0.95
        torch.testing.assert_close(value.detach(), before[name] * factor, msg=name)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    """Its step is the orthogonal matrix nearest to the gradient, scaled to AdamW's size (arXiv 2502.16982, eq. 4)."""
    model = random_model(20).requires_grad_(True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    muon, adamw = build_optimizers(model, OptimizerConfig(kind="muon", rate=0.01, weight_decay=0.0))
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not taken & rest
    assert taken | rest == {id(p) for p in model.parameters()}
    assert len(taken) == 4 * len(model.blocks)
    assert id(model.embed.weight) in rest
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    for name, value in model.named_parameters():
        step = (before[name] - value.detach()) / 0.01
        if id(value) in taken:
            left, _, right = torch.linalg.svd(value.grad, full_matrices=False)  # the nearest orthogonal is left · right
            wanted = left @ right * 0.2 * max(step.shape) ** 0.5
            torch.testing.assert_close(step.norm(), wanted.norm(), rtol=0.25, atol=0.0)
            assert torch.cosine_similarity(step.flatten(), wanted.flatten(), dim=0) > 0.97, name
        else:
            assert not step.any(), name


def test_codebook_rows_share_and_fold(tokenizer: MixedTokenizer) -> None:
    v = tokenizer.vocabulary
    model = random_model(v.size).requires_grad_(True)
    codebook = torch.randn(v.image_count, 5)
    codebook[1] = codebook[0]
    plain = model.embed.weight.detach().clone()
    add_codebook_rows(model, codebook, v)
    assert torch.equal(model.embed.weight, plain)  # starts as nothing
    model.embed(torch.tensor([v.image_start])).sum().backward()
    with torch.no_grad():
        for parameter in model.embed.parametrizations.parameters():
            parameter -= parameter.grad
    moved = (model.embed.weight - plain).detach()
    shared = moved[v.image_start + 1]  # a code with the same entry moves too, though it was not in the batch
    assert shared.abs().min() > 0
    torch.testing.assert_close(moved[v.image_start], shared - 1)
    assert not moved[: v.image_start].any()
    assert not moved[v.text_start :].any()
    ids = torch.randint(0, v.size, (2, 9))
    before = model.logits(model(ids)).detach()
    names = set(random_model(v.size).state_dict())
    fold_codebook_rows(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model.logits(model(ids)).detach(), before)


def test_a_tied_head_has_no_rows_of_its_own(tokenizer: MixedTokenizer) -> None:
    model = random_model(tokenizer.vocabulary.size, tied_head=True)
    with pytest.raises(BadInput, match="tied_head"):
        add_codebook_rows(model, torch.randn(tokenizer.vocabulary.image_count, 5), tokenizer.vocabulary)
