"""The one error a user is meant to read: what was wrong, where, and what to do about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class BadInput(ValueError):
    """Input that cannot be used. The message is one line that names the file, key or sample and the remedy.

    The command line prints the message without a traceback and ends with exit code 2.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str | None = None) -> None:
        self.reason = " ".join((f"{what}; {remedy}" if remedy else what).split())
        """The message without the place."""
        super().__init__(" ".join(f"{where}: {self.reason}".split()) if where is not None else self.reason)


@contextmanager
def reading(what: str, where: object) -> Iterator[None]:
    """Turns what values of wrong kinds lead to, `BadInput` without a place too, into `BadInput` that names `where`."""
    try:
        yield
    except BadInput as error:
        raise BadInput(error.reason, where=where) from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
        raise BadInput(f"not {what} ({error})", where=where) from None


def check_fields(value: Any, where: object) -> None:
    """Raises `BadInput` naming a field of a dataclass that is not of its kind.

    `int`: an integer of 1 or more; `float`: finite, 0 or more; `bool`; `tuple[int, ...]`: integers of 1 or more.
    """
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        entries = found if field.type == "tuple[int, ...]" and isinstance(found, tuple) else (found,)
        for entry in entries:
            number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
            wanted = {
                "int": (number and isinstance(entry, int) and 1 <= entry < 2**53, "an integer of 1 or more"),
                "tuple[int, ...]": (number and isinstance(entry, int) and entry >= 1, "integers of 1 or more"),
                "float": (number and 0 <= entry < math.inf, "a number of 0 or more"),
                "bool": (isinstance(entry, bool), "true or false"),
            }
            right, what = wanted.get(str(field.type), (True, ""))
            if not right:
                raise BadInput(f"{field.name} is {found!r}, expected {what}", where=where)
