"""Deltas of tensor files: what makes a file from another one, in a file that is smaller.

A delta has one section for the header of the new file, and one for each of its tensors in the order
of their bytes:

    magic                         8 bytes
    u64 length, data              the new file's header, compressed
    u8 kind, u16 rank, u64 length, data        one for each tensor

    SAME      the tensor of that name in the base; no data
    RAW       its bytes
    XOR       its bytes, combined with those in the base by exclusive or
    PRODUCT   factors a and b in bfloat16: the tensor is that of the base plus `a b`

Data is compressed by zstd. Elements are split into planes before, so that all first bytes of a
block's elements come first, then all second bytes, and so on: in the numbers of two generations of
an expert, signs and exponents are mostly equal and the last bits are noise.

A delta comes from a registry, so it may be hostile. Nothing in it decides how much memory is
reserved: the size of the new file is known from elsewhere, its header must fill exactly that, and
tensors are made block by block. Whoever applies a delta verifies the digest of the result.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from composable.errors import DeltaError, TensorFileError
from composable.files.atomic import Sink
from composable.files.reading import open_file
from composable.files.safetensors import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    TensorInfo,
    parse_header,
    read_header,
)

if TYPE_CHECKING:
    import numpy as np

MAGIC: Final = b"CXDELTA1"
SAME, RAW, XOR, PRODUCT = range(4)
_LENGTH: Final = struct.Struct("<Q")
_SECTION: Final = struct.Struct("<BHQ")
_BLOCK_BYTES: Final = 1 << 22
_PREFIX_BYTES: Final = 8
# Numbers of a weight hardly compress, so a higher level takes longer and gains little.
_LEVEL: Final = 3
# What a decompressor may keep: zstd writes no more at this level.
_MAX_WINDOW_BYTES: Final = 1 << 23
# The largest number of float64 that a product is summed in at a time.
_SUM_ELEMENTS: Final = 1 << 18

# Tensor name -> factors a and b, rows by rank and rank by columns, in bfloat16.
Factors = Mapping[str, "tuple[np.ndarray, np.ndarray]"]


@dataclass(frozen=True, kw_only=True)
class DeltaSummary:
    """What a delta consists of.

    Args:
        size: Bytes of the delta.
        kinds: How many tensors are of each kind: `same`, `raw`, `xor` and `product`.
    """

    size: int
    kinds: Mapping[str, int]


def write_delta(
    path: Path, base: Path, target: Path, factors: Factors | None = None
) -> DeltaSummary:
    """Write what makes one tensor file from another.

    Of the kinds that give a tensor exactly, the smallest one is taken.

    Args:
        path: Where to write it.
        base: The tensor file that it starts from.
        target: The tensor file that it makes.
        factors: Factors of tensors that may be a product added to those of the base. Factors of
            others, and those whose sum is not the tensor to the bit, are not used.

    Raises:
        TensorFileError: When one of the files is not a tensor file.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from composable.files.safetensors import write_tensors
        >>> home = pathlib.Path(tempfile.mkdtemp())
        >>> w_in_DF = np.linspace(1, 2, 4096, dtype=np.float32).reshape(64, 64)
        >>> write_tensors(home / "old", {"w_in": w_in_DF})
        >>> write_tensors(home / "new", {"w_in": w_in_DF + 1e-4})
        >>> write_delta(home / "delta", home / "old", home / "new").kinds["xor"]
        1
        >>> new = (home / "new").read_bytes()
        >>> b"".join(apply_delta(home / "delta", home / "old", len(new))) == new
        True
    """
    before, after = read_header(base), read_header(target)
    kinds = dict.fromkeys(("same", "raw", "xor", "product"), 0)
    with Sink(path) as sink, open_file(base) as old, open_file(target) as new:
        start = min((info.start for info in after.values()), default=_size_of(new))
        header = _compress([new.read(start)])
        sink.write(MAGIC + _LENGTH.pack(len(header)) + header)
        for name, info in after.items():
            own = before.get(name)
            is_alike = own is not None and (own.dtype, own.shape) == (info.dtype, info.shape)
            pair = (factors or {}).get(name) if is_alike else None
            kind, rank, data = _encode(old, own if is_alike else None, new, info, pair)
            sink.write(_SECTION.pack(kind, rank, len(data)) + data)
            kinds[list(kinds)[kind]] += 1
    return DeltaSummary(size=sink.size, kinds=kinds)


def apply_delta(delta: Path, base: Path, size: int) -> Iterator[bytes]:
    """Yield the bytes of the file that a delta makes; the caller verifies their digest.

    Args:
        delta: The delta.
        base: The file that it starts from.
        size: The size of the file that it makes, in bytes, known from elsewhere.

    Raises:
        DeltaError: When it is not a delta, does not fit the base, or makes a file of another size.
    """
    where = str(delta)
    try:
        with open_file(delta) as source, open_file(base) as old:
            header = _read_start(source, size, where)
            yield header
            before = read_header(base)
            for name, info in parse_header(header, size, delta).items():
                kind, rank, length = _SECTION.unpack(_read_exactly(source, _SECTION.size, where))
                section = _Section(source, length, where)
                own = before.get(name)
                if kind != RAW and (
                    own is None or (own.dtype, own.shape) != (info.dtype, info.shape)
                ):
                    raise DeltaError(
                        f"changes tensor {name!r}, which the base does not have so",
                        where=where,
                        hint="it was made for another file",
                    )
                yield from _decode(kind, rank, section, info, old, own)
                section.finish()
            if source.read(1):
                raise DeltaError("has bytes after its last tensor", where=where)
    except FileNotFoundError as error:
        raise DeltaError("is gone, or its base is", where=where) from error
    except TensorFileError as error:
        raise DeltaError(
            f"does not fit: {error.message}", where=where, hint="it was made for another file"
        ) from error


def find_products(delta: Path, size: int) -> Factors:
    """Return the factors that a delta has, by name of the tensor.

    Args:
        delta: The delta.
        size: The size of the file that it makes, in bytes.

    Raises:
        DeltaError: When it is not a delta.

    Example:
        >>> import pathlib, tempfile
        >>> import ml_dtypes
        >>> import numpy as np
        >>> from composable.files.safetensors import write_tensors
        >>> home = pathlib.Path(tempfile.mkdtemp())
        >>> old_DF = np.zeros((8, 8), np.float32)
        >>> factors = np.ones((8, 1), ml_dtypes.bfloat16), np.ones((1, 8), ml_dtypes.bfloat16)
        >>> write_tensors(home / "old", {"w": old_DF})
        >>> write_tensors(home / "new", {"w": add_product(old_DF, *factors)})
        >>> _ = write_delta(home / "delta", home / "old", home / "new", {"w": factors})
        >>> find_products(home / "delta", (home / "new").stat().st_size)["w"][0].shape
        (8, 1)
    """
    where = str(delta)
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with open_file(delta) as source:
        header = _read_start(source, size, where)
        for name, info in parse_header(header, size, delta).items():
            kind, rank, length = _SECTION.unpack(_read_exactly(source, _SECTION.size, where))
            if kind == PRODUCT:
                factors[name] = _read_factors(_Section(source, length, where), rank, info)
            else:
                source.seek(length, os.SEEK_CUR)
    return factors


def add_product(base_DF: np.ndarray, a_DR: np.ndarray, b_RF: np.ndarray) -> np.ndarray:
    """Return a matrix plus a product of two factors, with the same bits on every machine.

    Every element is summed in float64 in one order: that of the base, then the products of rank 0,
    1 and so on. A product of two numbers of at most 24 bits is exact in float64, so each sum is
    rounded once, as IEEE 754 prescribes; no library for linear algebra, which may sum in another
    order or fuse operations, is involved. The last sum is rounded to float32, and then to bfloat16
    if the base is that; halves are rounded to even.

    Args:
        base_DF: Matrix, float32 or bfloat16.
        a_DR: Left factor, bfloat16 or float32.
        b_RF: Right factor, bfloat16 or float32.

    Returns:
        The sum, of the shape and type of the base.

    Example:
        >>> import numpy as np
        >>> a_DR, b_RF = np.ones((2, 1), np.float32), np.full((1, 3), 0.5, np.float32)
        >>> add_product(np.ones((2, 3), np.float32), a_DR, b_RF)[0].tolist()
        [1.5, 1.5, 1.5]
    """
    import numpy as np

    a_DR, b_RF = a_DR.astype(np.float64), b_RF.astype(np.float64)
    sum_DF = np.empty_like(base_DF)
    n_rows = max(1, _SUM_ELEMENTS // max(1, base_DF.shape[1]))
    with np.errstate(all="ignore"):  # readers refuse numbers that are not finite
        for start in range(0, len(base_DF), n_rows):
            rows = slice(start, start + n_rows)
            total_DF = base_DF[rows].astype(np.float64)
            for rank in range(a_DR.shape[1]):
                total_DF += a_DR[rows, rank, None] * b_RF[rank]
            sum_DF[rows] = total_DF.astype(np.float32)
    return sum_DF


def _encode(
    old: BinaryIO,
    own: TensorInfo | None,
    new: BinaryIO,
    info: TensorInfo,
    pair: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[int, int, bytes]:
    """Return the smallest kind that gives a tensor, its rank, and its data."""
    width = ITEM_BYTES[info.dtype]
    if own is None:
        return RAW, 0, _compress(_split(block, width) for block in _read_blocks(new, info))
    pairs = zip(_read_blocks(old, own), _read_blocks(new, info), strict=True)
    if all(before == after for before, after in pairs):
        return SAME, 0, b""
    if pair is not None and _fits(pair, info):
        rank = pair[0].shape[1]
        made = b"".join(_add_factors(*pair, old, own))
        if made == b"".join(_read_blocks(new, info)):
            data = _compress(_split(factor.tobytes(), 2) for factor in pair)
            return PRODUCT, rank, data
    raw = _compress(_split(block, width) for block in _read_blocks(new, info))
    pairs = zip(_read_blocks(old, own), _read_blocks(new, info), strict=True)
    xor = _compress(_split(_combine(before, after), width) for before, after in pairs)
    return (XOR, 0, xor) if len(xor) < len(raw) else (RAW, 0, raw)


def _fits(pair: tuple[np.ndarray, np.ndarray], info: TensorInfo) -> bool:
    """Return whether factors are of the shapes and the type that a delta can hold."""
    (a_DR, b_RF), ranks = pair, {pair[0].shape[-1:], pair[1].shape[:1]}
    is_matrix = a_DR.ndim == b_RF.ndim == 2 and (a_DR.shape[0], b_RF.shape[1]) == info.shape
    is_known = info.dtype in ("F32", "BF16") and {str(f.dtype) for f in pair} == {"bfloat16"}
    return is_matrix and is_known and len(ranks) == 1 and 1 <= a_DR.shape[1] <= min(info.shape)


def _decode(
    kind: int, rank: int, section: _Section, info: TensorInfo, old: BinaryIO, own: TensorInfo | None
) -> Iterator[bytes]:
    """Yield the bytes of a tensor."""
    width = ITEM_BYTES[info.dtype]
    if kind == SAME:
        assert own is not None
        yield from _read_blocks(old, own)
    elif kind == RAW:
        for length in _block_lengths(info):
            yield _join(section.read(length), width)
    elif kind == XOR:
        assert own is not None
        for block in _read_blocks(old, own):
            yield _combine(block, _join(section.read(len(block)), width))
    elif kind == PRODUCT:
        assert own is not None
        yield from _add_factors(*_read_factors(section, rank, info), old, own)
    else:
        raise DeltaError(
            f"has a section of kind {kind}, expected 0 to {PRODUCT}",
            where=section.where,
            hint="a newer version of composable may have written it: install that",
        )


def _read_factors(section: _Section, rank: int, info: TensorInfo) -> tuple[np.ndarray, np.ndarray]:
    """Read the factors of a tensor; they are never larger than the tensor."""
    import ml_dtypes
    import numpy as np

    if len(info.shape) != 2 or info.dtype not in ("F32", "BF16"):
        raise DeltaError("has factors for what is not a matrix of floats", where=section.where)
    n_rows, n_columns = info.shape
    if not 1 <= rank <= min(n_rows, n_columns):
        raise DeltaError(
            f"has factors of rank {rank} for a matrix of {n_rows} by {n_columns}",
            where=section.where,
        )
    flat = [
        np.frombuffer(_join(section.read(2 * n * rank), 2), ml_dtypes.bfloat16)
        for n in (n_rows, n_columns)
    ]
    return flat[0].reshape(n_rows, rank), flat[1].reshape(rank, n_columns)


def _add_factors(
    a_DR: np.ndarray, b_RF: np.ndarray, old: BinaryIO, own: TensorInfo
) -> Iterator[bytes]:
    """Yield the bytes of a tensor of the base plus a product."""
    import ml_dtypes
    import numpy as np

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if own.dtype == "BF16" else "<f4")
    n_columns = own.shape[1]
    n_rows = max(1, _BLOCK_BYTES // max(1, n_columns * dtype.itemsize))
    for start in range(0, own.shape[0], n_rows):
        stop = min(own.shape[0], start + n_rows)
        old.seek(own.start + start * n_columns * dtype.itemsize)
        data = old.read((stop - start) * n_columns * dtype.itemsize)
        base_DF = np.frombuffer(data, dtype).reshape(-1, n_columns)
        yield add_product(base_DF, a_DR[start:stop], b_RF).tobytes()


class _Section:
    """The compressed data of one tensor, decompressed as it is read.

    Args:
        source: The delta, at the start of the section.
        length: Bytes of the section.
        where: The delta, for errors.
    """

    def __init__(self, source: BinaryIO, length: int, where: str) -> None:
        zstandard = _load_zstandard()
        if length > _size_of(source) - source.tell():
            raise DeltaError("is truncated", where=where)
        self.where = where
        self._source = source
        self._left = length
        self._error = zstandard.ZstdError
        self._reader: Any = zstandard.ZstdDecompressor(
            max_window_size=_MAX_WINDOW_BYTES
        ).stream_reader(cast(Any, _Limited(self)), closefd=False)

    def read(self, n_bytes: int) -> bytes:
        """Return the next bytes.

        Raises:
            DeltaError: When there are fewer, or they are damaged.
        """
        data = bytearray()
        try:
            while len(data) < n_bytes and (piece := self._reader.read(n_bytes - len(data))):
                data += piece
        except self._error as error:
            raise DeltaError(f"is damaged: {error}", where=self.where) from error
        if len(data) < n_bytes:
            raise DeltaError("has less data than its tensors need", where=self.where)
        return bytes(data)

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            DeltaError: When something is.
        """
        try:
            is_more = self._reader.read(1)
        except self._error as error:
            raise DeltaError(f"is damaged: {error}", where=self.where) from error
        if is_more or self._left:
            raise DeltaError("has more data than its tensors need", where=self.where)

    def take(self, n_bytes: int) -> bytes:
        """Return the next compressed bytes, at most so many."""
        data = self._source.read(min(n_bytes, self._left))
        self._left -= len(data)
        return data


