"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from chameleon.document import Document, Text
from chameleon.generation.constraints import OutputConstraints, PartKind
from chameleon.generation.inspection import TokenScores
from chameleon.generation.request import Request
from chameleon.generation.streaming import PartialImage, complete_utf8_length
from chameleon.serve.errors import ApiError
from chameleon.serve.schema import ChatBody, CompletionBody, ImageBody
from chameleon.serve.service import Answer, Service, Shown, encode_picture, while_connected
from chameleon.serve.streams import DONE, event, event_stream, merge

MAX_COMPLETIONS = 128
"""Answers of one request for completions."""
Scored = dict[tuple[int, ...], TokenScores]
NOTHING: dict[str, Any] = {}
EMPTY = Document()
"""The prompt of guidance."""


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def add_routes(router: APIRouter, service: Service) -> None:
    """Add both routes."""

    @router.post("/v1/chat/completions", summary="Answer a conversation of texts and pictures")
    async def chat(body: ChatBody, http: HttpRequest) -> Any:
        async def read() -> tuple[int, ...]:
            return await service.token_ids(await service.conversation(body.messages))

        prompt = await while_connected(http, service.limits, read)
        requests = [chat_request(service, body, prompt, seed) for seed in service.seeds(body.seed, body.n)]
        if body.stream:
            return event_stream(await opened(service, requests, chat_events, body, prompt), service.limits)

        async def run() -> dict[str, Any]:
            answers = await service.whole_answers(requests, body.stops)
            choices = []
            for index, answer in enumerate(answers):
                logprobs = await chat_logprobs(service, prompt, answer, body.top_logprobs) if body.logprobs else None
                message = {"role": "assistant", "content": content_of(answer), "refusal": None}
                choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}
                choices.append(choice | token_ids_json(body, prompt, answer))
            return {
                "id": new_id("chatcmpl"),
                "object": "chat.completion",
                "created": int(time.time()),
                "model": service.name,
                "choices": choices,
                "usage": service.usage([prompt], answers).chat(),
            }

        return await while_connected(http, service.limits, run)

    @router.post("/v1/completions", summary="Continue a text")
    async def completions(body: CompletionBody, http: HttpRequest) -> Any:
        prompts = await asyncio.to_thread(prompts_of, service, body)
        if body.n * len(prompts) > MAX_COMPLETIONS:
            raise ApiError(400, f"{len(prompts)} prompts × n {body.n}: at most {MAX_COMPLETIONS} answers", param="n")
        seeds = service.seeds(body.seed, body.n * len(prompts))
        is_scored_alone = body.echo and body.max_tokens == 0
        if not is_scored_alone and body.max_tokens == 0:
            raise ApiError(400, "max_tokens: 0 tokens need echo", param="max_tokens")
        requests = [completion_request(service, body, prompts[index // body.n], seed) for index, seed in enumerate(seeds)]
        if body.stream:
            asked = [] if is_scored_alone else requests
            return event_stream(await opened(service, asked, completion_events, body, prompts), service.limits)

        async def run() -> dict[str, Any]:
            count = len(requests)
            answers = [Answer(finish_reason="length") for _ in range(count)]
            if not is_scored_alone:
                answers = await service.whole_answers(requests, body.stops)
            scored: Scored = {}
            choices = [
                await completion_choice(service, body, prompts[index // body.n], index, answer, scored)
                for index, answer in enumerate(answers)
            ]
            return completion_envelope(service) | {"choices": choices, "usage": service.usage(prompts, answers).chat()}

        return await while_connected(http, service.limits, run)


async def opened(service: Service, requests: Sequence[Request], events: Any, *arguments: Any) -> AsyncIterator[str]:
    """Submit a stream's requests now, so that what is wrong with them is the response's status; return its events."""
    stack = AsyncExitStack()
    generations = await stack.enter_async_context(service.generations(requests))

    async def run() -> AsyncIterator[str]:
        async with stack:
            async for text in events(service, generations, *arguments):
                yield text

    return run()


# --- chat ------------------------------------------------------------------------------------------------------------


def chat_request(service: Service, body: ChatBody, prompt: tuple[int, ...], seed: int) -> Request:
    """Return the engine's request for one answer."""
    model, room = service.model, service.model.model.config.context_length - len(prompt)
    has_images = "image" in body.modalities
    parts: tuple[PartKind, ...] | None = None if "text" in body.modalities else ("image",)
    if body.format is not None:
        parts = tuple(body.format)
    limit = body.max_completion_tokens or body.max_tokens or max(1, room)
    constraints = model.constraints(limit, body.max_images if has_images else 0, None, parts)
    scale = body.guidance_scale
    if scale is None and parts == ("image",):
        scale = model.guidance_scale
    guidance = None
    if constraints.image_limit:
        guidance = model.prompts.guidance(EMPTY, scale)
    return Request(prompt, constraints, service.text_sampling(body), model.image_sampling, guidance, seed)


def token_ids_json(body: ChatBody | ImageBody, prompt: Sequence[int], answer: Answer) -> dict[str, Any]:
    """Return the token ids of prompt and answer, where a body asks for them."""
    return {"prompt_token_ids": prompt, "token_ids": answer.token_ids} if body.return_token_ids else {}


def content_of(answer: Answer) -> str | list[dict[str, Any]]:
    """Return the content of a message: a string where the answer is text, else a list of parts."""
    if all(isinstance(part, Text) for part in answer.parts):
        return answer.text
    return [part_json(part) for part in answer.parts]


def part_json(part: Shown) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    picture: Any = part.image
    url = {"url": f"data:image/png;base64,{encode_picture(picture)}"}
    if isinstance(part, PartialImage):
        return {"type": "partial_image", "image_url": url, "rows": part.rows}
    return {"type": "image_url", "image_url": url}


async def chat_events(
    service: Service, generations: Sequence[Any], body: ChatBody, prompt: tuple[int, ...]
) -> AsyncIterator[str]:
    """Yield the events of a streamed answer. With log-probabilities each choice comes as one event."""
    envelope = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": service.name,
    }

    def chunk(
        index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None, more: dict[str, Any] = NOTHING
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event(envelope | {"choices": [choice | more]})

    answers = [Answer() for _ in generations]
    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    streams = [
        service.parts(g, answer, body.stops, body.partial_images) for g, answer in zip(generations, answers, strict=True)
    ]
    async for index, part in merge(streams):
        if not body.logprobs:
            yield chunk(index, {"content": part.text if isinstance(part, Text) else [part_json(part)]})
    for index, answer in enumerate(answers):
        if body.logprobs:
            logprobs = await chat_logprobs(service, prompt, answer, body.top_logprobs)
            yield chunk(index, {"content": content_of(answer)}, logprobs=logprobs)
        yield chunk(index, {}, answer.finish_reason, more=token_ids_json(body, prompt, answer))
    if body.with_usage:
        yield event(envelope | {"choices": [], "usage": service.usage([prompt], answers).chat()})
    yield DONE


async def chat_logprobs(service: Service, prompt: Sequence[int], answer: Answer, top: int) -> dict[str, Any]:
    """Return the log-probabilities of the text tokens of an answer, from one pass over all of it."""
    scores = await service.scores([*prompt, *answer.token_ids], top, is_new=False)
    content = []
    for offset, token_id in enumerate(answer.token_ids):
        if token_id not in service.vocabulary.text_ids:
            continue
        position = len(prompt) + offset - 1
        entry = token_json(service, token_id, float(scores.log_probs[position]))
        pairs = zip(scores.top_ids[position].tolist(), scores.top_log_probs[position].tolist(), strict=True)
        entry["top_logprobs"] = [token_json(service, t, value) for t, value in pairs][:top]
        content.append(entry)
    return {"content": content, "refusal": None}


def token_json(service: Service, token_id: int, logprob: float) -> dict[str, Any]:
    data = service.token_bytes(token_id)
    return {"token": service.token_text(token_id), "logprob": logprob, "bytes": list(data) or None}


# --- completions -----------------------------------------------------------------------------------------------------


def prompts_of(service: Service, body: CompletionBody) -> list[tuple[int, ...]]:
    """Return the token ids of each prompt: bos and a text, or ids as they are."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    bos = service.vocabulary.bos
    return [
        (bos, *service.model.tokenizer.text_to_ids(entry)) if isinstance(entry, str) else tuple(entry) for entry in prompt
    ]


def completion_request(service: Service, body: CompletionBody, prompt: tuple[int, ...], seed: int) -> Request:
    room = service.model.model.config.context_length - len(prompt)
    constraints = OutputConstraints(max(1, room) if body.max_tokens is None else max(1, body.max_tokens))
    return Request(prompt, constraints, service.text_sampling(body), seed=seed)


def completion_envelope(service: Service) -> dict[str, Any]:
    return {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": service.name}


async def completion_choice(
    service: Service, body: CompletionBody, prompt: tuple[int, ...], index: int, answer: Answer, scored: Scored
) -> dict[str, Any]:
    """Return one choice, with the prompt before it and log-probabilities where they are asked for.

    scored: sequences that were scored already, each once.
    """
    text, shown = answer.text, tuple(answer.token_ids)
    if body.echo:
        text, shown = "".join(piece_texts(service, prompt)) + text, (*prompt, *shown)
    logprobs = None
    if body.logprobs is not None:
        whole = (*prompt, *answer.token_ids)
        if whole not in scored:
            is_new = not answer.token_ids
            scored[whole] = await service.scores(whole, body.logprobs, text_only=True, is_new=is_new)
        logprobs = completion_logprobs(service, shown, len(whole), scored[whole], body.logprobs)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def piece_texts(service: Service, token_ids: Sequence[int]) -> list[str]:
    """Return the text of each token: complete characters, at the token that completes them; of others nothing."""
    texts, pending = [], b""
    for token_id in token_ids:
        pending += service.token_bytes(token_id)
        length = complete_utf8_length(pending)
        texts.append(pending[:length].decode("utf-8", errors="replace"))
        pending = pending[length:]
    if pending and texts:
        texts[-1] += pending.decode("utf-8", errors="replace")
    return texts


def completion_logprobs(
    service: Service, shown: Sequence[int], num_tokens: int, scores: TokenScores, top: int
) -> dict[str, Any]:
    """Return the log-probabilities of the shown tokens, the last ones of a sequence of `num_tokens`."""
    texts = piece_texts(service, shown)
    offsets = [0, *itertools.accumulate(map(len, texts))][: len(texts)]
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    first = num_tokens - len(shown)
    for offset, token_id in enumerate(shown):
        position = first + offset - 1
        if position < 0:  # nothing predicts the first token
            values.append(None)
            tops.append(None)
            continue
        values.append(float(scores.log_probs[position]))
        pairs = zip(scores.top_ids[position].tolist(), scores.top_log_probs[position].tolist(), strict=True)
        likeliest = {token_json(service, t, value)["token"]: value for t, value in list(pairs)[:top]}
        likeliest.setdefault(token_json(service, token_id, 0.0)["token"], float(scores.log_probs[position]))
        tops.append(likeliest)
    return {
        "tokens": [token_json(service, token_id, 0.0)["token"] for token_id in shown],
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


async def completion_events(
    service: Service, generations: Sequence[Any], body: CompletionBody, prompts: Sequence[tuple[int, ...]]
) -> AsyncIterator[str]:
    """Yield the events of streamed completions. With log-probabilities each choice comes as one event.

    generations: none where prompts are scored alone.
    """
    envelope = completion_envelope(service)
    answers = [Answer(finish_reason="length") for _ in range(body.n * len(prompts))]

    def chunk(index: int, text: str, reason: str | None = None) -> str:
        return event(envelope | {"choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": reason}]})

    if body.echo and body.logprobs is None:
        for index in range(len(answers)):
            yield chunk(index, "".join(piece_texts(service, prompts[index // body.n])))
    asked = answers if generations else []
    streams = [service.parts(g, answer, body.stops) for g, answer in zip(generations, asked, strict=True)]
    async for index, part in merge(streams):
        if body.logprobs is None and isinstance(part, Text):
            yield chunk(index, part.text)
    for index, answer in enumerate(answers):
        if body.logprobs is not None:
            choice = await completion_choice(service, body, prompts[index // body.n], index, answer, {})
            yield event(envelope | {"choices": [choice]})
        else:
            yield chunk(index, "", answer.finish_reason)
    if body.with_usage:
        yield event(envelope | {"choices": [], "usage": service.usage(prompts, answers).chat()})
    yield DONE
