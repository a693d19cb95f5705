"""Compressed responses: decompressed in bounded pieces, and truncated ones are noticed.

HTTP libraries return what could be decompressed so far when a stream ends before its trailer, so
the end is checked here.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from composable.errors import UnreachableError
from composable.files.atomic import CHUNK

# The two formats by their headers: zlib, which HTTP calls deflate, and gzip.
_ANY_FORMAT: Final = 32 + zlib.MAX_WBITS


def decompress(pieces: Iterable[bytes], where: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of a gzip or zlib stream.

    Args:
        pieces: The compressed bytes; several streams may follow one another.
        where: What they are, for errors.

    Yields:
        Pieces of at most `CHUNK` bytes.

    Raises:
        UnreachableError: When the stream is damaged, or ends before its trailer.

    Example:
        >>> import gzip
        >>> b"".join(decompress([gzip.compress(b"text")], "x"))
        b'text'
    """
    stream = zlib.decompressobj(_ANY_FORMAT)
    try:
        for piece in pieces:
            data = piece
            while data:
                if stream.eof:
                    stream = zlib.decompressobj(_ANY_FORMAT)
                if found := stream.decompress(data, CHUNK):
                    yield found
                data = stream.unused_data if stream.eof else stream.unconsumed_tail
        # What the output limit held back.
        while not stream.eof and (found := stream.decompress(b"", CHUNK)):
            yield found
    except zlib.error as error:
        raise UnreachableError(
            f"the compressed response is damaged: {error}", where=where
        ) from error
    if not stream.eof:
        raise UnreachableError("the compressed response is truncated", where=where)
