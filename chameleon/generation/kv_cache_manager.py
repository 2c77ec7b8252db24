"""KV cache management: slots for sequences, growth of the buffers, and reuse of prefixes that are cached already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chameleon.device import free_memory
from chameleon.errors import BadInput
from chameleon.generation.prefix_index import PrefixIndex
from chameleon.model.config import ModelConfig
from chameleon.model.kv_cache import LENGTH_MULTIPLE, KVCache, cache_dtype

MIN_TOKENS_TO_WAIT_FOR = 16
"""A sequence waits for another one's prefill of the same prefix where that saves it at least so many tokens."""


@dataclass(eq=False)
class CachedSequence:
    """A sequence that has a slot of the cache. Active sequences occupy the first slots."""

    slot: int
    token_ids: list[int]
    """The prompt and all tokens after it; the first `num_cached` have keys and values in the cache."""
    num_cached: int
    prefix_source: CachedSequence | None = None
    """A sequence that is prefilling the same prefix: this one waits until it can copy `prefix_length` tokens from it."""
    prefix_length: int = 0
    last_hidden: Tensor | None = None
    """Hidden state [D] of the last token, kept until the request's other sequences are prefilled too."""
    is_active: bool = True

    @property
    def pending(self) -> list[int]:
        """The tokens that the model has not processed yet."""
        return self.token_ids[self.num_cached :]

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_cached


