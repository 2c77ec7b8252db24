"""One progress display for all long commands: a line that changes on a terminal, else a new line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

SECONDS_BETWEEN_LINES = 20.0
"""Without a terminal, as in a log file."""
REFRESHES_PER_SECOND = 4


class StatusLine:
    """A line of text on stderr that shows the state of a long operation."""

    def __init__(self, *, enabled: bool = True) -> None:
        """enabled: whether this process shows anything; one of several does."""
        self.enabled = enabled
        self.console = Console(stderr=True)
        self.live: Live | None = None
        self.last_shown = -float("inf")

    def is_due(self) -> bool:
        """Return whether enough time has passed to show a new text."""
        interval = 1 / REFRESHES_PER_SECOND if self.console.is_terminal else SECONDS_BETWEEN_LINES
        return self.enabled and time.monotonic() - self.last_shown >= interval

    def update(self, text: str, *, final: bool = False) -> None:
        """Show a text. Without a terminal it is only printed if `is_due` or `final`."""
        if not self.enabled or not (self.console.is_terminal or final or self.is_due()):
            return
        self.last_shown = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
            return
        if self.live is None:
            self.live = Live(console=self.console, refresh_per_second=REFRESHES_PER_SECOND)
            self.live.start()
        self.live.update(Text(text))

    def stop(self) -> None:
        """Leave the last text on the terminal and release it."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def format_duration(seconds: float) -> str:
    """Return a duration as minutes and seconds, with hours where there are any."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
