"""The page of a study, served on this machine: a pair at a time, blind, and each click is on disk before the next one."""

from __future__ import annotations

import json
import mimetypes
import re
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from chameleon.errors import BadInput
from chameleon.evaluation.study import MEDIA, Study

PAGE = Path(__file__).with_name("study.html")
MAX_BODY = 10_000
JUDGE_NAME = re.compile(r"[\w .@+-]{1,60}")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class StudyServer(ThreadingHTTPServer):
    """Serves one study. Judgements are written by one thread at a time."""

    daemon_threads = True

    def __init__(self, study: Study, host: str = "127.0.0.1", port: int = 0) -> None:
        self.study, self.lock = study, threading.Lock()
        self.is_local = host in ("localhost", "127.0.0.1", "::1")
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: StudyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(self.get)

    def do_POST(self) -> None:
        self.answer(self.post)

    def answer(self, respond: Callable[[], tuple[bytes, str]]) -> None:
        """Send what `respond` returns, or one line of what is wrong with the request."""
        status = HTTPStatus.OK
        try:
            if not self.has_right_host():
                raise BadInput("this page is served for this machine alone", where="Host")
            body, kind = respond()
        except OSError:
            status, body, kind = HTTPStatus.NOT_FOUND, b"not found", "text/plain"
        except (BadInput, ValueError, KeyError, TypeError) as error:
            status, body, kind = HTTPStatus.BAD_REQUEST, str(error).encode(), "text/plain; charset=utf-8"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if status != HTTPStatus.OK:  # a body that was not read must not be taken for a second request
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def has_right_host(self) -> bool:
        """Whether the Host header names this machine: another page's script reaches us by another name (DNS rebinding)."""
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        return not self.server.is_local or host in LOCAL_HOSTS

    def get(self) -> tuple[bytes, str]:
        address = urlsplit(self.path)
        if address.path == "/":
            return PAGE.read_bytes(), "text/html; charset=utf-8"
        if address.path == "/next":
            (judge,) = parse_qs(address.query)["judge"]
            return as_json(self.next_pair(checked(judge)))
        if address.path.startswith("/media/"):
            name = Path(address.path).name
            return (self.server.study.folder / MEDIA / name).read_bytes(), mimetypes.guess_type(name)[0] or "image/png"
        raise FileNotFoundError

    def next_pair(self, judge: str) -> dict[str, Any]:
        """Return what the page shows next, without a word of the models."""
        study = self.server.study
        with self.server.lock:
            pair, num_done = study.next_pair(judge)
        state: dict[str, Any] = {"done": num_done, "total": len(study.pairs)}
        if pair is not None:
            prompt = study.prompts[pair.prompt]
            sides = {side: prompt["answers"][model] for side, model in zip(("left", "right"), pair.models, strict=True)}
            state |= {"pair": pair.index, "prompt": prompt["prompt"], **sides}
        return state

    def post(self) -> tuple[bytes, str]:
        length = int(self.headers.get("Content-Length", 0))
        if self.path != "/judge":
            raise FileNotFoundError(self.path)
        if not 0 <= length <= MAX_BODY or self.headers.get("Content-Type") != "application/json":
            raise BadInput("expected a small body of application/json", where="/judge")
        body = json.loads(self.rfile.read(length))
        judge, fulfilled = checked(body["judge"]), [str(body["left"]), str(body["right"])]
        with self.server.lock:
            self.server.study.judge(judge, int(body["pair"]), str(body["better"]), fulfilled)
        return as_json(self.next_pair(judge))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: the judgements are the log."""


def checked(judge: str) -> str:
    """Return a judge's name. Raise `BadInput` for an empty or strange one."""
    if not JUDGE_NAME.fullmatch(judge.strip()):
        raise BadInput("give a name of letters, digits and spaces", where="judge")
    return judge.strip()


def as_json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value, ensure_ascii=False).encode(), "application/json"
