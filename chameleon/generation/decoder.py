"""The decoder: forward passes over the KV cache, and sampling from their hidden states.

* `forward_step` is one ragged pass: long prompts are prefilled in chunks while other sequences decode a token each;
* `decode_step` is the pass of one token a sequence, in a shape that can be compiled;
* `decode_image_block` decodes many image codes in a row without synchronising with the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from chameleon.compiled_code import keep_compiled_code
from chameleon.generation.constraints import AllowedNext
from chameleon.generation.guidance import GuidedTokens, combine_logits
from chameleon.generation.head_slices import HeadSlice, HeadSlices
from chameleon.generation.kv_cache_manager import CachedSequence, KVCacheManager
from chameleon.generation.request import ActiveRequest
from chameleon.generation.sampling import BatchSampling, sample
from chameleon.model.kv_cache import LENGTH_MULTIPLE, BatchLayout, KVCache
from chameleon.model.quantization import WeightFormat, make_linear, with_exact_products
from chameleon.model.transformer import Transformer
from chameleon.vocabulary import Vocabulary

MAX_TOKENS_PER_STEP = 2048
"""Tokens of one forward pass at most; longer prompts are prefilled in chunks while other sequences go on."""

MAX_COMPILED_SHAPES = 64
"""Shapes of a decode step that are compiled before further ones run uncompiled."""
NONFINITE = -1
"""Stands in place of a sampled token id where the logits are NaN or infinite."""

HiddenIndex = dict[CachedSequence, int]
"""Sequence → row of its last token's hidden state."""


@dataclass
class SamplingGroup:
    """Positions of one step that sample from the same head slice, as tensors. P positions, R guidance branches."""

    head: HeadSlice
    hidden_index: Tensor
    """int64 [P, R]: rows of the hidden states, those of the guidance branches side by side."""
    guidance_weights: Tensor | None
    """float32 [P, R], or None where no request is guided."""
    sampling: BatchSampling
    seeds: Tensor
    """int64 [P]."""
    token_indices: Tensor
    """int64 [P, steps]: index in its request of the next token, and of the codes after it."""
    allowed: Tensor | None
    """bool [P, n] over the slice's tokens; None where all are allowed."""
    seen: Tensor | None
    """bool [P, n]: earlier tokens, for the repetition penalty."""
    fixed: Tensor | None
    """int64 [P, steps]: token ids that are given, −1 where one is to be sampled."""
    order: list[int]
    """Where this group's tokens go among those of all groups."""

    def __call__(self, hidden: Tensor, step: int = 0) -> Tensor:
        """Sample token ids int64 [P] from hidden states [N, D], `step` tokens after the first of the group."""
        logits = self.head.logits(hidden[self.hidden_index.flatten()])
        if self.guidance_weights is not None:
            logits = combine_logits(logits.unflatten(0, self.hidden_index.shape), self.guidance_weights)
        is_finite = logits.sum(-1).isfinite()  # finite logits cannot sum up to more than float32 holds
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, -torch.inf)
        columns = sample(logits, self.sampling, self.seeds, self.token_indices[:, step], self.head.token_ids, self.seen)
        token_ids = self.head.token_ids[columns]
        if self.fixed is not None:
            token_ids = torch.where(self.fixed[:, step] >= 0, self.fixed[:, step], token_ids)
        return torch.where(is_finite, token_ids, NONFINITE)


def code_offsets(request: ActiveRequest, count: int) -> list[int]:
    """Return how many tokens after the next one each of the next `count` codes of a request's image comes."""
    image = request.output.image
    assert image is not None
    return image.code_offsets(count)


def tokens_to_next_code(request: ActiveRequest, count: int) -> list[int]:
    """Return for each of the next `count` codes but the last how many tokens after it the next code comes: 1, or 2."""
    return [after - before for before, after in pairwise(code_offsets(request, count))]


