"""Tensor files in the safetensors format: checked before loading, written deterministically.

The format is a length, a JSON header and raw little-endian data. The reference readers accept
duplicate names, names with `../`, NaN and headers of 100 MB; this file does not. It parses the
header itself, compares it with what the interface expects, and only then reads data.

References:
    The safetensors format, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn

from composable.errors import TensorFileError, did_you_mean
from composable.files.atomic import Sink
from composable.files.reading import open_file
from composable.interface.contract import TensorSpec

if TYPE_CHECKING:
    import numpy as np

MAX_HEADER_BYTES: Final = 1 << 20
MAX_TENSORS: Final = 4096
MAX_RANK: Final = 8
METADATA: Final = "__metadata__"
# Bytes per element, and the exponent bits that are all set in NaN and infinity.
ITEM_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "I32": 4, "I64": 8, "U8": 1}
_EXPONENTS: Final = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000}
_NUMPY_NAMES: Final = {
    "F16": "<f2",
    "F32": "<f4",
    "I8": "|i1",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "|u1",
}
# Names of tensors in packages, and in foreign files, where capitals are allowed.
NAME: Final = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
ANY_CASE_NAME: Final = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_BLOCK_BYTES: Final = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Type, shape and position of one tensor in its file.

    Args:
        dtype: Element type, as the format names it.
        shape: Sizes of the dimensions.
        start: First byte, counted from the start of the file.
        stop: The byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path, name: re.Pattern[str] = NAME) -> dict[str, TensorInfo]:
    """Read and check the header of a tensor file, without its data.

    Args:
        path: The file.
        name: Pattern of valid tensor names.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        TensorFileError: For an invalid header, or a file whose size does not match it.
    """
    with _open(path) as file:
        return _read_header(file, path, name)


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a tensor file, without its data; empty if it has none.

    Args:
        path: The file.

    Raises:
        TensorFileError: As `read_header`.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "scout.safetensors"
        >>> write_tensors(path, {"b_in": np.zeros(3, np.float32)}, {"format": "composable"})
        >>> read_metadata(path)
        {'format': 'composable'}
    """
    with _open(path) as file:
        return _read_parts(file, path, NAME)[0]


def check_tensors(path: Path, expected: Mapping[str, TensorSpec]) -> None:
    """Check that a file holds exactly the expected tensors, all finite, in bounded memory.

    Args:
        path: The file.
        expected: Shape and dtypes by name, as `composable.interface` derives them.

    Raises:
        TensorFileError: With the file, the tensor, what was expected and what was found.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "body.safetensors"
        >>> write_tensors(path, {"w_in": np.ones((2, 3), np.float32)})
        >>> check_tensors(path, {"w_in": TensorSpec(shape=(2, 3))})
    """
    with _open(path) as file:
        header = _read_header(file, path)
        _check_specs(header, expected, path)
        for name, info in header.items():
            file.seek(info.start)
            done = 0
            for block in _blocks(file, info.stop - info.start, path):
                _refuse_non_finite(block, info, name, path, done)
                done += len(block) // ITEM_BYTES[info.dtype]


