"""ASGI middleware: keys and rates, sizes of bodies, headers of safety, and counting of responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from chameleon.serve.errors import ApiError, respond
from chameleon.serve.metrics import Metrics
from chameleon.serve.settings import ApiKeys

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ready", "/docs", "/openapi.json")
"""Paths that need no key: the page and what it loads (`/page/…`), and the state of the server."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFETY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"content-security-policy": PAGE_POLICY.encode(),
    b"cross-origin-resource-policy": b"same-origin",
}


class Guards:
    """Checks requests before they reach the routes."""

    def __init__(self, app: Any, keys: ApiKeys, max_body_bytes: int, metrics: Metrics, hosts: Sequence[str] = ()) -> None:
        """hosts: names by which the server may be addressed, and of whose pages it answers requests; empty for any."""
        self.app, self.keys, self.max_body_bytes, self.metrics = app, keys, max_body_bytes, metrics
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, is_started = 500, False

        async def counted_send(message: dict[str, Any]) -> None:
            nonlocal status, is_started
            if message["type"] == "http.response.start":
                status, is_started = message["status"], True
                names = {name.lower() for name, _ in message["headers"]}
                message = message | {
                    "headers": [*message["headers"], *((n, v) for n, v in SAFETY_HEADERS.items() if n not in names)]
                }
            await send(message)

        try:
            self.check_host(scope)
            self.check_key(scope)
            await self.app(scope, self.limited(scope, receive), counted_send)
        except ApiError as error:
            if is_started:
                raise
            await respond(error)(scope, receive, counted_send)  # type: ignore[arg-type]
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.responses.labels(route, status).inc()

    def check_host(self, scope: Scope) -> None:
        """Raise `ApiError` for a page of another host that uses a browser here (DNS rebinding, forms of other sites)."""
        for header, value in scope["headers"]:
            name = header.lower()
            if not self.hosts or name not in (b"host", b"origin"):
                continue
            given = value.decode("latin-1")
            try:
                host = urlsplit(given if name == b"origin" else f"//{given}").hostname
            except ValueError:  # such as a bracket that is not closed
                host = None
            if host not in self.hosts:
                raise ApiError(403, f"this server answers to {', '.join(self.hosts)} alone; use --api-key for others")

    def check_key(self, scope: Scope) -> None:
        """Raise `ApiError` for a request without a key, or with too many in a minute."""
        path = scope["path"]
        if not self.keys.keys or path in OPEN_PATHS or path.startswith("/page/"):
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        kind, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        key = self.keys.find(given.strip()) if kind.lower() == "bearer" else None
        if key is None:
            raise ApiError(401, "a valid key is needed: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
        if seconds := self.keys.check_rate(key):
            raise ApiError(429, "this key's rate is used up", headers={"Retry-After": str(int(seconds) + 1)})

    def limited(self, scope: Scope, receive: Receive) -> Receive:
        """Return `receive` that raises `ApiError` where the body is too large, told or read."""
        too_large = ApiError(413, f"the body has more than {self.max_body_bytes:,} bytes", headers={"Connection": "close"})
        for name, value in scope["headers"]:
            if name.lower() == b"content-length" and (not value.isdigit() or int(value) > self.max_body_bytes):
                raise too_large
        num_bytes = 0

        async def limited_receive() -> dict[str, Any]:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                raise too_large
            return message

        return limited_receive
