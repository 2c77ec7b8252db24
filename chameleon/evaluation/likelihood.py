"""Log-likelihoods of continuations, many at a time, and bits per byte of documents.

Continuations that begin alike are put into one sequence as a tree: a task's examples, or a question with its choices, are
computed once. A mask lets each token attend to its ancestors alone (SpecInfer, arXiv 2305.09781, section 4.2, there for
drafts). A continuation that shares nothing is a tree without branches, whose attention is plainly causal. Log-probabilities
of text are over all tokens but image codes, as when text is generated and as Hugging Face's Chameleon has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chameleon.data.packing import split_long_documents
from chameleon.document import Document
from chameleon.generation.chameleon import Chameleon
from chameleon.generation.inspection import mask_image_codes
from chameleon.model.loss import chunked_cross_entropy

MIN_SHARED = 8
"""Tokens that two sequences begin with in common to be in one tree."""
TREE_TOKENS = 512
"""Tokens of a tree; of longer sequences as many as the longest has, twice over."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of a forward pass, padding included."""
LOGIT_ROWS = 1024
"""Positions whose logits exist at one time."""


class Continuation(NamedTuple):
    """Tokens whose log-likelihood is asked for, after a context of at least one token."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """Of a continuation."""

    log_likelihood: float
    """Natural logarithm of the probability of all its tokens."""
    is_greedy: bool
    """Whether each token is the likeliest one."""


@dataclass
class TokenTree:
    """Sequences as a tree. Token i of the tree follows its parent, −1 for a first token."""

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)
    """(parent, token id) → token of the tree."""
    sequences: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    """(request, tokens of the tree that predict, token ids that follow them) of each continuation."""

    def size_with(self, request: Continuation) -> int:
        """Return the size of the tree with another sequence; its last token predicts nothing and is left out."""
        node = -1
        inputs = [*request.context, *request.continuation][:-1]
        for depth, token_id in enumerate(inputs):
            following = self.children.get((node, token_id))
            if following is None:
                return len(self.token_ids) + len(inputs) - depth
            node = following
        return len(self.token_ids)

    def add(self, index: int, request: Continuation) -> None:
        """Add the sequence of request `index`."""
        node, path = -1, []
        for depth, token_id in enumerate([*request.context, *request.continuation][:-1]):
            following = self.children.get((node, token_id))
            if following is None:
                following = len(self.token_ids)
                self.children[node, token_id] = following
                self.token_ids.append(token_id)
                self.parents.append(node)
                self.depths.append(depth)
            node = following
            path.append(node)
        self.sequences.append((index, path[len(request.context) - 1 :], list(request.continuation)))

    @property
    def is_chain(self) -> bool:
        """Whether each token has one child at most, so that attention is causal."""
        return len(self.sequences) == 1

    def mask(self, size: int) -> Tensor:
        """Return bool [size, size]: each token attends to itself and its ancestors; padding to the first token alone."""
        mask = torch.zeros(size, size, dtype=torch.bool)
        rows = mask.numpy()
        for node, parent in enumerate(self.parents):  # a parent comes before its children
            if parent >= 0:
                rows[node] = rows[parent]
            rows[node, node] = True
        rows[len(self.parents) :, 0] = True
        return mask


def build_trees(requests: Sequence[Continuation]) -> list[TokenTree]:
    """Return trees that hold all requests; those that begin alike are together."""
    sequences = [[*request.context, *request.continuation] for request in requests]
    limit = max(TREE_TOKENS, 2 * max((len(sequence) - 1 for sequence in sequences), default=0))
    trees: list[TokenTree] = []
    previous: list[int] = []
    for index in sorted(range(len(requests)), key=sequences.__getitem__):
        is_alike = previous[:MIN_SHARED] == sequences[index][:MIN_SHARED]
        if not (trees and is_alike and trees[-1].size_with(requests[index]) <= limit):
            trees.append(TokenTree())
        trees[-1].add(index, requests[index])
        previous = sequences[index]
    return trees


def batches_of(trees: Sequence[TokenTree], max_tokens: int) -> Iterator[list[TokenTree]]:
    """Yield trees of about the same size together, as many as fit; those without branches by themselves."""
    batch: list[TokenTree] = []
    for tree in sorted(trees, key=lambda tree: (tree.is_chain, -len(tree.token_ids))):
        is_full = (len(batch) + 1) * max(len(tree.token_ids) for tree in [tree, *batch[:1]]) > max_tokens
        if batch and (is_full or tree.is_chain != batch[0].is_chain):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


@torch.inference_mode()
def log_likelihoods(model: Chameleon, requests: Sequence[Continuation]) -> list[Likelihood]:
    """Return the log-likelihood of each continuation, in order.

    A sequence that is longer than the context loses tokens at its beginning, but for the first, `bos`.
    """
    limit = model.model.config.context_length
    fitted = [truncate_left(request, limit) for request in requests]
    results: list[Likelihood | None] = [None] * len(requests)
    device = model.engine.device
    for batch in batches_of(build_trees(fitted), BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])):
        size = len(batch[0].token_ids)
        token_ids, positions = (torch.zeros(len(batch), size, dtype=torch.int64) for _ in range(2))
        for row, tree in enumerate(batch):
            token_ids[row, : len(tree.token_ids)] = torch.tensor(tree.token_ids)
            positions[row, : len(tree.depths)] = torch.tensor(tree.depths)
        mask = None
        if not batch[0].is_chain:
            mask = torch.stack([tree.mask(size) for tree in batch]).unsqueeze(1).to(device)
        hidden = model.model(token_ids.to(device), positions.to(device), mask)
        nodes, targets, sizes, indices = [], [], [], []
        for row, tree in enumerate(batch):
            for index, path, following in tree.sequences:
                nodes += [row * size + node for node in path]
                targets += following
                sizes.append(len(path))
                indices.append(index)
        log_probs, is_likeliest = target_log_probs(model, hidden.flatten(0, 1), nodes, targets)
        for index, values, greedy in zip(indices, log_probs.split(sizes), is_likeliest.split(sizes), strict=True):
            results[index] = Likelihood(float(values.double().sum()), bool(greedy.all()))
    return [result for result in results if result is not None]


def target_log_probs(
    model: Chameleon, hidden: Tensor, nodes: Sequence[int], targets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the log-probability [N] of each target after its node of `hidden` [tokens, D], and whether it is likeliest."""
    chosen = torch.tensor(nodes, device=hidden.device)
    unique, inverse = chosen.unique(return_inverse=True)  # sequences that differ late share the tokens before
    wanted = torch.tensor(targets, device=hidden.device)
    order = inverse.argsort(stable=True)
    log_probs = torch.empty(len(nodes), device=hidden.device)
    is_likeliest = torch.empty(len(nodes), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(unique), LOGIT_ROWS):
        logits = mask_image_codes(model, model.model.logits(hidden[unique[start : start + LOGIT_ROWS]]).float())
        values, likeliest = logits.log_softmax(-1), logits.argmax(-1)
        low, high = torch.searchsorted(
            inverse[order], torch.tensor([start, start + LOGIT_ROWS], device=hidden.device)
        ).tolist()
        rows = order[low:high]
        local = inverse[rows] - start
        log_probs[rows] = values[local, wanted[rows]]
        is_likeliest[rows] = likeliest[local] == wanted[rows]
    return log_probs.cpu(), is_likeliest.cpu()


