"""Frozen dataclasses as plain data and back, strictly: every field named, typed and known."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Collection
from typing import Any, Final, TypeVar

from composable.errors import InterfaceError

T = TypeVar("T")
# The Python types that plain data may have for each annotation.
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "int | None": (int,),
    "float": (int, float),
    "tuple[int, ...]": (list, tuple),
    "tuple[float, ...]": (list, tuple),
    "tuple[str, ...]": (list, tuple),
}


def types_of(kind: type[Any], without: Collection[str] = ()) -> dict[str, str]:
    """Return the annotation of every field of a dataclass, without some.

    Example:
        >>> from composable.interface.settings import OutputMixture
        >>> types_of(OutputMixture, without=["power"])
        {'prior': 'float', 'rate': 'float'}
    """
    fields = dataclasses.fields(kind)
    return {field.name: str(field.type) for field in fields if field.name not in without}


def to_plain(value: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass as plain data; those that are None are left out.

    Example:
        >>> from composable.interface.settings import OutputMixture
        >>> to_plain(OutputMixture(prior=0.5, rate=0.1, power=1))
        {'prior': 0.5, 'rate': 0.1, 'power': 1.0}
    """
    plain: dict[str, Any] = {}
    for name, type_ in types_of(type(value), without).items():
        field = getattr(value, name)
        # 1 and 1.0 are equal but spelt differently; equal interfaces must have one digest.
        if type_ == "float":
            field = float(field)
        elif type_ == "tuple[float, ...]":
            field = [float(item) for item in field]
        elif type_.startswith("tuple"):
            field = list(field)
        if field is not None:
            plain[name] = field
    return plain


def read_value(kind: Callable[..., T], data: Any) -> T:
    """Return a dataclass from plain data that has all its fields but those that may be None.

    Raises:
        InterfaceError: For a missing, unknown, ill-typed or out-of-range field; `where` is its
            name.

    Example:
        >>> from composable.interface.settings import OutputMixture
        >>> read_value(OutputMixture, {"prior": 0.5, "rate": 0.1, "power": 1.0}).rate
        0.1
    """
    types = types_of(kind)  # type: ignore[arg-type]
    optional = {name for name, type_ in types.items() if type_.endswith("| None")}
    return kind(**read_fields(expect_table(data), types, optional))


def expect_table(data: Any) -> dict[str, Any]:
    """Return the data if it is a table.

    Raises:
        InterfaceError: If it is anything else.
    """
    if not isinstance(data, dict):
        raise InterfaceError("expected a table of fields")
    return data


def read_fields(
    table: dict[str, Any], types: dict[str, str], optional: Collection[str]
) -> dict[str, Any]:
    """Return the fields of a table, lists as tuples.

    Args:
        table: Plain data.
        types: Annotation of every field that may be there.
        optional: Fields that may be missing.

    Raises:
        InterfaceError: For a missing, unknown or ill-typed field; `where` is its name.
    """
    for name in table.keys() - types.keys():
        raise InterfaceError("unknown field", where=str(name)[:80])
    for name, type_ in types.items():
        if name not in table:
            if name not in optional:
                raise InterfaceError("missing field", where=name)
            continue
        value: Any = table[name]
        if isinstance(value, bool) or not isinstance(value, _TYPES[type_]):
            shown = reprlib.repr(value)
            raise InterfaceError(f"{shown} has the wrong type, expected {type_}", where=name)
        if isinstance(value, list | tuple):
            item = type_.removeprefix("tuple[").removesuffix(", ...]")
            if not all(type(element) in _TYPES[item] for element in value):
                raise InterfaceError(f"expected a list of {item}", where=name)
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in table.items()
    }
