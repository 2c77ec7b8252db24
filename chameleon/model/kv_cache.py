"""The KV cache: keys and values of all sequences in one static buffer, and the layout of a ragged batch over it.

The model reads and writes the cache through a `BatchLayout`: the new tokens of all sequences are concatenated into one row
without padding, so that one forward pass can prefill a long prompt of one sequence and decode one token of another.

Shapes: N new tokens in the batch, H heads, K kv heads, C head width, S cache slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chameleon.model.config import ModelConfig

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
LENGTH_MULTIPLE = 64
"""The cache's length is a multiple of this, and so are the numbers of keys that compiled and exact passes attend to."""
MAX_LENGTH_RATIO = 2
"""Sequences share one attention call while the longest is at most this many times as long as the shortest."""


class KVCache:
    """For each layer a buffer [sequences, kv_heads, length, head_width] of keys and one of values.

    Token t of a sequence is stored at position t of its slot; entries beyond a sequence's length are never read. What one
    head attends to lies in one piece of memory.
    """

    def __init__(
        self, config: ModelConfig, num_slots: int, length: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """num_slots: sequences that fit; length: tokens that fit in each slot; dtype: see `cache_dtype`."""
        shape = (num_slots, config.kv_heads, length, config.head_width)
        self.device = torch.device(device)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Return the bytes that one token of one sequence takes."""
        return 2 * config.layers * config.kv_heads * config.head_width * dtype.itemsize

    @property
    def num_slots(self) -> int:
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        """Tokens that fit in each slot."""
        return self.keys[0].shape[2]

    @torch.inference_mode()
    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    @torch.inference_mode()
    def zero_slot(self, slot: int) -> None:
        """Zero a slot."""
        for buffer in (*self.keys, *self.values):
            buffer[slot].zero_()

    @torch.inference_mode()
    def copy_from(self, other: KVCache) -> None:
        """Copy all slots of a smaller cache."""
        for target, source in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            target[: source.shape[0], :, : source.shape[2]] = source


class Run(NamedTuple):
    """New tokens of one slot, which are stored one after the other."""

    slot: int
    positions: slice
    """Where they go in the slot."""
    tokens: slice
    """Range of them in the batch."""


@dataclass(frozen=True)
class AttentionGroup:
    """Consecutive slots with equally many new tokens each, which share one attention call."""

    tokens: slice
    """Range of their new tokens in the batch."""
    new_length: int
    """New tokens of each slot; 1 too where each token of a single slot attends by itself."""
    slots: slice
    """Range of their slots in the cache."""
    kv_length: int
    """Keys that are attended to, new ones included."""
    mask: Tensor | None
    """bool [slots, 1, new tokens, kv_length], or None for causal attention (all keys, where there is one new token)."""


class BatchLayout:
    """Where the tokens of one ragged forward pass are stored in the cache and what they attend to."""

    def __init__(
        self, cache: KVCache, positions: Tensor, groups: Sequence[AttentionGroup], runs: Sequence[Run] | None = None
    ) -> None:
        """positions: int64 [N], each token's position in its slot. runs: where they are stored; None: one in each slot."""
        self.cache, self.positions, self.groups, self.runs = cache, positions, groups, runs
        if runs is None:
            _, kv_heads, length, _ = cache.keys[0].shape
            heads = torch.arange(len(positions) * kv_heads, device=positions.device).unflatten(0, (-1, kv_heads))
            self.rows = (heads * length + positions.unsqueeze(1)).flatten()
            """int64 [N · K]: where each head of each token is among the entries of all slots and heads."""

    @classmethod
    def ragged(
        cls,
        cache: KVCache,
        cached_lengths: Sequence[int],
        new_lengths: Sequence[int],
        positions: Tensor | None = None,
    ) -> BatchLayout:
        """Create the layout of a pass over the first slots of the cache, in order.

        Slot s has `cached_lengths[s]` tokens in the cache and `new_lengths[s]` tokens (possibly 0) in the batch.
        positions: int64 [1, N], the tokens' positions, where they are on the device already.
        """
        device = cache.device
        if positions is None:
            flat = [p for cached, new in zip(cached_lengths, new_lengths, strict=True) for p in range(cached, cached + new)]
            positions = torch.tensor([flat], device=device)
        groups = []
        first_slot, first_token = 0, 0
        while first_slot < len(cached_lengths):
            end_slot, shortest, longest = first_slot + 1, cached_lengths[first_slot], cached_lengths[first_slot]
            while end_slot < len(cached_lengths) and new_lengths[end_slot] == new_lengths[first_slot]:
                shortest, longest = min(shortest, cached_lengths[end_slot]), max(longest, cached_lengths[end_slot])
                if longest > MAX_LENGTH_RATIO * max(shortest, 1):
                    break
                end_slot += 1
            new, count = new_lengths[first_slot], end_slot - first_slot
            if new:
                tokens = slice(first_token, first_token + new * count)
                lengths = cached_lengths[first_slot:end_slot]
                kv_length = max(lengths) + new
                mask = None
                if any(cached != kv_length - new for cached in lengths) or (new > 1 and kv_length > new):
                    query_positions = positions[0, tokens].view(count, new)
                    mask = (torch.arange(kv_length, device=device) <= query_positions.unsqueeze(-1)).unsqueeze(1)
                groups.append(AttentionGroup(tokens, new, slice(first_slot, end_slot), kv_length, mask))
                first_token = tokens.stop
            first_slot = end_slot
        return cls(cache, positions[0], groups, runs_of(cached_lengths, new_lengths))

    @classmethod
    def exact(cls, cache: KVCache, cached_lengths: Sequence[int], new_lengths: Sequence[int]) -> BatchLayout:
        """Create the layout of a pass like `ragged`, in which each token attends by itself.

        The number of keys follows from the token's position alone, so that shapes do not depend on other tokens.
        """
        slots = [slot for slot, new in enumerate(new_lengths) for _ in range(new)]
        positions = [
            position
            for cached, new in zip(cached_lengths, new_lengths, strict=True)
            for position in range(cached, cached + new)
        ]
        flat_positions = torch.tensor(positions, device=cache.device)
        kv_lengths = [min(cache.length, (p // LENGTH_MULTIPLE + 1) * LENGTH_MULTIPLE) for p in positions]
        groups, first = [], 0
        while first < len(slots):
            end = first + 1
            while end < len(slots) and kv_lengths[end] == kv_lengths[first] and slots[end] == slots[first]:
                end += 1
            mask = torch.arange(kv_lengths[first], device=cache.device) <= flat_positions[first:end, None]
            slot_range = slice(slots[first], slots[first] + 1)
            groups.append(AttentionGroup(slice(first, end), 1, slot_range, kv_lengths[first], mask[:, None, None]))
            first = end
        return cls(cache, flat_positions, groups, runs_of(cached_lengths, new_lengths))

    @classmethod
    def one_token_each(cls, cache: KVCache, positions: Tensor, key_positions: Tensor) -> BatchLayout:
        """Create the layout of a decode step: one new token for each of the first slots, at positions [N].

        All slots attend to the keys at `key_positions`, 0 … S − 1, through a mask, so that the shapes are those of a
        compiled step.
        """
        count, kv_length = positions.shape[0], key_positions.shape[0]
        mask = (key_positions <= positions.unsqueeze(1))[:, None, None]
        return cls(cache, positions, [AttentionGroup(slice(0, count), 1, slice(0, count), kv_length, mask)])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFunction) -> Tensor:
        """Write keys and values to the cache and attend: q [1, N, H, C], k and v [1, N, K, C] to [1, N, H, C]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        self.store(keys, k[0])
        self.store(values, v[0])
        outputs = []
        for group in self.groups:
            # [slots, heads, tokens, C] each
            queries = q[0, group.tokens].unflatten(0, (-1, group.new_length)).transpose(1, 2)
            if group.new_length == group.kv_length:  # nothing is cached: attend in the dtype of the model
                group_keys, group_values = (
                    part[0, group.tokens].unflatten(0, (-1, group.new_length)).transpose(1, 2) for part in (k, v)
                )
            else:
                queries = queries.to(keys.dtype)
                group_keys = keys[group.slots, :, : group.kv_length]
                group_values = values[group.slots, :, : group.kv_length]
                if len(group_keys) < len(queries):  # several tokens of a slot, each by itself
                    group_keys = group_keys.expand(len(queries), -1, -1, -1)
                    group_values = group_values.expand(len(queries), -1, -1, -1)
            output = attention(queries, group_keys, group_values, group.mask)
            outputs.append(output.to(q.dtype).transpose(1, 2).flatten(0, 1))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)

    def store(self, buffer: Tensor, new: Tensor) -> None:
        """Write the new tokens' keys or values [N, K, C] to a buffer of the cache."""
        if self.runs is None:
            buffer.flatten(0, 2).index_copy_(0, self.rows, new.to(buffer.dtype).flatten(0, 1))
            return
        for run in self.runs:
            buffer[run.slot, :, run.positions] = new[run.tokens].transpose(0, 1)


def runs_of(cached_lengths: Sequence[int], new_lengths: Sequence[int]) -> list[Run] | None:
    """Return the runs of a pass over the first slots of the cache; None where each slot has one new token."""
    if all(new == 1 for new in new_lengths):
        return None
    runs, first = [], 0
    for slot, (cached, new) in enumerate(zip(cached_lengths, new_lengths, strict=True)):
        if new:
            runs.append(Run(slot, slice(cached, cached + new), slice(first, first + new)))
        first += new
    return runs


def cache_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the dtype of keys and values in the cache of a model of this dtype.

    On CPUs it is at least float32: attention of a few queries in bfloat16 takes 2 to 5 times as long there.
    """
    is_narrow = dtype.itemsize < torch.float32.itemsize
    return torch.float32 if is_narrow and torch.device(device).type == "cpu" else dtype
