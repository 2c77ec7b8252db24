"""The mixture: which packed rows a training step sees, as a pure function of (seed, step).

The rows of each source are planned once and shuffled anew every epoch. A pattern of sources, shuffled once and repeated,
determines which source each row of the run comes from, so that the source and the row within it follow from the row's index
alone. Resuming needs a step number and nothing else, and any number of devices sees the same global batches.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chameleon.data.index import RowIndex, Segment
from chameleon.data.sources import expand_braces
from chameleon.data.token_shards import TokenShard, image_lengths, open_shards
from chameleon.errors import BadInput
from chameleon.tokenizers.mixed import answer_mask
from chameleon.vocabulary import Vocabulary

PATTERN_LENGTH = 10_000


@dataclass
class SourceConfig:
    """One source of a mixture."""

    shards: str
    """Folder of token shards, or several in braces, `data/{pairs,texts}`, whose documents then share rows."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources; 0 where a later stage gives it one."""
    loss: Literal["all", "answers"] = "all"
    """Tokens on which the loss is taken."""
    swap_pairs: bool = True
    """Put the text of an image–text pair first in half of the cases, by sample and epoch (arXiv 2405.09818, 2.2)."""
    image_noise: float = 0.0
    """Image codes of prompts that are replaced by random ones, so that no single code decides an answer: each document
    has a share of its own between 0 and this. Only with `loss: answers`; the loss is never taken on them."""
    name: str | None = None
    """Name for stages and the log; by default that of the folder."""

    @property
    def display_name(self) -> str:
        return self.name or Path(self.shards).name


@dataclass
class StageConfig:
    """A part of training in which sources have other weights."""

    start: float
    """Fraction of training at which it starts, above 0 and below 1."""
    weights: dict[str, float] = field(default_factory=dict)
    """Name of a source → its weight from here on; other sources keep theirs."""


class PackedBatch(NamedTuple):
    """Packed rows, each tensor [B, T]."""

    input_ids: Tensor
    """int64; `pad` in padding."""
    targets: Tensor
    """int64: the next token of the same document."""
    loss_weights: Tensor
    """float32: 1 where the loss is taken, else 0."""
    document_ids: Tensor
    """int64: which document of the row; padding is one of its own."""
    positions: Tensor
    """int64: position in the document."""


# --- counter-based shuffling -----------------------------------------------------------------------------------------

MASK_64 = (1 << 64) - 1
FEISTEL_ROUNDS = 6