def truncate_left(request: Continuation, limit: int) -> Continuation:
    """Return a request of at most `limit` inputs: the first token of the context stays, the ones after it are dropped."""
    excess = len(request.context) + len(request.continuation) - 1 - limit
    if excess <= 0:
        return request
    if excess < len(request.context) - 1:
        return Continuation([request.context[0], *request.context[1 + excess :]], request.continuation)
    return Continuation([request.context[0]], request.continuation[-limit:])


@torch.inference_mode()
def document_bits(model: Chameleon, documents: Sequence[Document]) -> list[float]:
    """Return the bits of text documents over the whole vocabulary, the end of each included.

    A document longer than the context length is split into segments, which are read without the text before them, so the
    value is an upper bound for long documents.
    """
    return [document_nats(model, document) / math.log(2) for document in documents]


def document_nats(model: Chameleon, document: Document) -> float:
    token_ids, nats = model.encode(document), 0.0
    bounds = (np.array([0]), np.array([len(token_ids)]))
    no_images = np.empty(0, dtype=int)
    segments = split_long_documents(*bounds, no_images, no_images, model.model.config.context_length)
    for _, start, size in zip(*segments, strict=True):
        segment = torch.cat((token_ids[:1], token_ids[start + 1 : start + 1 + size]))  # each segment follows bos
        hidden = model.model(segment[None, :-1].to(model.engine.device))[0]
        weights = torch.ones(len(segment) - 1, device=hidden.device)
        targets = segment[1:].to(hidden.device)
        nats += float(chunked_cross_entropy(hidden, model.model.head.weight, targets, weights, z_loss=0.0).loss)
    return nats