class Decoder:
    """Runs the model over the KV cache and samples tokens."""

    def __init__(
        self,
        model: Transformer,
        vocabulary: Vocabulary,
        manager: KVCacheManager,
        *,
        weight_format: WeightFormat = "plain",
        compile: bool = False,
        exact: bool = False,
    ) -> None:
        """weight_format: that of the blocks, for the slices of the head. compile: compile the decode step.

        exact: shapes of operations do not depend on other requests, nor on drafts.
        """
        self.model, self.vocabulary, self.manager = model, vocabulary, manager
        self.device, self.dtype = model.head.weight.device, model.head.weight.dtype
        self.weight_format, self.compile, self.is_exact = weight_format, compile, exact
        self.num_forward_passes = 0
        self.build()

    def build(self) -> None:
        """Slice the head, join norms and compile the decode step, from the model's current weights."""
        self.model.join_qk_norms()

        def make_head(rows: Tensor) -> torch.nn.Module:
            layer = make_linear(rows, self.weight_format)
            return with_exact_products(layer) if self.is_exact else layer

        self.heads = HeadSlices(self.model.head, self.vocabulary, make_head)
        self.text_column = {token_id: column for column, token_id in enumerate(self.heads.text.token_ids.tolist())}
        self.compiled_decode_step: Callable[..., Tensor] | None = None
        if not self.compile:
            return
        from torch._dynamo import config as dynamo_config  # here, since it takes long to import

        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
        keep_compiled_code()
        # The model of this decoder does not change, so that nothing of it has to be checked at each step. PyTorch keeps
        # compiled code by the function's code object: a decoder has its own.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        if self.device.type == "cuda":
            options["triton.cudagraphs"] = True  # as in the mode "reduce-overhead"
        function = Decoder.decode_step
        decode_step = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        compiled = torch.compile(partial(decode_step, self), options=options)
        # The limit applies when the function is called.
        self.compiled_decode_step = dynamo_config.patch(recompile_limit=MAX_COMPILED_SHAPES)(compiled)

    # --- forward passes ---

    def num_pending(self) -> int:
        """Return the number of tokens that the next pass processes, without drafts."""
        return min(MAX_TOKENS_PER_STEP, sum(sequence.num_pending for sequence in self.manager.sequences))

    def forward_step(self, requests: Sequence[ActiveRequest]) -> tuple[Tensor, HiddenIndex]:
        """Run one ragged pass over the pending tokens of all active sequences, drafted tokens included.

        Returns hidden states [N, D], and for each sequence whose request can sample its next token the row of the last
        pending token's hidden state; the rows of its draft follow. Sequences in the middle of their prefill, or that wait
        for another one's, are left out.
        """
        manager = self.manager
        drafts = {sequence: request.draft_tokens for request in requests for sequence in request.sequences}
        inputs: list[list[int]] = []
        budget = MAX_TOKENS_PER_STEP
        for sequence in manager.sequences:
            if sequence.prefix_source is not None and not sequence.prefix_source.is_active:
                sequence.prefix_source = None  # it was cancelled
            if sequence.prefix_source is not None:
                token_ids = []
            else:
                end = sequence.num_cached + max(1, budget)
                token_ids = sequence.token_ids[sequence.num_cached : end]
                if end >= len(sequence.token_ids):
                    token_ids = token_ids + drafts[sequence]
            budget -= len(token_ids)
            inputs.append(token_ids)
        flat = torch.tensor([[token_id for token_ids in inputs for token_id in token_ids]], device=self.device)
        cached_lengths = [sequence.num_cached for sequence in manager.sequences]
        hidden = self.forward(flat, cached_lengths, [len(token_ids) for token_ids in inputs])
        hidden_index: HiddenIndex = {}
        end = 0
        for sequence, token_ids in zip(manager.sequences, inputs, strict=True):
            end += len(token_ids)
            if token_ids:
                sequence.num_cached += min(sequence.num_pending, len(token_ids))
                if not sequence.num_pending:
                    hidden_index[sequence] = end - len(drafts[sequence]) - 1
        manager.copy_ready_prefixes()
        return self.wait_for_branches(requests, hidden, hidden_index)

    def wait_for_branches(
        self, requests: Sequence[ActiveRequest], hidden: Tensor, hidden_index: HiddenIndex
    ) -> tuple[Tensor, HiddenIndex]:
        """Keep the hidden states of sequences whose guidance branches are not prefilled yet, and use those kept before."""
        kept_states: list[Tensor] = []
        for request in requests:
            sequences = request.current_sequences
            is_complete = all(s in hidden_index or s.last_hidden is not None for s in sequences)
            if not is_complete:
                request.draft_tokens = []  # only the state after the pending tokens is kept
            for sequence in sequences:
                if not is_complete and sequence in hidden_index:
                    sequence.last_hidden = hidden[hidden_index.pop(sequence)].clone()
                elif is_complete and sequence.last_hidden is not None:
                    hidden_index[sequence] = len(hidden) + len(kept_states)
                    kept_states.append(sequence.last_hidden)
                    sequence.last_hidden = None
        return (torch.cat([hidden, torch.stack(kept_states)]) if kept_states else hidden), hidden_index

    def forward(
        self,
        token_ids: Tensor,
        cached_lengths: Sequence[int],
        new_lengths: Sequence[int],
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states [N, D] of token ids [1, N]; slot s has `cached_lengths[s]` tokens and gets `new_lengths[s]`.

        positions: int64 [1, N] on the device, where they are known.
        """
        cache = self.manager.cache
        assert cache is not None
        self.num_forward_passes += 1
        if self.is_exact:
            return self.model(token_ids, layout=BatchLayout.exact(cache, cached_lengths, new_lengths))[0]
        if self.compiled_decode_step is None or any(new != 1 for new in new_lengths):
            layout = BatchLayout.ragged(cache, cached_lengths, new_lengths, positions)
            return self.model(token_ids, layout=layout)[0]
        kv_length = min(cache.length, -(-(max(cached_lengths) + 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        flat_positions = torch.tensor(cached_lengths, device=self.device) if positions is None else positions[0]
        key_positions = torch.arange(kv_length, device=self.device)
        if self.device.type == "cpu":
            torch._dynamo.maybe_mark_dynamic(key_positions, 0)  # one code for all lengths; CUDA graphs need fixed ones
        return self.compiled_decode_step(token_ids, cache, flat_positions, key_positions).clone()

    def decode_step(self, token_ids: Tensor, cache: KVCache, positions: Tensor, key_positions: Tensor) -> Tensor:
        """Process one token of each sequence: the pass that is compiled. See `BatchLayout.one_token_each`."""
        return self.model(token_ids, layout=BatchLayout.one_token_each(cache, positions, key_positions))[0]

    # --- sampling ---

    def sample_next(self, requests: Sequence[ActiveRequest], hidden: Tensor, hidden_index: HiddenIndex) -> Tensor:
        """Sample the next token of each request and one after each drafted token: int64 [requests + drafted tokens]."""
        return self.sample_groups(self.sampling_groups(requests, hidden_index), hidden)

    def decode_image_block(
        self, requests: Sequence[ActiveRequest], hidden: Tensor, hidden_index: HiddenIndex, num_steps: int
    ) -> Tensor:
        """Decode `num_steps` image codes of each request: int64 [requests, num_steps]. The host waits for none of them.

        The end of a row is processed together with the row's last code, so it takes no pass of its own.
        """
        sequences = self.manager.sequences
        token_ids = self.sample_groups(self.sampling_groups(requests, hidden_index, num_steps), hidden)
        steps = [token_ids]
        owner_of = {sequence: index for index, request in enumerate(requests) for sequence in request.sequences}
        request_of = [owner_of[sequence] for sequence in sequences]
        owners = torch.tensor(request_of, device=self.device)
        lengths = [sequence.num_cached for sequence in sequences]
        positions = torch.tensor([lengths], device=self.device)
        groups = self.sampling_groups(requests, {sequence: sequence.slot for sequence in sequences}, num_steps)
        gaps = [tokens_to_next_code(request, num_steps) for request in requests]
        for step in range(1, num_steps):
            inputs = token_ids.clamp(min=0)[owners]
            new_lengths = [gaps[owner][step - 1] for owner in request_of]
            if max(new_lengths) == 1:
                hidden = self.forward(inputs.unsqueeze(0), lengths, new_lengths, positions)
                positions = positions + 1
            else:
                hidden = self.forward_with_row_ends(inputs, lengths, new_lengths)
                positions = positions + torch.tensor(new_lengths, device=self.device)
            lengths = [length + new for length, new in zip(lengths, new_lengths, strict=True)]
            token_ids = self.sample_groups(groups, hidden, step)
            steps.append(token_ids)
        return torch.stack(steps, dim=1)

    def forward_with_row_ends(self, codes: Tensor, lengths: Sequence[int], new_lengths: Sequence[int]) -> Tensor:
        """Return the hidden states [S, D] after a code of each sequence, int64 [S], and a row end where it has 2 tokens."""
        row_end = self.vocabulary.dialect.row_end
        assert row_end is not None
        counts = torch.tensor(new_lengths, device=self.device)
        last = counts.cumsum(0) - 1
        flat = torch.full((sum(new_lengths),), row_end, device=self.device)
        flat[last - counts + 1] = codes
        return self.forward(flat.unsqueeze(0), lengths, new_lengths)[last]

    def sampling_groups(
        self, requests: Sequence[ActiveRequest], hidden_index: HiddenIndex, num_steps: int = 1
    ) -> list[SamplingGroup]:
        """Group the positions to sample, each request's next token and one after each drafted token, by head slice.

        num_steps: tokens of each position that are sampled from the group, which are then codes of images. In exact mode
        each position is a group of its own.
        """
        groups: dict[tuple[HeadSlice, int], list[tuple[int, ActiveRequest, AllowedNext, int]]] = {}
        count = 0
        for request in requests:
            allowed = request.output.allowed_next()
            for ahead in range(1 + len(request.draft_tokens)):
                key = (self.heads.slice_for(allowed), count if self.is_exact else 0)
                groups.setdefault(key, []).append((count, request, allowed, ahead))
                count += 1
        return [self.sampling_group(head, group, hidden_index, num_steps) for (head, _), group in groups.items()]

    def sampling_group(
        self,
        head: HeadSlice,
        positions: Sequence[tuple[int, ActiveRequest, AllowedNext, int]],
        hidden_index: HiddenIndex,
        num_steps: int,
    ) -> SamplingGroup:
        """positions: (order, request, allowed tokens, number of drafted tokens before it)."""
        is_codes, is_size = head is self.heads.codes, positions[0][2] == AllowedNext.SIZE
        tokens: GuidedTokens | None = None if is_size else "codes" if is_codes else "texts"
        guided = [request.request.guidance_for(tokens) for _, request, _, _ in positions]
        num_branches = max(1 if guidance is None else len(guidance.weights) for guidance in guided)
        rows, weights, sampling, seeds, token_indices, masks, fixed = [], [], [], [], [], [], []
        for (_, request, allowed, ahead), guidance in zip(positions, guided, strict=True):
            branch_weights = guidance.weights if guidance else (1.0,)
            row = [hidden_index[sequence] + ahead for sequence in request.sequences[: len(branch_weights)]]
            rows.append(row + row[:1] * (num_branches - len(row)))
            weights.append([*branch_weights, *[0.0] * (num_branches - len(branch_weights))])
            sampling.append(request.request.image_sampling if is_codes or is_size else request.request.text_sampling)
            seeds.append(request.request.seed)
            offsets = [ahead] if num_steps == 1 else code_offsets(request, num_steps)
            token_indices.append([len(request.generated) + offset for offset in offsets])
            masks.append(self.size_mask(request) if is_size else self.heads.allowed[allowed])
            fixed.append(self.fixed_codes(request, ahead, num_steps) if is_codes else [])
        seen = None
        if not (is_codes or is_size) and any(request.seen_text is not None for _, request, _, _ in positions):
            none_seen = torch.zeros(len(head.token_ids), dtype=torch.bool, device=self.device)
            seen = torch.stack([none_seen if r.seen_text is None else r.seen_text for _, r, _, _ in positions])
        has_fixed = any(max(token_ids, default=-1) >= 0 for token_ids in fixed)
        existing_masks = [mask for mask in masks if mask is not None]
        return SamplingGroup(
            head,
            torch.tensor(rows, device=self.device),
            torch.tensor(weights, device=self.device) if num_branches > 1 else None,
            BatchSampling.cached(tuple(sampling), self.device),
            torch.tensor(seeds, device=self.device),
            torch.tensor(token_indices, device=self.device),
            torch.stack(existing_masks) if existing_masks else None,
            seen,
            torch.tensor(fixed, device=self.device) if has_fixed else None,
            [order for order, _, _, _ in positions],
        )

    def fixed_codes(self, request: ActiveRequest, ahead: int, num_steps: int) -> list[int]:
        """Return the fixed token ids of the next codes from `ahead` tokens on, −1 where one is to be sampled.

        A row end among drafted tokens is fixed too.
        """
        image = request.output.image
        assert image is not None
        if image.is_row_end(ahead) and image.dialect.row_end is not None:
            return [image.dialect.row_end]
        fixed = request.request.fixed_codes if request.output.num_images == 1 else ()
        first = image.codes_before(image.position + ahead)
        token_ids = list(fixed[first : first + num_steps])
        return token_ids + [-1] * (num_steps - len(token_ids))

    def size_mask(self, request: ActiveRequest) -> Tensor:
        """Return which tokens of the slice of sizes a request's image may have next: bool [n]."""
        image = request.output.image
        assert image is not None
        return torch.isin(self.heads.sizes.token_ids, torch.tensor(image.next_sizes(), device=self.device))

    def sample_groups(self, groups: Sequence[SamplingGroup], hidden: Tensor, step: int = 0) -> Tensor:
        """Sample all groups: int64 [positions of all groups]."""
        if len(groups) == 1:
            return groups[0](hidden, step)
        result = torch.empty(sum(len(group.order) for group in groups), dtype=torch.int64, device=self.device)
        for group in groups:
            result[torch.tensor(group.order, device=self.device)] = group(hidden, step)
        return result
