"""Keys and values of what a row has seen: one static buffer, each row at a length of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from chameleon.model.config import ModelConfig


class KVCache:
    """Buffers [layers, rows, kv_heads, length, head_width] for keys and for values.

    A position is a slot: id t of a row lies in slot t. What lies behind a row's length is never looked at.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.layers, rows, config.kv_heads, length, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Slots a row has."""
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Puts keys and values [B, kv_heads, T, head_width] of the first B rows into slots [B, T]."""
        if slots.shape == (1, 1):
            start = int(slots[0, 0])
            self.keys[layer, :1, :, start : start + 1] = keys
            self.values[layer, :1, :, start : start + 1] = values
            return
        rows = torch.arange(len(slots), device=slots.device).unsqueeze(1)
        self.keys[layer][rows, :, slots] = keys.transpose(1, 2)
        self.values[layer][rows, :, slots] = values.transpose(1, 2)

    def read(self, layer: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Views [rows, kv_heads, length, head_width] of keys and values."""
        return self.keys[layer, :rows, :, :length], self.values[layer, :rows, :, :length]

    def row(self, number: int) -> KVCache:
        """A view of one row, as a cache of its own."""
        view = KVCache.__new__(KVCache)
        view.keys, view.values = self.keys[:, number : number + 1], self.values[:, number : number + 1]
        return view

    def keep(self, rows: list[int]) -> None:
        """Moves the named rows to the front, in the given order; the others are free."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys[:, : len(rows)] = self.keys[:, index]
        self.values[:, : len(rows)] = self.values[:, index]