class KVCacheManager:
    """Allocates slots of a `KVCache`, which grows as needed and is kept between requests."""

    def __init__(
        self,
        config: ModelConfig,
        max_sequences: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        static_address: bool = False,
    ) -> None:
        """max_sequences: slots at most. dtype: that of the model.

        static_address: for CUDA graphs, which read the cache where it lies.
        """
        self.config, self.max_sequences, self.device = config, max_sequences, device
        self.dtype = cache_dtype(dtype, device)
        self.static_address = static_address
        self.num_prompt_tokens = self.num_reused_tokens = 0
        """Tokens of all prompts so far, and how many of them were in the cache already."""
        self.clear()

    def clear(self) -> None:
        """Drop all sequences and free the cache."""
        self.cache: KVCache | None = None
        self.sequences: list[CachedSequence] = []
        """The active sequences; sequence i has slot i."""
        self.index = PrefixIndex()

    # --- memory ---

    def reserve(self, num_sequences: int, length: int) -> bool:
        """Make room for `num_sequences` sequences in all, of up to `length` tokens.

        Returns False where that needs memory that active sequences occupy. Raises `BadInput` where it cannot fit even in
        an empty cache.
        """
        old = self.cache
        if old is not None and num_sequences <= old.num_slots and length <= old.length:
            return True
        token_bytes = KVCache.bytes_per_token(self.config, self.dtype)
        length = max(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, old.length if old else 0)
        min_slots = max(num_sequences, old.num_slots if old else 0)
        wanted_slots = min(self.max_sequences, 1 << (min_slots - 1).bit_length())
        free_bytes = free_memory(self.device)
        if min_slots * length * token_bytes > free_bytes:
            if self.sequences:
                return False
            self.clear()
            old = None
            free_bytes = free_memory(self.device)
            if num_sequences * length * token_bytes > free_bytes:
                raise self.out_of_memory(num_sequences, length, free_bytes)
            min_slots = wanted_slots = num_sequences
        num_slots = wanted_slots if 2 * wanted_slots * length * token_bytes <= free_bytes else min_slots
        try:
            cache = KVCache(self.config, num_slots, length, dtype=self.dtype, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError of GPUs is one, CPUs' allocator raises a plain one
            if "memory" not in str(error):
                raise
            if self.sequences:
                return False
            raise self.out_of_memory(num_slots, length, free_memory(self.device)) from None
        if self.static_address:
            from torch._dynamo import mark_static_address  # here, since it takes long to import

            for buffer in (*cache.keys, *cache.values):
                mark_static_address(buffer)
        if old is not None:
            cache.copy_from(old)
        self.cache = cache
        return True

    def out_of_memory(self, num_sequences: int, length: int, free_bytes: int) -> BadInput:
        token_bytes = KVCache.bytes_per_token(self.config, self.dtype)
        return BadInput(
            f"the KV cache of {num_sequences} sequence{'s' * (num_sequences > 1)} of {length} tokens takes "
            f"{num_sequences * length * token_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free",
            where="engine",
            remedy=f"{max(0, int(free_bytes / token_bytes / num_sequences))} tokens fit: shorten the prompt or lower "
            "max_new_tokens",
        )

    # --- slots ---

    def allocate(self, prompt: Sequence[int]) -> CachedSequence:
        """Give a prompt the next slot, with the longest prefix that any slot has cached. `reserve` must have succeeded."""
        assert self.cache is not None
        slot, max_shared = len(self.sequences), len(prompt) - 1  # the last token is processed for its hidden state
        shared_lengths = self.index.shared_lengths(prompt, max_shared)
        cached_lengths = {other: min(length, self.num_cached(other)) for other, length in shared_lengths.items()}
        source = max(cached_lengths, key=lambda other: cached_lengths[other], default=slot)
        num_cached = cached_lengths.get(source, 0)
        if num_cached and source != slot:
            self.cache.copy_slot(source, slot, num_cached)
        sequence = CachedSequence(slot, list(prompt), num_cached)
        for other in self.sequences:
            promised = shared_lengths.get(other.slot, 0)
            best = max(num_cached, sequence.prefix_length)
            if other.num_pending and promised >= best + MIN_TOKENS_TO_WAIT_FOR:
                sequence.prefix_source, sequence.prefix_length = other, promised
        self.num_prompt_tokens += len(prompt)
        self.num_reused_tokens += num_cached
        self.sequences.append(sequence)
        self.index.set(slot, sequence.token_ids)
        return sequence

    def num_cached(self, slot: int) -> int:
        """Return how many tokens of a slot have keys and values."""
        if slot < len(self.sequences):
            return self.sequences[slot].num_cached
        return len(self.index.token_ids[slot])

    def copy_ready_prefixes(self) -> None:
        """Copy prefixes to sequences that were waiting for another one's prefill."""
        assert self.cache is not None
        for sequence in self.sequences:
            source = sequence.prefix_source
            if source is not None and source.num_cached >= sequence.prefix_length:
                self.cache.copy_slot(source.slot, sequence.slot, sequence.prefix_length)
                self.num_reused_tokens += sequence.prefix_length - sequence.num_cached
                sequence.num_cached, sequence.prefix_source = sequence.prefix_length, None

    def restart(self, sequence: CachedSequence) -> None:
        """Empty a sequence, which keeps its slot."""
        sequence.token_ids, sequence.num_cached = [], 0
        sequence.prefix_source, sequence.last_hidden = None, None
        self.index.set(sequence.slot, sequence.token_ids)

    def discard(self, sequences: Sequence[CachedSequence]) -> None:
        """Zero what sequences have cached: NaN there would reach other sequences through masked attention (0 × NaN)."""
        assert self.cache is not None
        for sequence in sequences:
            self.cache.zero_slot(sequence.slot)
            sequence.num_cached = 0

    def release(self, sequences: Sequence[CachedSequence]) -> None:
        """Mark sequences as no longer active; `compact` frees their slots."""
        for sequence in sequences:
            sequence.is_active = False

    def compact(self) -> None:
        """Move active sequences to the first slots. What released sequences have cached stays available for reuse."""
        for slot in reversed(range(len(self.sequences))):
            if self.sequences[slot].is_active:
                continue
            last = self.sequences.pop()
            cached_ids = last.token_ids[: last.num_cached]
            self.index.set(last.slot, cached_ids)  # what stays in its slot
            if last.slot != slot:
                assert self.cache is not None
                self.cache.copy_slot(last.slot, slot, last.num_cached)
                last.slot, self.sequences[slot] = slot, last
                self.index.set(slot, last.token_ids)