def splitmix64(*values: int) -> int:
    """Return 64 pseudo-random bits of integers: SplitMix64's finalizer over each in turn (Steele et al., 2014)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
        state ^= state >> 31
    return state


def permuted_index(index: int, count: int, key: int) -> int:
    """Return element `index` of a pseudo-random permutation of 0 … count − 1 that `key` selects, without a list.

    A Feistel network on the least even number of bits, applied until the result is below `count` (cycle walking; Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_index in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (splitmix64(key, round_index, right) & mask)
        index = left << half_bits | right
        if index < count:
            return index


# --- sources and stages ----------------------------------------------------------------------------------------------


class PackedSource:
    """The documents of a source, packed into rows of the context length."""

    def __init__(self, config: SourceConfig, context_length: int, vocabulary: Vocabulary, fingerprint: str | None) -> None:
        self.config, self.context_length, self.vocabulary = config, context_length, vocabulary
        self.shards: list[TokenShard] = []
        for folder in expand_braces(config.shards):
            self.shards += open_shards(Path(folder), fingerprint)
        if config.loss == "answers" and not any(sum(s.description["answers_by_modality"].values()) for s in self.shards):
            raise BadInput("no answer to take the loss on", where=config.shards, remedy="use loss: all, or conversations")
        self.index = RowIndex(self.shards, context_length, vocabulary)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    @property
    def tokens_per_row(self) -> float:
        """Mean number of targets in a row."""
        return self.index.num_targets / len(self)

    def answer_tokens_by_modality(self) -> tuple[int, int]:
        """Return the number of text tokens and of image codes in its answers; of documents, in all."""
        key = "answers_by_modality" if self.config.loss == "answers" else "by_modality"
        counts = [shard.description[key] for shard in self.shards]
        return sum(count.get("text", 0) for count in counts), sum(count.get("image", 0) for count in counts)

    def maybe_swap(self, token_ids: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """Return `bos image text eos` as `bos text image eos` in half of the cases; other documents unchanged."""
        v = self.vocabulary
        if len(token_ids) < 3 or token_ids[1] != v.boi or token_ids[-1] != v.eos:
            return token_ids
        block_length = int(image_lengths(token_ids, np.array([1]), v)[0])
        if not 0 < block_length < len(token_ids) - 2 or splitmix64(*seed) & 1:
            return token_ids
        image, text = token_ids[1 : 1 + block_length], token_ids[1 + block_length : -1]
        if not bool(v.is_text(torch.from_numpy(text)).all()):
            return token_ids
        return np.concatenate((token_ids[:1], text, image, token_ids[-1:]))

    def with_noise(self, token_ids: np.ndarray, may_change: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """Return the ids with some of the image codes replaced, among the tokens that may change."""
        random, v = np.random.default_rng(splitmix64(*seed)), self.vocabulary
        share = random.uniform(0, self.config.image_noise)
        is_code = v.is_image(torch.from_numpy(token_ids)).numpy()
        is_replaced = is_code & may_change & (random.random(len(token_ids)) < share)
        codes = torch.from_numpy(random.integers(v.num_image_codes, size=int(is_replaced.sum())))
        noisy = token_ids.copy()
        noisy[is_replaced] = v.codes_to_ids(codes).numpy()
        return noisy

    def read_segment(self, segment: Segment, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray | float]:
        """Return token ids int64 [size + 1] of a segment, and the loss weight of each but the first."""
        shard_index, document = self.index.locate_document(segment.document)
        shard = self.shards[shard_index]
        variant = epoch % shard.variants
        end = segment.start + segment.size + 1
        if self.config.loss == "answers":
            all_ids = shard.read(document, variant=variant)  # what is an answer depends on the tokens before it
            mask = answer_mask(all_ids, self.vocabulary)
            if self.config.image_noise:
                all_ids = self.with_noise(all_ids, ~mask, (seed, epoch, segment.document))
            return all_ids[segment.start : end], mask[segment.start + 1 : end]
        token_ids = shard.read(document, segment.start, end, variant)
        if self.config.swap_pairs and segment.start == 0:
            token_ids = self.maybe_swap(token_ids, (seed, epoch, segment.document))
        return token_ids, 1.0

    def row(self, row_index: int, epoch: int, seed: int) -> PackedBatch:
        """Return one row, each tensor [T].

        `seed` and `epoch` determine the order within pairs; `epoch` selects the views of pictures.
        """
        v, context_length = self.vocabulary, self.context_length
        input_ids, targets = (np.full(context_length, v.pad) for _ in range(2))
        loss_weights = np.zeros(context_length, dtype=np.float32)
        document_ids, positions = (np.zeros(context_length, dtype=np.int64) for _ in range(2))
        segments = self.index[row_index]
        start = 0
        for document_id, segment in enumerate(segments):
            token_ids, weights = self.read_segment(segment, epoch, seed)
            end = start + segment.size
            input_ids[start:end], targets[start:end] = token_ids[:-1], token_ids[1:]
            loss_weights[start:end] = weights
            document_ids[start:end] = document_id
            positions[start:end] = np.arange(segment.size)
            start = end
        document_ids[start:] = len(segments)
        positions[start:] = np.arange(context_length - start)
        return PackedBatch(*map(torch.from_numpy, (input_ids, targets, loss_weights, document_ids, positions)))


class Stage:
    """The rows of the run from `first_row` on, over which the sources' shares are constant."""

    def __init__(self, first_row: int, shares: np.ndarray, drawn: np.ndarray, seed: int) -> None:
        """shares: float [sources], of the rows. drawn: int64 [sources], rows that each source gave in earlier stages."""
        self.first_row, self.drawn = first_row, drawn
        self.counts = np.floor(shares * PATTERN_LENGTH).astype(np.int64)
        """Rows of each source in one pattern; what is left over goes to those that rounding down cost most."""
        order = np.argsort(self.counts - shares * PATTERN_LENGTH, kind="stable")
        for source in order[: PATTERN_LENGTH - self.counts.sum()]:
            self.counts[source] += 1
        self.pattern = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(shares)), self.counts))
        is_source = self.pattern[:, None] == np.arange(len(shares))
        self.drawn_in_pattern = np.concatenate((np.zeros((1, len(shares)), int), np.cumsum(is_source, axis=0)))

    def drawn_before(self, row: int) -> np.ndarray:
        """Return the number of rows that each source gives before row `row` of the run: int64 [sources]."""
        repetition, position = divmod(row - self.first_row, PATTERN_LENGTH)
        return self.drawn + repetition * self.counts + self.drawn_in_pattern[position]

    def locate(self, row: int) -> tuple[int, int]:
        """Return (source, rows that it gives before) of row `row` of the run."""
        repetition, position = divmod(row - self.first_row, PATTERN_LENGTH)
        source = int(self.pattern[position])
        before = self.drawn[source] + repetition * self.counts[source] + self.drawn_in_pattern[position, source]
        return source, int(before)


