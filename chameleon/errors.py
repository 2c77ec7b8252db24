"""The one error a user is meant to read: what was wrong, where, and what to do about it."""

from __future__ import annotations


class BadInput(ValueError):
    """Input that cannot be used. The message is one line that names the file, key or sample and the remedy.

    The command line prints the message without a traceback and ends with exit code 2.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str | None = None) -> None:
        self.reason = " ".join((f"{what}; {remedy}" if remedy else what).split())
        """The message without the place."""
        super().__init__(" ".join(f"{where}: {self.reason}".split()) if where is not None else self.reason)