class _Limited:
    """The compressed bytes of a section, as the file that the decompressor reads."""

    def __init__(self, section: _Section) -> None:
        self._section = section

    def read(self, n_bytes: int) -> bytes:
        return self._section.take(n_bytes)


def _read_start(source: BinaryIO, size: int, where: str) -> bytes:
    """Read the header of the new file, with the length in front of it."""
    if source.read(len(MAGIC)) != MAGIC:
        raise DeltaError("is not a delta", where=where)
    (length,) = _LENGTH.unpack(_read_exactly(source, _LENGTH.size, where))
    section = _Section(source, length, where)
    prefix = section.read(_PREFIX_BYTES)
    n_bytes = int.from_bytes(prefix, "little")
    if n_bytes > min(MAX_HEADER_BYTES, size):
        raise DeltaError(f"makes a header of {n_bytes:,} bytes", where=where)
    header = prefix + section.read(n_bytes)
    section.finish()
    return header


def _read_exactly(source: BinaryIO, n_bytes: int, where: str) -> bytes:
    data = source.read(n_bytes)
    if len(data) != n_bytes:
        raise DeltaError("is truncated", where=where)
    return data


def _compress(pieces: Any) -> bytes:
    compressor = _load_zstandard().ZstdCompressor(level=_LEVEL).compressobj()
    return b"".join([*(compressor.compress(piece) for piece in pieces), compressor.flush()])


