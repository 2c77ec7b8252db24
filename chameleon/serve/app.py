"""The web application: a model, its routes and its page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

import chameleon.serve.chat
import chameleon.serve.images
import chameleon.serve.tools
from chameleon.bundle import package_version
from chameleon.generation.chameleon import Chameleon
from chameleon.serve.errors import add_handlers
from chameleon.serve.guards import Guards
from chameleon.serve.metrics import Metrics
from chameleon.serve.schema_page import schema_page
from chameleon.serve.service import Service
from chameleon.serve.settings import ApiKey, ApiKeys, Limits

PAGE = Path(__file__).parent / "page"


def build_app(
    load: Callable[[], Chameleon],
    *,
    name: str = "chameleon",
    limits: Limits | None = None,
    keys: Sequence[ApiKey] = (),
    hosts: Sequence[str] = (),
) -> FastAPI:
    """Load a model in an engine thread and return the application for it; the thread ends when the application does.

    hosts: see `Guards`.
    """
    limits = limits or Limits()
    service = Service(load, limits, name, Metrics())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.attach()
        gauges = asyncio.ensure_future(service.keep_gauges())
        yield
        gauges.cancel()
        service.worker.stop()

    problem = {"description": "Invalid request", "content": {"application/json": {"schema": ERROR_SCHEMA}}}
    app = FastAPI(
        title="Open Chameleon",
        version=package_version(),
        summary="Texts and pictures, in the forms of OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=dict.fromkeys((400, 401, 404, 408, 413, 429, 500, 503), problem),
    )
    app.state.service = service
    add_handlers(app)
    router = APIRouter()
    chameleon.serve.tools.add_open_routes(router, service)
    chameleon.serve.tools.add_routes(router, service)
    chameleon.serve.chat.add_routes(router, service)
    chameleon.serve.images.add_routes(router, service)
    app.include_router(router)
    add_page(app)
    app.add_middleware(Guards, keys=ApiKeys(keys), max_body_bytes=limits.body_bytes, metrics=service.metrics, hosts=hosts)
    return app


ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}


def add_page(app: FastAPI) -> None:
    """Serve the page at /, its files under /page, and the schema at /docs."""

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((PAGE / "index.html").read_text(encoding="utf-8"))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(schema_page(app.openapi()))

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
