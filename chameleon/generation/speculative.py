"""Speculative decoding of image codes: several drafted codes are verified in one forward pass.

This is Jacobi decoding (arXiv 2410.01699) with Gumbel coupling (arXiv 2510.24211): the noise of a token depends on its seed
and index alone, so a drafted token is accepted if and only if it is the token that decoding one at a time would have
sampled. The output is the same for every draft length, and the distribution is preserved (arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from chameleon.generation.request import ActiveRequest


def accept_draft(request: ActiveRequest, sampled: Sequence[int]) -> list[int]:
    """Return the sampled tokens that are final; the others become the next draft.

    sampled[n] was sampled after n drafted tokens, so it is what decoding alone would have sampled if these are all right.
    """
    num_accepted = 1
    while num_accepted < len(sampled) and sampled[num_accepted - 1] == request.draft_tokens[num_accepted - 1]:
        num_accepted += 1
    request.draft_tokens = list(takewhile(lambda token_id: token_id >= 0, sampled[num_accepted:]))  # negative: not finite
    return list(sampled[:num_accepted])


def propose_draft(request: ActiveRequest, draft_length: int) -> None:
    """Extend the draft to `draft_length` − 1 tokens: each code is guessed to equal the one above it; row ends are known."""
    image = request.output.image
    assert image is not None and image.grid is not None
    num_drafted = max(0, min(draft_length, image.tokens_to_last_code, request.tokens_left) - 1)
    row_length = image.dialect.row_length(image.grid)
    while len(request.draft_tokens) < num_drafted:
        ahead, known = len(request.draft_tokens), [*request.generated, *request.draft_tokens]
        if image.dialect.row_end is not None and image.is_row_end(ahead):
            request.draft_tokens.append(image.dialect.row_end)
            continue
        has_code_above = row_length <= min(image.position + ahead, len(known))
        request.draft_tokens.append(known[-row_length] if has_code_above else known[-1])
    del request.draft_tokens[num_drafted:]
