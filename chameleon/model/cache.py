"""Keys and values of what rows have seen: one static buffer, each row at a length of its own.

The model reads and writes it through a `Window`: ids of several rows laid end to end in one row, so that a pass may take
a long prompt of one row and one new id of another, and no id is there for padding's sake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chameleon.model.config import ModelConfig

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
SPREAD = 2
"""Rows are attended to together while the longest is at most this many times the shortest."""


class KVCache:
    """For each layer a buffer [rows, kv_heads, length, head_width] of keys and one of values.

    A position is a slot: id t of a row lies in slot t. What lies behind a row's length is never looked at.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (rows, config.kv_heads, length, config.head_width)
        self.device = torch.device(device)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]

    @staticmethod
    def bytes_a_slot(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that one id of one row takes."""
        return 2 * config.layers * config.kv_heads * config.head_width * dtype.itemsize

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        """Slots a row has."""
        return self.keys[0].shape[2]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first slots of one row to another."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def take_from(self, other: KVCache) -> None:
        """Copies all rows of a smaller cache."""
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[: theirs.shape[0], :, : theirs.shape[2]] = theirs


@dataclass(frozen=True)
class Span:
    """Rows that follow one another in the cache, with equally many new ids each."""

    ids: slice
    """Where their ids lie in the pass."""
    rows: slice
    """The rows of the cache."""
    seen: int
    """How many slots are looked at."""
    mask: Tensor | None
    """bool [rows, 1, new, seen], or None: causal, which for one new id is all that is seen."""


class Window:
    """What one pass of the model reads and writes."""

    def __init__(self, cache: KVCache, rows: Tensor, slots: Tensor, spans: Sequence[Span]) -> None:
        """rows, slots: int64 [N], where the key and value of each id of the pass go."""
        self.cache, self.rows, self.slots, self.spans = cache, rows, slots, spans

    @classmethod
    def of(cls, cache: KVCache, starts: Sequence[int], news: Sequence[int], positions: Tensor | None = None) -> Window:
        """A pass over the first rows of the cache, in order: row r has `starts[r]` ids and `news[r]` new ones (0: none).

        positions: int64 [1, N], the slots of the ids where they are on the device already.
        """
        device = cache.device
        if positions is None:
            slots = [slot for start, new in zip(starts, news, strict=True) for slot in range(start, start + new)]
            positions = torch.tensor([slots], device=device)
        if all(new == 1 for new in news):
            rows = torch.arange(len(news), device=device)  # made there: the host does not wait
        else:
            rows = torch.tensor([row for row, new in enumerate(news) for _ in range(new)], device=device)
        spans = []
        first, done = 0, 0
        while first < len(starts):
            last, low, high = first + 1, starts[first], starts[first]
            while last < len(starts) and news[last] == news[first]:
                low, high = min(low, starts[last]), max(high, starts[last])
                if high > SPREAD * max(low, 1):
                    break
                last += 1
            new, count = news[first], last - first
            if new:
                ids = slice(done, done + new * count)
                lengths = starts[first:last]
                seen = max(lengths) + new
                mask = None
                if any(start != seen - new for start in lengths) or (new > 1 and seen > new):
                    reach = positions[0, ids].view(count, new)
                    mask = (torch.arange(seen, device=device) <= reach.unsqueeze(-1)).unsqueeze(1)
                spans.append(Span(ids, slice(first, last), seen, mask))
                done = ids.stop
            first = last
        return cls(cache, rows, positions[0], spans)

    @classmethod
    def even(cls, cache: KVCache, slots: Tensor, seen: int) -> Window:
        """A pass of one new id for each of the first rows, at slots [N]; each looks through a mask at `seen` slots."""
        count = slots.shape[0]
        mask = (torch.arange(seen, device=slots.device) <= slots.unsqueeze(1))[:, None, None]
        rows = torch.arange(count, device=slots.device)
        return cls(cache, rows, slots, [Span(slice(0, count), slice(0, count), seen, mask)])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """Writes keys and values and attends: q [1, N, H, C], k and v [1, N, K, C] to [1, N, H, C]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.slots], values[self.rows, :, self.slots] = k[0], v[0]
        parts = []
        for span in self.spans:
            count = span.rows.stop - span.rows.start
            asking = q[0, span.ids].unflatten(0, (count, -1)).transpose(1, 2)  # [rows, H, new, C]
            found = attention(asking, keys[span.rows, :, : span.seen], values[span.rows, :, : span.seen], span.mask)
            parts.append(found.transpose(1, 2).flatten(0, 1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)
