"""Reads configurations, dataclasses given as nested dictionaries, strictly: the one validator of recipes and options.

jsonargparse checks and converts the types; before that, unknown keys are reported with the nearest known one, and null
where a value is required, which jsonargparse would accept.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from chameleon.errors import BadInput

C = TypeVar("C")


def read_config(kind: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Return the configuration of dataclass `kind` from a YAML file and `key.sub=value` overrides.

    Raises `BadInput` that names file and key for what is unknown, missing, or of the wrong type.
    """
    values = {} if path is None else load_yaml(path)
    where: object = "command line" if path is None else path
    check_keys(kind, values, where)
    for override in overrides:
        apply_override(values, override)
    check_keys(kind, values, "command line" if overrides else where)
    return parse_config(kind, values, where)


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"not YAML ({error})", where=path) from None
    if not isinstance(values, dict):
        raise BadInput("expected keys and values", where=path)
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set a nested value from `key.sub=value`, whose value is YAML."""
    key, sign, text = override.partition("=")
    if not sign:
        raise BadInput(f"expected key=value, got {override!r}", where="command line")
    *parents, name = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise BadInput(f"{override!r}: {parent} has no keys", where="command line")
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise BadInput(f"the value of {override!r} is not YAML", where="command line") from None


def check_keys(kind: Any, values: Any, where: object, prefix: str = "") -> None:
    """Raise `BadInput` for the first unknown key, naming the nearest known one, and for null where it is not allowed."""
    if not isinstance(values, dict):
        raise BadInput(f"{prefix.rstrip('.')} is {values!r}, expected keys and values", where=where)
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for key, value in values.items():
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise BadInput(f"unknown key {prefix}{key}", where=where, remedy=f"did you mean {prefix}{nearest}?")
        hint = hints[key]
        if value is None:
            if type(None) not in typing.get_args(hint):
                raise BadInput(f"{prefix}{key} is empty", where=where, remedy="give a value, or leave it out")
            continue
        is_list = typing.get_origin(hint) is list
        element_kind = typing.get_args(hint)[0] if is_list else hint
        if dataclasses.is_dataclass(element_kind):
            if is_list and not isinstance(value, list):
                raise BadInput(f"{prefix}{key} is {value!r}, expected a list", where=where)
            for element in value if is_list else [value]:
                check_keys(element_kind, element, where, f"{prefix}{key}.")


def parse_config(kind: type[C], values: dict[str, Any], where: object) -> C:
    """Return a dataclass with the values, whose types are checked. Raise `BadInput` at `where`."""
    parser = ArgumentParser(exit_on_error=False, parser_mode="yaml")
    parser.add_class_arguments(kind)
    try:
        return kind(**vars(parser.instantiate_classes(parser.parse_object(values))))
    except BadInput as error:
        raise BadInput(error.reason, where=where) from None
    except (ArgumentError, TypeError) as error:
        raise BadInput(str(error), where=where) from None
