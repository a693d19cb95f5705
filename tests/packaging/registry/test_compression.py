"""Compressed responses: every cut is noticed, and the output comes in bounded pieces."""

from __future__ import annotations

import gzip
import os
import zlib

import pytest

from composable.errors import UnreachableError
from composable.files.atomic import CHUNK
from composable.packaging.registry.compression import decompress

TEXT = b"".join(b"a line %d\n" % number for number in range(200))


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(
    "data", [gzip.compress(TEXT), zlib.compress(TEXT), gzip.compress(TEXT[:90]) * 2], ids=len
)
def test_streams_are_decompressed(data: bytes, step: int) -> None:
    pieces = [data[start : start + step] for start in range(0, len(data), step)]
    expected = TEXT if len(b"".join(decompress(pieces, "x"))) > 200 else TEXT[:90] * 2
    assert b"".join(decompress(pieces, "x")) == expected


@pytest.mark.parametrize("flush", [zlib.Z_SYNC_FLUSH, zlib.Z_FINISH])
def test_every_cut_is_noticed(flush: int) -> None:
    """A server that flushes after every line can be cut where a line ends."""
    stream = zlib.compressobj(wbits=31)
    data = b""
    for line in TEXT.splitlines(keepends=True)[:20]:
        data += stream.compress(line) + (stream.flush(flush) if flush != zlib.Z_FINISH else b"")
    data += stream.flush()
    for size in range(len(data)):
        with pytest.raises(UnreachableError, match="truncated"):
            list(decompress([data[:size]], "x"))


def test_other_bytes_are_damage() -> None:
    data = gzip.compress(TEXT)
    for damaged in (b"text", data + b"text", data[:-6] + b"\0" + data[-5:]):
        with pytest.raises(UnreachableError, match="damaged"):
            list(decompress([damaged], "x"))


def test_the_output_is_bounded_by_the_piece() -> None:
    data = gzip.compress(bytes(5 * CHUNK) + os.urandom(99))
    sizes = [len(piece) for piece in decompress([data], "x")]
    assert sum(sizes) == 5 * CHUNK + 99
    assert max(sizes) <= CHUNK
