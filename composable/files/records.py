"""Typed records in JSON: frozen dataclasses that are checked when they are read.

The fields of a record are checked against their types before any is used. Unknown fields are
ignored, so that older versions can read the files of newer ones.
"""

from __future__ import annotations

import json
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
        >>> import dataclasses
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
    """Return a record as readable JSON text; fields that are None are left out."""
    return json.dumps(to_plain(record), indent=2, ensure_ascii=False) + "\n"


def to_plain(record: Any) -> Any:
    """Return a record as plain JSON data; fields that are None are left out."""
    return _without_none(msgspec.to_builtins(record))


def record_schema(kind: type[Any]) -> dict[str, Any]:
    """Return the JSON schema of a record, for the reference documentation."""
    return msgspec.json.schema(kind)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