class Mixture:
    """Batches of packed rows from several sources by weight."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        context_length: int,
        global_batch_size: int,
        seed: int,
        vocabulary: Vocabulary,
        fingerprint: str | None = None,
        stages: Sequence[StageConfig] = (),
        max_steps: int = 0,
        balance_modalities: bool = False,
    ) -> None:
        """max_steps: of the run, of which `stages` start at fractions.

        balance_modalities: sources whose answers are mostly image codes get half of the tokens together, the others the
        other half, each in the ratio of their weights. Raises `BadInput` for shards of other tokenizers, two sources of one
        name, and invalid weights or stages.
        """
        weights = stage_weights(sources, stages)
        self.sources = [PackedSource(source, context_length, vocabulary, fingerprint) for source in sources]
        self.global_batch_size, self.seed = global_batch_size, seed
        if balance_modalities:
            weights = [self.balance(stage) for stage in weights]
        tokens_per_row = np.array([source.tokens_per_row for source in self.sources])
        self.stages: list[Stage] = []
        for start, of_stage in zip((0.0, *(stage.start for stage in stages)), weights, strict=True):
            first_row = round(start * max_steps) * global_batch_size
            no_rows = np.zeros(len(of_stage), dtype=np.int64)
            drawn = self.stages[-1].drawn_before(first_row) if self.stages else no_rows
            shares = of_stage / tokens_per_row
            stage = Stage(first_row, shares / shares.sum(), drawn, seed)
            for source, weight, count in zip(sources, of_stage, stage.counts, strict=True):
                if weight > 0 and count == 0:
                    raise BadInput(
                        f"its weight gives {source.display_name} less than one row in {PATTERN_LENGTH}",
                        where="mixture",
                        remedy="raise it",
                    )
            self.stages.append(stage)
        self.first_rows = [stage.first_row for stage in self.stages]

    def balance(self, weights: np.ndarray) -> np.ndarray:
        """Return weights that give sources of images half of the tokens. Raise `BadInput` without both kinds of sources."""
        counts = [source.answer_tokens_by_modality() for source in self.sources]
        is_image = np.array([image > text for text, image in counts])
        balanced = weights.copy()
        for kind, name in ((is_image, "images"), (~is_image, "text")):
            if not weights[kind].sum() > 0:
                raise BadInput(
                    f"no source whose answers are mostly {name}",
                    where="balance_modalities",
                    remedy="add one, or leave it out",
                )
            balanced[kind] /= weights[kind].sum()
        return balanced

    def locate(self, row: int) -> tuple[int, int, int]:
        """Return (source, epoch, row of the source) of row `row` of the run."""
        source, drawn = self.stages[bisect_right(self.first_rows, row) - 1].locate(row)
        num_rows = len(self.sources[source])
        epoch, position = divmod(drawn, num_rows)
        return source, epoch, permuted_index(position, num_rows, splitmix64(self.seed, source, epoch))

    def check_divisible(self, world: int) -> None:
        """Raise `BadInput` where the global batch size is not divisible by `world`: some devices would wait for others."""
        batch_size = self.global_batch_size
        if batch_size % world:
            raise BadInput(
                f"global_batch_size {batch_size} is not divisible by {world} devices",
                where="recipe.global_batch_size",
                remedy=f"{max(world, batch_size // world * world)} is",
            )

    def batch(self, batch_index: int, rank: int = 0, world: int = 1) -> PackedBatch:
        """Return the part of a batch for one of `world` devices, each tensor [global_batch_size / world, T]."""
        self.check_divisible(world)
        first_row, end = batch_index * self.global_batch_size, (batch_index + 1) * self.global_batch_size
        return self.rows(range(first_row + rank, end, world))

    def rows(self, rows: Iterable[int]) -> PackedBatch:
        """Return rows of the run by their indices, each tensor [rows, T]."""
        located = map(self.locate, rows)
        return stack_rows(self.sources[source].row(row, epoch, self.seed) for source, epoch, row in located)


def stack_rows(rows: Iterable[PackedBatch]) -> PackedBatch:
    """Return rows, each tensor [T], as a batch, each tensor [rows, T]."""
    return PackedBatch(*(torch.stack(column) for column in zip(*rows, strict=True)))


def stage_weights(sources: Sequence[SourceConfig], stages: Sequence[StageConfig]) -> list[np.ndarray]:
    """Return the weights [sources] of each stage, the first one the sources' own. Raise `BadInput` for invalid ones."""
    names = [source.display_name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"two sources are named {name}", where="mixture", remedy="give each a name of its own")
    if not sources:
        raise BadInput("no source", where="mixture")
    weights = [{source.display_name: source.weight for source in sources}]
    previous_start = 0.0
    for stage in stages:
        if not previous_start < stage.start < 1:
            raise BadInput(f"stage starts at {stage.start}, expected rising fractions between 0 and 1", where="stages")
        previous_start = stage.start
        for name in stage.weights:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise BadInput(f"no source {name}", where="stages", remedy=f"did you mean {nearest}?")
        weights.append({**weights[-1], **stage.weights})
    for source in sources:
        if not 0 <= source.image_noise <= 1 or (source.image_noise and source.loss != "answers"):
            raise BadInput(
                f"image_noise of {source.display_name} is {source.image_noise}, expected a share, with loss: answers",
                where="mixture",
            )
    for of_stage in weights:
        for name, weight in of_stage.items():
            if not 0 <= weight < math.inf:
                raise BadInput(f"weight of {name} is {weight}, expected a number of 0 or more", where="mixture")
        if not sum(of_stage.values()) > 0:
            raise BadInput("a mixture needs sources with positive weights", where="mixture")
    for name in names:
        if not any(of_stage[name] > 0 for of_stage in weights):
            raise BadInput(f"weight of {name} is 0 in all stages", where="mixture", remedy="leave it out")
    return [np.array([of_stage[name] for name in names], dtype=float) for of_stage in weights]
