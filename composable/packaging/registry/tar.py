"""Registries in one tar file, as `composable export` writes them. Read only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from composable.errors import MissingFileError, RegistryError
from composable.files import atomic
from composable.files.reading import open_file
from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES, Document

_BLOCK: Final = 512
# The longest header in front of a member, which holds its long name.
_MAX_EXTENSION_BYTES: Final = 1 << 20
_OCTAL: Final = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_RECORD: Final = re.compile(rb"([0-9]{1,7}) ([^=]+)=")


class TarFile:
    """An uncompressed tar file. Its files are read in place; nothing is unpacked.

    Args:
        path: The tar file.

    Raises:
        RegistryError: When it is not an uncompressed tar file.
    """

    is_remote: Final = False

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open_file(path) as file, atomic.explained(path, "read"):
                self._members = dict(_list_members(file, os.fstat(file.fileno()).st_size))
        except (FileNotFoundError, ValueError) as error:
            raise RegistryError(f"is not an export: {error}", where=str(path)) from error

    @property
    def location(self) -> str:
        """The file."""
        return str(self._path)

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document; `known` itself if it is unchanged; None if it does not exist."""
        if path not in self._members:
            return None
        if self._members[path][1] > MAX_DOCUMENT_BYTES:
            raise RegistryError("is larger than 64 MiB", where=f"{self._path}: {path}")
        data = b"".join(self.stream(path))
        return known if known is not None and known.data == data else Document(data, None)

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on."""
        if path not in self._members:
            raise MissingFileError("has no such file", where=f"{self._path}: {path}")
        offset, size = self._members[path]
        with open_file(self._path) as file, atomic.explained(self._path, "read"):
            file.seek(offset + start)
            left = size - start
            while left > 0:
                data = file.read(min(atomic.CHUNK, left))
                if not data:
                    raise RegistryError("was cut short while being read", where=str(self._path))
                left -= len(data)
                yield data

    def files_under(self, folder: str) -> list[str]:
        """Return the paths of all files in a folder and its folders, sorted."""
        return sorted(path for path in self._members if path.startswith(f"{folder}/"))


def _list_members(file: BinaryIO, file_bytes: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name, offset and size of each regular file.

    The standard library's reader believes every size: it reserves that much memory, or never ends.

    References:
        POSIX.1-2017, pax: ustar and pax interchange formats; the GNU extension for long names.
    """
    offset = 0
    extension: dict[str, str] = {}
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if header == bytes(_BLOCK):
            return
        if len(header) < _BLOCK:
            raise ValueError("it was cut short, or is no tar file")
        blanked = header[:148] + b" " * 8 + header[156:]
        if _parse_number(header[148:156]) != sum(blanked):
            raise ValueError(f"the header at byte {offset:,} does not match its checksum")
        kind = header[156:157]
        is_file = kind in (b"0", b"\0")
        text = extension.get("size") if is_file else None
        size = _parse_number(header[124:136] if text is None else text.encode())
        start = offset + _BLOCK
        if size > file_bytes - start:
            raise ValueError(f"the member at byte {offset:,} does not lie within the file")
        if kind in (b"x", b"L"):
            if size > _MAX_EXTENSION_BYTES:
                raise ValueError(f"the name at byte {offset:,} is too long")
            data = file.read(size)
            names = {"path": data.rstrip(b"\0").decode()} if kind == b"L" else _parse_pax(data)
            extension = {**extension, **names}
        else:
            if is_file:
                prefix, name = (_parse_text(header[at]) for at in (slice(345, 500), slice(0, 100)))
                yield (
                    extension.get("path") or (f"{prefix}/{name}" if prefix else name),
                    (start, size),
                )
            extension = {}
        offset = start + -(-size // _BLOCK) * _BLOCK


def _parse_number(field: bytes) -> int:
    """Parse a number of a header: octal digits, or binary if the first bit is set."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    found = _OCTAL.fullmatch(field)
    if found is None:
        raise ValueError(f"{field!r} is not a number")
    return int(found[1] or b"0", 8)


def _parse_text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode()


def _parse_pax(data: bytes) -> dict[str, str]:
    """Parse the records of a pax header: `LENGTH KEY=VALUE` and a newline each."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(data):
        found = _RECORD.match(data, at)
        stop = at + int(found[1]) if found is not None else 0
        if found is None or not found.end() < stop <= len(data):
            raise ValueError("a record of a pax header is malformed")
        fields[found[2].decode()] = data[found.end() : stop - 1].decode()
        at = stop
    if "size" in fields:  # decimal there, octal in a header
        if not re.fullmatch("[0-9]{1,18}", fields["size"]):
            raise ValueError("a size in a pax header is malformed")
        fields["size"] = f"{int(fields['size']):o}"
    return fields
