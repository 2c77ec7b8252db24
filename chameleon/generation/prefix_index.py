"""Finds which cache slots share a prefix with a prompt, by hashes of blocks of tokens.

Each block's hash includes the hash of the block before it, so equal hashes mean equal prefixes (they are compared to be
sure). Finding the shared prefixes of a prompt of n tokens takes n / BLOCK_SIZE dictionary look-ups, whatever the number of
slots, as in the prefix caching of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

BLOCK_SIZE = 16
"""Tokens of a block."""


def extend_block_hashes(hashes: list[int], token_ids: Sequence[int]) -> list[int]:
    """Append the hashes of the complete blocks of `token_ids` that `hashes` lacks; return those that were added."""
    added = []
    for start in range(len(hashes) * BLOCK_SIZE, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        previous = hashes[-1] if hashes else 0
        hashes.append(hash((previous, *token_ids[start : start + BLOCK_SIZE])))
        added.append(hashes[-1])
    return added


class PrefixIndex:
    """An index from block hashes to the slots whose tokens start with these blocks."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = {}
        """Slot → its token ids."""
        self.hashes: dict[int, list[int]] = {}
        """Slot → the hashes of its complete blocks."""
        self.slots: dict[int, set[int]] = {}
        """Hash → the slots that have such a block."""

    def set(self, slot: int, token_ids: list[int]) -> None:
        """Set the tokens of a slot. The list may be extended later; `extend` then indexes the new tokens."""
        self.remove(slot)
        self.token_ids[slot], self.hashes[slot] = token_ids, []
        self.extend(slot)

    def extend(self, slot: int) -> None:
        """Index blocks that were completed since the last call."""
        for block_hash in extend_block_hashes(self.hashes[slot], self.token_ids[slot]):
            self.slots.setdefault(block_hash, set()).add(slot)

    def remove(self, slot: int) -> None:
        """Remove a slot."""
        for block_hash in self.hashes.pop(slot, ()):
            slots = self.slots[block_hash]
            slots.discard(slot)
            if not slots:
                del self.slots[block_hash]
        self.token_ids.pop(slot, None)

    def shared_lengths(self, prompt: Sequence[int], max_length: int) -> dict[int, int]:
        """Return for each slot how many leading tokens it shares with the prompt, `max_length` at most; 0 is left out."""
        for slot in self.token_ids:
            self.extend(slot)
        prompt = prompt[:max_length]
        hashes: list[int] = []
        extend_block_hashes(hashes, prompt)
        remaining, blocks_shared = set(self.token_ids), {}
        for depth, block_hash in enumerate(hashes):
            matching = self.slots.get(block_hash, set())
            if len(matching) < len(remaining):
                blocks_shared.update(dict.fromkeys(remaining - matching, depth))
                remaining = remaining & matching
            if not remaining:
                break
        blocks_shared.update(dict.fromkeys(remaining, len(hashes)))
        lengths = {}
        for slot, blocks in blocks_shared.items():
            token_ids, length = self.token_ids[slot], blocks * BLOCK_SIZE
            if token_ids[:length] != list(prompt[:length]):
                length = 0  # a hash collision
            end = min(len(token_ids), len(prompt), length + BLOCK_SIZE)
            while length < end and token_ids[length] == prompt[length]:
                length += 1
            if length:
                lengths[slot] = length
        return lengths
