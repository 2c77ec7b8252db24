"""A generation request, and its state while it is being served."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from torch import Tensor

from chameleon.errors import BadInput, check_seed
from chameleon.generation.constraints import OutputConstraints, OutputState
from chameleon.generation.guidance import Guidance, GuidedTokens
from chameleon.generation.kv_cache_manager import CachedSequence
from chameleon.generation.sampling import IMAGE_SAMPLING, TEXT_SAMPLING, Sampling
from chameleon.vocabulary import Vocabulary


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: tuple[int, ...]
    """Token ids."""
    constraints: OutputConstraints
    text_sampling: Sampling = TEXT_SAMPLING
    image_sampling: Sampling = IMAGE_SAMPLING
    guidance: Guidance | None = None
    seed: int = 0
    """0 … 2⁶³ − 1."""
    fixed_codes: tuple[int, ...] = ()
    """Token ids of the codes of the first generated image, row by row, −1 where the model is to choose."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The full prompt and those of the guidance branches."""
        return [self.prompt, *(self.guidance.branches if self.guidance else ())]

    def guidance_for(self, tokens: GuidedTokens | None) -> Guidance | None:
        """Return the guidance if it applies to these tokens."""
        return self.guidance if self.guidance is not None and self.guidance.applies_to == tokens else None

    def validate(self, vocabulary: Vocabulary, context_length: int, max_sequences: int) -> OutputConstraints:
        """Return the constraints with `max_new_tokens` limited to what the context leaves.

        Raises `BadInput` where the request cannot be served.
        """
        constraints = self.constraints
        for prompt in self.prompts:
            if not prompt:
                raise BadInput("a prompt needs at least one token", where="prompt")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary.size:
                raise BadInput(f"a token id is not below {vocabulary.size}", where="prompt")
        prompt_length = max(map(len, self.prompts))
        tokens_left = context_length - prompt_length + 1
        if tokens_left < 2:
            raise BadInput(
                f"the prompt has {prompt_length} tokens, the context length is {context_length}",
                where="prompt",
                remedy=f"shorten it to {context_length - 1} or fewer; an image takes "
                f"{constraints.min_image_length(vocabulary)} or more",
            )
        limited = replace(constraints, max_new_tokens=min(constraints.max_new_tokens, tokens_left))
        start = OutputState(limited, vocabulary, self.prompt)
        if start.image is not None and not start.image.is_valid:
            raise BadInput("it ends in an image that cannot be completed: its tokens are not those of one", where="prompt")
        if start.image is not None and start.image.in_header and not start.image.next_sizes():
            raise BadInput("it ends in an image for which there is no room", where="prompt", remedy="raise max_new_tokens")
        open_image_tokens = 0 if start.image is None or constraints.format is None else start.image.tokens_left
        min_tokens = open_image_tokens + constraints.min_tokens(vocabulary)
        if min_tokens > min(tokens_left, constraints.max_new_tokens):
            parts = ["the rest of an image"] * bool(open_image_tokens) + list(constraints.format or ())
            raise BadInput(
                f"{' and '.join(parts)} take at least {min_tokens} tokens, but there is room for "
                f"{min(tokens_left, constraints.max_new_tokens)} (the prompt has {prompt_length}, the context length is "
                f"{context_length}, max_new_tokens is {constraints.max_new_tokens})",
                where="prompt",
                remedy="shorten it" if tokens_left < min_tokens else "raise max_new_tokens",
            )
        for token_id in self.fixed_codes:
            if token_id != -1 and token_id not in vocabulary.image_ids:
                raise BadInput(f"{token_id} is not the token id of an image code", where="fixed_codes")
        if self.guidance and len(self.guidance.weights) != len(self.prompts):
            weights = len(self.guidance.weights)
            raise BadInput(f"{weights} weights for {len(self.prompts)} prompts", where="guidance")
        if len(self.prompts) > max_sequences:
            raise BadInput(
                f"a guided request takes {len(self.prompts)} sequences, max_batch_size is {max_sequences}", where="engine"
            )
        if self.guidance_for("codes") and not constraints.image_limit + start.num_images:
            raise BadInput("guidance applies to images, and none is to be generated", where="guidance")
        return limited


@dataclass(eq=False)
class ActiveRequest:
    """A request that was submitted: waiting, running, or finished with output that nobody has taken yet."""

    request_id: int
    request: Request
    output: OutputState
    sequences: list[CachedSequence] = field(default_factory=list)
    """Of the full prompt, then of the guidance branches; empty until the request is admitted."""
    generated: list[int] = field(default_factory=list)
    """All generated token ids, eos excluded."""
    unread: deque[int] = field(default_factory=deque)
    """Generated token ids that the caller has not taken yet."""
    draft_tokens: list[int] = field(default_factory=list)
    """Proposed token ids after the pending ones (speculative decoding)."""
    seen_text: Tensor | None = None
    """bool [n] over the text slice: tokens that occurred before; None without repetition penalty."""
    max_buffered_codes: int | None = None
    """Image codes that may be decoded before the caller gets any; None is no limit."""
    is_finished: bool = False
    error: Exception | None = None
    """Why the request failed, if it did."""

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be generated."""
        return self.output.constraints.max_new_tokens - self.output.num_generated

    @property
    def codes_ahead(self) -> int:
        """Number of image codes that come next, with nothing between them but row ends."""
        image = self.output.image
        if image is None or image.grid is None:
            return 0
        return image.codes_before(min(image.body_length, image.position + self.tokens_left)) - image.num_codes

    @property
    def current_sequences(self) -> list[CachedSequence]:
        """The sequences that the next token depends on: branches that restart at each image have none outside."""
        guidance = self.request.guidance
        is_idle = guidance is not None and guidance.restarts and self.output.image is None
        return self.sequences[:1] if is_idle else self.sequences
