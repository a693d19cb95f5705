"""A check of the lengths that a GGUF header states, before a library follows them.

A false length makes the library count to it, whatever the size of the file.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, Final

from composable.errors import InteropError
from composable.files.reading import open_file

# Bytes of a value by the number of its type; texts and arrays state their own length.
_SIZES: Final = {
    **{0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1},
    **{10: 8, 11: 8, 12: 8},
}
_TEXT, _ARRAY = 8, 9


def check_lengths(path: Path) -> None:
    """Require that no value of the metadata is longer than the rest of the file.

    Raises:
        InteropError: If one is, or is of an unknown type; `where` is the file.
    """
    size = path.stat().st_size
    with open_file(path) as file:
        if file.read(4) != b"GGUF":
            raise InteropError("not a GGUF file", where=str(path))
        version = file.read(4)
        order = "<" if version[2:] == bytes(2) else ">"
        try:
            _number(file, order + "Q")
            for _ in range(_number(file, order + "Q")):
                _skip(file, _number(file, order + "Q"), size)
                _skip_value(file, _number(file, order + "I"), order, size)
        except (struct.error, ValueError) as error:
            raise InteropError(
                f"not a GGUF file: {error} at byte {file.tell()}", where=str(path)
            ) from error


def _number(file: BinaryIO, kind: str) -> int:
    (value,) = struct.unpack(kind, file.read(struct.calcsize(kind)))
    return int(value)


def _skip(file: BinaryIO, n_bytes: int, size: int) -> None:
    if n_bytes > size - file.tell():
        raise ValueError("a length is beyond the end of the file")
    file.seek(n_bytes, 1)


def _skip_value(file: BinaryIO, kind: int, order: str, size: int) -> None:
    if kind == _ARRAY:
        item, count = _number(file, order + "I"), _number(file, order + "Q")
        if item in _SIZES:
            _skip(file, count * _SIZES[item], size)
        elif item == _TEXT:
            for _ in range(count):
                _skip(file, _number(file, order + "Q"), size)
        else:
            raise ValueError(f"an array of unknown type {item}")
    elif kind == _TEXT:
        _skip(file, _number(file, order + "Q"), size)
    elif kind in _SIZES:
        _skip(file, _SIZES[kind], size)
    else:
        raise ValueError(f"a value of unknown type {kind}")
