"""Typed records in JSON: frozen dataclasses that are checked when they are read.

The fields of a record are checked against their types before any is used. Unknown fields are
ignored, so that older versions can read the files of newer ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from composable.errors import ComposableError

R = TypeVar("R")


def parse_record(
    kind: type[R], data: bytes | str, where: str, error: type[ComposableError] = ComposableError
) -> R:
    """Parse JSON text as a record.

    Args:
        kind: The record's dataclass.
        data: The text.
        where: Location for errors, such as the path.
        error: The class of the errors raised.

    Raises:
        ComposableError: For text that is not JSON, a missing field, or one of another type.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Step:
        ...     loss: float
        >>> parse_record(Step, '{"loss": 1.5}', "step.json")
        Step(loss=1.5)
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise error(f"not a valid {kind.__name__}: {problem}", where=where) from problem


def format_record(record: Any) -> str:
    """Return a record as readable JSON text; fields of records that are None are left out."""
    return json.dumps(to_plain(record), indent=2, ensure_ascii=False) + "\n"


def to_plain(record: Any) -> Any:
    """Return a record as plain JSON data; fields of records that are None are left out.

    None in a dictionary or a list is a value, and stays.

    Args:
        record: A record, or a dictionary or sequence of records.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Step:
        ...     figures: dict[str, float | None]
        ...     note: str | None = None
        >>> to_plain(Step({"loss": 1.5, "gain": None}))
        {'figures': {'loss': 1.5, 'gain': None}}
    """
    if dataclasses.is_dataclass(record):
        return {
            field.name: to_plain(value)
            for field in dataclasses.fields(record)
            if (value := getattr(record, field.name)) is not None
        }
    if isinstance(record, Mapping):
        return {key: to_plain(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_plain(value) for value in record]
    return msgspec.to_builtins(record)


def record_schema(kind: type[Any]) -> dict[str, Any]:
    """Return the JSON schema of a record, for the reference documentation."""
    return msgspec.json.schema(kind)