def _load_zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:  # an environment of before 0.3, whose sources were updated
        raise DeltaError(
            "deltas need the package zstandard",
            hint="install the dependencies again: `pip install .`, or `make setup` in a checkout",
        ) from error
    return zstandard


def _block_lengths(info: TensorInfo) -> Iterator[int]:
    """Yield the bytes of each block of a tensor."""
    left = info.stop - info.start
    while left > 0:
        yield min(left, _BLOCK_BYTES)
        left -= _BLOCK_BYTES


def _read_blocks(file: BinaryIO, info: TensorInfo) -> Iterator[bytes]:
    """Yield the blocks of a tensor; two may be read from one file in turns."""
    position = info.start
    for length in _block_lengths(info):
        file.seek(position)
        yield file.read(length)
        position += length


def _split(block: bytes, width: int) -> bytes:
    """Return the bytes of elements in planes: all first bytes, then all second ones."""
    import numpy as np

    return np.frombuffer(block, np.uint8).reshape(-1, width).T.tobytes()


def _join(planes: bytes, width: int) -> bytes:
    """Return the bytes of elements that `_split` has split."""
    import numpy as np

    return np.frombuffer(planes, np.uint8).reshape(width, -1).T.tobytes()


def _combine(left: bytes, right: bytes) -> bytes:
    """Return two blocks of one size, combined by exclusive or."""
    import numpy as np

    return (np.frombuffer(left, np.uint8) ^ np.frombuffer(right, np.uint8)).tobytes()


def _size_of(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size
