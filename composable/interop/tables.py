"""Tables of fields that other projects wrote: JSON files and GGUF metadata.

No field is used before its type is known, and none is passed over in silence: a field is read,
must have one of a few values, is known to change nothing, or is rejected by name.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from composable.errors import InteropError
from composable.files import records
from composable.files.reading import read_bytes

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Finite = Annotated[float, msgspec.Meta(gt=-1e30, lt=1e30)]
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e30)]

DELETE_IT: Final = "if it changes nothing, delete the field"


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What the fields of a table may hold.

    Args:
        types: Type of every field that is read, as `msgspec.convert` understands it.
        only: Fields that must have one of a few values, because another changes what is computed.
        ignored: Fields that change nothing that is computed here.
        ignored_prefixes: Beginnings of the names of such fields.
        is_off: Whether a value of an unknown field says that the field does nothing.
        changes: What an unknown field may change.
        hints: Cures by the name of the field, for those that have one of their own.
        cure: The cure for other unknown fields.

    Example:
        >>> schema = Schema(types={"r": Count}, only={"bias": ("none",)}, changes="the adapter")
        >>> schema.check({"r": 4, "bias": "none"}, "adapter_config.json: ")
        >>> schema.check({"r": "4"}, "adapter_config.json: ")
        Traceback (most recent call last):
        composable.errors.InteropError: adapter_config.json: r: '4' is not valid: expected `int`, \
got `str`
    """

    types: Mapping[str, Any]
    changes: str
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    ignored_prefixes: tuple[str, ...] = ()
    is_off: Callable[[Any], bool] = lambda value: value is None
    hints: Mapping[str, str] = field(default_factory=dict)
    cure: str = DELETE_IT

    def check(self, table: Mapping[str, Any], place: str) -> None:
        """Check every field of a table; whether one is missing is left to the reader.

        Args:
            table: The fields by name.
            place: Where the table is; the name of a field is appended to it.

        Raises:
            InteropError: For the first field that is not as it must be; `where` names it.
        """
        for name in sorted(table):
            value, where = table[name], f"{place}{name}"
            if name in self.only:
                self._require_allowed(name, value, where)
            elif name in self.types:
                convert(value, self.types[name], where)
            elif not (
                name in self.ignored or name.startswith(self.ignored_prefixes) or self.is_off(value)
            ):
                raise InteropError(
                    f"unknown field with value {reprlib.repr(value)}; it may change {self.changes}",
                    where=where,
                    hint=self.hints.get(name, self.cure),
                )

    def _require_allowed(self, name: str, value: Any, where: str) -> None:
        # By identity of type too: 1 is not True, and a table with the other is malformed.
        if not any(value == one and type(value) is type(one) for one in self.only[name]):
            named = [one for one in self.only[name] if one is not None]
            expected = " or ".join(map(repr, named or [None]))
            raise InteropError(
                f"{reprlib.repr(value)} is not implemented, expected {expected}",
                where=where,
                hint=self.hints.get(name),
            )


def convert(value: Any, kind: Any, where: str) -> Any:
    """Return a value if it has a type.

    Args:
        value: Plain data.
        kind: Type as `msgspec.convert` understands it.
        where: Location for errors.

    Raises:
        InteropError: If it has another, or is not a finite number.

    Example:
        >>> convert([1, 2], list[int], "config.eos_token_id")
        [1, 2]
    """
    return records.convert(value, kind, where, InteropError)


def require_agreement(stated: Mapping[str, Any], hint: str | None = None) -> None:
    """Require that all places that state a fact state the same.

    Args:
        stated: The place of every statement: what it says.
        hint: How to settle it.

    Raises:
        InteropError: If two differ; both are named.

    Example:
        >>> require_agreement({"config.a": 1, "config.b": 1})
        >>> require_agreement({"config.a": 1, "config.b": 2})
        Traceback (most recent call last):
        composable.errors.InteropError: config.b: 2 contradicts config.a, which is 1
    """
    places = list(stated)
    for place in places[1:]:
        first, other = stated[places[0]], stated[place]
        if first != other:
            raise InteropError(
                f"{reprlib.repr(other)} contradicts {places[0]}, which is {reprlib.repr(first)}",
                where=place,
                hint=hint,
            )


def read_json(path: Path) -> dict[str, Any]:
    """Return the table of fields that a JSON file holds.

    Raises:
        InteropError: If it is missing, holds something else, or states a field twice with different
            values.
    """

    def join(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            for name, value in pairs:
                require_agreement({f"{path}: {name}": table[name], f"{path}: {name} again": value})
        return table

    try:
        data = json.loads(read_bytes(path), object_pairs_hook=join)
    except FileNotFoundError as error:
        raise InteropError("no such file", where=str(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InteropError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise InteropError("expected a table of fields", where=str(path))
    return data