def read_tensors(path: Path, expected: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    """Check a tensor file and load it.

    The arrays returned are the ones checked: the file is opened once and read once.

    Args:
        path: The file.
        expected: Shape and dtypes by name.

    Returns:
        Arrays by name, in the order of `expected`; BF16 as `ml_dtypes.bfloat16`.

    Raises:
        TensorFileError: As `check_tensors`.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "body.safetensors"
        >>> write_tensors(path, {"b_in": np.arange(3, dtype=np.float32)})
        >>> read_tensors(path, {"b_in": TensorSpec(shape=(3,))})["b_in"].tolist()
        [0.0, 1.0, 2.0]
    """
    arrays: dict[str, np.ndarray] = {}
    with _open(path) as file:
        header = _read_header(file, path)
        _check_specs(header, expected, path)
        for name in expected:
            arrays[name] = _read_array(file, header[name], name, path)
    return arrays


class TensorFile(Mapping[str, "np.ndarray"]):
    """A checked tensor file whose arrays are read on access, one at a time.

    Args:
        path: The file.
        expected: Shape and dtypes by name.
        name: Pattern of valid tensor names.

    Raises:
        TensorFileError: As `check_tensors`; values that are not finite, only on access.
    """

    def __init__(
        self, path: Path, expected: Mapping[str, TensorSpec], name: re.Pattern[str] = NAME
    ) -> None:
        self._path, self._expected = path, expected
        self.header = read_header(path, name)
        _check_specs(self.header, expected, path)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.header[name]
        with _open(self._path) as file:
            return _read_array(file, info, name, self._path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._expected)

    def __len__(self) -> int:
        return len(self._expected)


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays to a tensor file; the same arrays always give the same bytes.

    Args:
        path: The file, replaced atomically.
        tensors: Arrays by name; float32, bfloat16, float16, int8, int32, int64 or uint8.
        metadata: Text by key, stored in the header.

    Raises:
        TensorFileError: For tensors that `read_tensors` would refuse.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "scout.safetensors"
        >>> write_tensors(path, {"b_in": np.zeros(3, np.float32)}, {"format": "composable"})
        >>> read_header(path)["b_in"].shape
        (3,)
    """
    names = {str(_numpy_dtype(dtype)): dtype for dtype in ITEM_BYTES}
    specs: dict[str, TensorSpec] = {}
    for name, array in tensors.items():
        dtype = names.get(str(array.dtype.newbyteorder("=")))
        if dtype is None:
            _refuse(path, f"has dtype {array.dtype}, expected one of {', '.join(names)}", name)
        specs[name] = TensorSpec(shape=array.shape, dtypes=(dtype,))
    stream_tensors(path, specs, tensors.__getitem__, metadata)


def stream_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a tensor file from arrays that are produced one at a time.

    The header is sorted by name. Data is laid out by element width, widest first, then by name, so
    that every tensor is aligned to its element size.

    Args:
        path: The file, replaced atomically.
        specs: Shape and one dtype by name.
        read: Returns the array of a name; called once per name, in file order.
        metadata: Text by key, stored in the header.

    Raises:
        TensorFileError: For tensors that `read_tensors` would refuse, or that do not match specs.
    """
    import numpy as np

    for name in specs:
        if NAME.fullmatch(name) is None:
            _refuse(path, f"{name!r} is not a tensor name (expected {NAME.pattern})")
    infos: dict[str, TensorInfo] = {}
    position = 0
    for name in sorted(specs, key=lambda name: (-ITEM_BYTES[specs[name].dtypes[0]], name)):
        spec = specs[name]
        size = math.prod(spec.shape) * ITEM_BYTES[spec.dtypes[0]]
        infos[name] = TensorInfo(
            dtype=spec.dtypes[0], shape=spec.shape, start=position, stop=position + size
        )
        position += size
    header = _encode_header(infos, metadata or {})
    if len(header) > MAX_HEADER_BYTES or len(infos) > MAX_TENSORS:
        _refuse(path, f"{len(infos):,} tensors do not fit into a header of 1 MiB")
    with Sink(path) as sink:
        sink.write(len(header).to_bytes(8, "little") + header)
        for name, info in infos.items():
            array, dtype = read(name), _numpy_dtype(info.dtype)
            if array.shape != info.shape or array.dtype.newbyteorder("=") != dtype:
                found = f"{array.dtype} of shape {_shape(array.shape)}"
                _refuse(path, f"is {found}, expected {dtype} of {_shape(info.shape)}", name)
            wire = np.ascontiguousarray(array, dtype=dtype)
            block = wire.reshape(-1).view(np.uint8).data
            _refuse_non_finite(block, info, name, path, 0)
            sink.write(block)


def _read_array(file: BinaryIO, info: TensorInfo, name: str, path: Path) -> np.ndarray:
    """Read one tensor; refuse values that are not finite."""
    import numpy as np

    file.seek(info.start)
    data = bytearray(info.stop - info.start)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        _refuse(path, "was truncated while being read", name)
    for start in range(0, len(data), _BLOCK_BYTES):
        block = memoryview(data)[start : start + _BLOCK_BYTES]
        _refuse_non_finite(block, info, name, path, start // ITEM_BYTES[info.dtype])
    return np.frombuffer(data, _numpy_dtype(info.dtype)).reshape(info.shape)


def _open(path: Path) -> io.BufferedReader:
    try:
        return open_file(path)
    except FileNotFoundError as error:
        raise TensorFileError("no such file", where=str(path)) from error


def _refuse(path: Path, message: str, tensor: str | None = None) -> NoReturn:
    """Raise an error that names the file and, if given, the tensor."""
    subject = f"tensor {tensor!r} {message}" if tensor is not None else message
    raise TensorFileError(subject, where=str(path))


def _encode_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for name in sorted(infos):
        info = infos[name]
        table[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.start, info.stop],
        }
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


def _read_header(
    file: BinaryIO, path: Path, pattern: re.Pattern[str] = NAME
) -> dict[str, TensorInfo]:
    return _read_parts(file, path, pattern)[1]


def _read_parts(
    file: BinaryIO, path: Path, pattern: re.Pattern[str]
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Read and check the header: its metadata, and its tensors in the order of their bytes."""
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        _refuse(path, f"is not a tensor file: {file_bytes} bytes are too few for a header")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        _refuse(path, f"header of {header_bytes:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
    text = file.read(header_bytes)
    if len(text) < header_bytes:
        _refuse(path, f"file is truncated: {file_bytes:,} bytes end inside the header")
    return _check_header(text, file_bytes, path, pattern)


def parse_header(data: bytes, file_bytes: int, where: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file from its first bytes, checked as by `read_header`.

    Args:
        data: The length of the header, and the header.
        file_bytes: The size of the whole file, which the tensors must fill.
        where: What the header comes from, for errors.

    Raises:
        TensorFileError: For an invalid header, or tensors that do not fill the file.
    """
    return _check_header(data[8:], file_bytes, where, NAME)[1]


def _check_header(
    text: bytes, file_bytes: int, path: Path, pattern: re.Pattern[str]
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return metadata and tensors of the text of a header."""
    header_bytes = len(text)
    if not text.startswith(b"{"):
        _refuse(path, "is not a tensor file: the header does not start with '{'")
    table = _parse_json(text, path)
    metadata = table.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(path, f"{METADATA} is not a table of text")
    if len(table) > MAX_TENSORS:
        _refuse(path, f"{len(table):,} tensors, expected at most {MAX_TENSORS:,}")
    for name in table:
        if len(name) > 200 or pattern.fullmatch(name) is None:
            _refuse(path, f"{name[:80]!r} is not a tensor name (expected {pattern.pattern})")
    infos = {
        name: _parse_info(name, entry, 8 + header_bytes, path) for name, entry in table.items()
    }
    _check_coverage(infos, 8 + header_bytes, file_bytes, path)
    return metadata, dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            _refuse(path, f"the header contains {twice[:80]!r} twice")
        return table

    def reject_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        table = json.loads(
            text, object_pairs_hook=reject_duplicates, parse_constant=reject_constant
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise TensorFileError(f"the header is not JSON: {reason}", where=str(path)) from error
    assert isinstance(table, dict)  # it starts with a brace
    return table


def _parse_info(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    """Read one entry of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, "needs exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        _refuse(path, f"has dtype {dtype!r}, expected one of {', '.join(ITEM_BYTES)}", name)
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        _refuse(path, f"has shape {str(shape)[:80]}, expected at most {MAX_RANK} sizes", name)
    if not _is_sizes(offsets) or len(offsets) != 2:
        _refuse(path, f"has offsets {str(offsets)[:80]}, expected start and stop", name)
    start, stop = offsets
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if stop - start != size:
        _refuse(path, f"spans {stop - start:,} bytes, but its shape needs {size:,}", name)
    return TensorInfo(
        dtype=dtype, shape=tuple(shape), start=data_start + start, stop=data_start + stop
    )


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_coverage(
    infos: Mapping[str, TensorInfo], data_start: int, file_bytes: int, path: Path
) -> None:
    """Check that the tensors are contiguous and fill the file exactly."""
    position = data_start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            problem = "overlaps the one before" if info.start < position else "leaves a gap before"
            _refuse(path, f"{problem}: starts at byte {info.start:,}, not {position:,}", name)
        position = info.stop
    if position > file_bytes:
        _refuse(path, f"file is truncated: {file_bytes:,} of {position:,} bytes")
    if position < file_bytes:
        _refuse(path, f"{file_bytes - position:,} bytes after the last tensor are unused")


def _check_specs(
    header: Mapping[str, TensorInfo], expected: Mapping[str, TensorSpec], path: Path
) -> None:
    """Check names, shapes and dtypes against what the interface expects."""
    for name in header.keys() - expected.keys():
        hint = did_you_mean(name, expected.keys() - header.keys())
        raise TensorFileError(f"tensor {name!r} is not expected", where=str(path), hint=hint)
    for name, spec in expected.items():
        if name not in header:
            _refuse(path, f"is missing, expected shape {_shape(spec.shape)}", name)
        info = header[name]
        if info.shape != spec.shape:
            _refuse(path, f"has shape {_shape(info.shape)}, expected {_shape(spec.shape)}", name)
        if info.dtype not in spec.dtypes:
            _refuse(path, f"has dtype {info.dtype}, expected {' or '.join(spec.dtypes)}", name)


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _blocks(file: BinaryIO, size: int, path: Path) -> Iterator[bytes]:
    while size:
        wanted = min(size, _BLOCK_BYTES)
        block = file.read(wanted)
        if len(block) != wanted:
            _refuse(path, "file was truncated while being read")
        size -= len(block)
        yield block


def _refuse_non_finite(
    block: bytes | memoryview, info: TensorInfo, name: str, path: Path, done: int
) -> None:
    """Refuse NaN and infinity: all exponent bits set, which is quicker to test on integers.

    Args:
        block: Little-endian elements.
        info: Their tensor.
        name: Its name.
        path: Its file.
        done: Elements of the tensor before this block.
    """
    import numpy as np

    exponent = _EXPONENTS.get(info.dtype)
    if exponent is None:
        return
    bits = np.frombuffer(block, f"<u{ITEM_BYTES[info.dtype]}")
    bad = np.flatnonzero((bits & exponent) == exponent)
    if len(bad) == 0:
        return
    where = _shape(tuple(int(i) for i in np.unravel_index(done + int(bad[0]), info.shape)))
    _refuse(path, f"is not finite at {where} ({len(bad):,} such values in this block)", name)


def _numpy_dtype(dtype: str) -> np.dtype[Any]:
    import numpy as np

    if dtype != "BF16":
        return np.dtype(_NUMPY_NAMES[dtype])
    import ml_dtypes

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16
