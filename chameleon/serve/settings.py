"""Settings of a server, and the keys that clients authenticate with."""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chameleon.errors import BadInput

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait."""

    body_bytes: int = 32 * 2**20
    pixels: int = 16_000_000
    """Of one picture."""
    images: int = 16
    """Pictures in a request."""
    waiting: int = 64
    """Requests in the queue; further ones get status 429."""
    seconds: float = 600.0
    """After so long a request is ended, with status 408."""
    drain_seconds: float = 60.0
    """After SIGTERM, running requests may take so long to end."""


@dataclass
class ApiKey:
    """A key and its rate: at most so many requests a minute, 0 for any number."""

    key: str
    per_minute: float = 0.0
    allowance: float = field(default=-1.0, repr=False)
    latest: float = field(default=0.0, repr=False)

    def seconds_to_wait(self, now: float) -> float:
        """Count a request; return 0, or in how many seconds one is allowed (a token bucket of one minute's requests)."""
        if not self.per_minute:
            return 0.0
        if self.allowance < 0:
            self.allowance, self.latest = max(1.0, self.per_minute), now
        most = max(1.0, self.per_minute)
        self.allowance = min(most, self.allowance + (now - self.latest) * self.per_minute / 60)
        self.latest = now
        if self.allowance < 1:
            return (1 - self.allowance) * 60 / self.per_minute
        self.allowance -= 1
        return 0.0


class ApiKeys:
    """The keys of a server; none is needed where there are none."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self.keys = list(keys)

    def find(self, given: str) -> ApiKey | None:
        """Return the key that was given. All are compared, each in constant time."""
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.key.encode(), given.encode()):
                found = key
        return found

    def check_rate(self, key: ApiKey) -> float:
        return key.seconds_to_wait(time.monotonic())


def read_keys(path: Path) -> list[ApiKey]:
    """Read a file of keys: on each line a key and, if it is limited, its requests a minute; # starts a comment."""
    keys = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) > 2 or len(words[0]) < 8:
            raise BadInput("expected a key of at least 8 characters and, if limited, requests a minute", where=where)
        try:
            rate = float(words[1]) if len(words) == 2 else 0.0
        except ValueError:
            rate = -1.0
        if not 0 <= rate < 1e9:
            raise BadInput(f"{words[1]} is no number of requests a minute", where=where)
        keys.append(ApiKey(words[0], rate))
    if not keys:
        raise BadInput("no key in it", where=path)
    return keys


def check_exposure(host: str, keys: Sequence[ApiKey], is_open: bool) -> None:
    """Raise `BadInput` for an address that others can reach, without a key and without consent."""
    if host not in LOOPBACK and not keys and not is_open:
        raise BadInput(
            f"others can reach {host}, and no key is asked for",
            where="--host",
            remedy="give --api-key or --api-keys, or --open if anybody may use the server",
        )
