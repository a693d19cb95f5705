"""Typed records in JSON: frozen dataclasses that are checked when they are read.

The fields of a record are checked against their types before any is used. Unknown fields are
ignored, so that older versions can read the files of newer ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

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


def parse_table(
    data: bytes | str, where: str, error: type[ComposableError] = ComposableError
) -> dict[str, Any]:
    """Parse JSON text as a table of fields, whose types are still to be checked.

    Args:
        data: The text.
        where: Location for errors, such as the path.
        error: The class of the errors raised.

    Raises:
        ComposableError: For text that is not JSON, or no table.

    Example:
        >>> parse_table('{"loss": 1.5}', "step.json")
        {'loss': 1.5}
    """
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise error(f"not JSON: {problem}", where=where) from problem
    if not isinstance(table, dict):
        raise error("expected a table of fields", where=where)
    return table


def convert(
    value: Any, kind: Any, where: str, error: type[ComposableError] = ComposableError
) -> Any:
    """Return a value if it has a type.

    Args:
        value: Plain data.
        kind: Type as `msgspec.convert` understands it.
        where: Location for errors.
        error: The class of the errors raised.

    Raises:
        ComposableError: If it has another type, or is not a finite number.

    Example:
        >>> convert([1, 2], list[int], "config.eos_token_id")
        [1, 2]
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise error(f"{value!r} is not valid: expected a finite number", where=where)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        text = str(problem)
        raise error(
            f"{reprlib.repr(value)} is not valid: {text[0].lower()}{text[1:]}", where=where
        ) from problem


def convert_exactly(
    table: Mapping[str, Any],
    kind: type[R],
    where: str,
    error: type[ComposableError] = ComposableError,
) -> R:
    """Return a record from plain data that has its fields and no others.

    For what an unknown field may change, such as the architecture of a model. In the fields,
    records are as `parse_record` takes them.

    Args:
        table: The fields by name.
        kind: The record's dataclass.
        where: Location for errors; the name of the field is appended.
        error: The class of the errors raised.

    Raises:
        ComposableError: For an unknown or missing field, or one of another type.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Step:
        ...     loss: float
        >>> convert_exactly({"loss": 1.5, "gain": 1}, Step, "step")
        Traceback (most recent call last):
        composable.errors.ComposableError: step.gain: unknown field
    """
    hints = get_type_hints(kind)
    for name in table:
        if name not in hints:
            raise error("unknown field", where=f"{where}.{name}")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type] # R is any dataclass
        is_required = field.default is field.default_factory is dataclasses.MISSING
        if is_required and field.name not in table:
            raise error("missing field", where=f"{where}.{field.name}")
    return kind(
        **{name: convert(table[name], hints[name], f"{where}.{name}", error) for name in table}
    )


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
