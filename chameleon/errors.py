"""`BadInput`, the one error that a user is meant to read, and the checks that raise it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_SEED = 2**63 - 1


class BadInput(ValueError):
    """Invalid input. The message is one line: where the problem is, what it is, and how to fix it.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str | None = None) -> None:
        self.reason = " ".join((f"{what}; {remedy}" if remedy else what).split())
        """The message without `where`."""
        super().__init__(" ".join(f"{where}: {self.reason}".split()) if where is not None else self.reason)

    def __reduce__(self) -> Any:
        """Pickle the message and the reason, for other processes."""
        return rebuild, (str(self), self.reason)


def rebuild(message: str, reason: str) -> BadInput:
    """Return an error that was pickled."""
    error = BadInput(message)
    error.reason = reason
    return error


@contextmanager
def as_bad_input(what: str, where: object) -> Iterator[None]:
    """Re-raise errors caused by values of the wrong type, and `BadInput` without a location, as `BadInput` at `where`.

    `what` completes the message "not {what}".
    """
    try:
        yield
    except BadInput as error:
        raise BadInput(error.reason, where=where) from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
        raise BadInput(f"not {what} ({error})", where=where) from None


def check_seed(seed: int, where: str = "seed", *, largest: int = MAX_SEED) -> int:
    """Return the seed. Raise `BadInput` unless it is an integer in [0, largest]."""
    if type(seed) is not int or not 0 <= seed <= largest:
        raise BadInput(f"{seed} is out of range", where=where, remedy=f"use an integer from 0 to {largest}")
    return seed


def check_least(value: float, least: float, name: str) -> None:
    """Raise `BadInput` unless a number is finite and at least `least`."""
    if not least <= value < math.inf:
        raise BadInput(f"{name} is {value}, expected {least} or more")


def check_fields(config: Any, where: object) -> None:
    """Raise `BadInput` that names the first field of a dataclass whose value does not match its annotation.

    `int`: an integer of at least 1; `float`: finite and at least 0; `bool`; `tuple[int, ...]`: integers of at least 1.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        elements = value if field.type == "tuple[int, ...]" and isinstance(value, tuple) else (value,)
        for element in elements:
            is_number = isinstance(element, (int, float)) and not isinstance(element, bool)
            is_positive_int = is_number and isinstance(element, int) and 1 <= element < 2**53
            checks = {
                "int": (is_positive_int, "an integer of 1 or more"),
                "tuple[int, ...]": (is_positive_int, "integers of 1 or more"),
                "float": (is_number and 0 <= element < math.inf, "a number of 0 or more"),
                "bool": (isinstance(element, bool), "true or false"),
            }
            valid, expected = checks.get(str(field.type), (True, ""))
            if not valid:
                raise BadInput(f"{field.name} is {value!r}, expected {expected}", where=where)
