"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from chameleon.serve.errors import as_api_error, error_body
from chameleon.serve.settings import Limits

DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event(value: dict[str, Any], name: str | None = None) -> str:
    """Return one event."""
    data = f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return f"event: {name}\n{data}" if name else data


def event_stream(events: AsyncIterator[str], limits: Limits) -> StreamingResponse:
    """Return a response that streams events; one that fails midway ends with an event that holds the error."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(limits.seconds), aclosing(events) as open_events:  # type: ignore[type-var]
                async for text in open_events:
                    yield text
        except Exception as error:
            answer = as_api_error(error)
            yield event(error_body(answer.status, answer.message, answer.param))

    return StreamingResponse(guarded(), media_type="text/event-stream", headers=HEADERS)


async def merge(streams: list[AsyncIterator[Any]]) -> AsyncIterator[tuple[int, Any]]:
    """Yield (index, item) of several streams as they come."""
    items: asyncio.Queue[tuple[int, Any] | Exception | None] = asyncio.Queue()

    async def read(index: int, stream: AsyncIterator[Any]) -> None:
        try:
            async with aclosing(stream) as open_stream:  # type: ignore[type-var]
                async for item in open_stream:
                    items.put_nowait((index, item))
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.ensure_future(read(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
