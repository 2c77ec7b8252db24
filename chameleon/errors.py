"""The one error a user is meant to read: what was wrong, where, and what to do about it."""

from __future__ import annotations


class BadInput(ValueError):
    """Input that cannot be used. The message is one line that names the file, key or sample and the remedy.

    The command line prints the message without a traceback and ends with exit code 2.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str | None = None) -> None:
        text = f"{where}: {what}" if where is not None else what
        if remedy:
            text = f"{text}; {remedy}"
        super().__init__(" ".join(text.split()))
