"""Deltas of tensor files: exact, the same everywhere, and harmless whoever wrote them."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composable.errors import DeltaError, IntegrityError
from composable.files.atomic import Sink
from composable.files.delta import (
    MAGIC,
    PRODUCT,
    RAW,
    SAME,
    XOR,
    add_product,
    apply_delta,
    write_delta,
)
from composable.files.safetensors import write_tensors

DTYPES = ("float32", "bfloat16", "float16", "int8", "int64")
SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple)
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make_array(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 20).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


tensor_files = st.dictionaries(
    st.sampled_from(["a", "b.c", "w_in", "w_out", "x1"]),
    st.tuples(SHAPES, st.sampled_from(DTYPES), st.integers(0, 2)),
    max_size=5,
)


def write(path: Path, tensors: dict[str, tuple[tuple[int, ...], str, int]]) -> Path:
    write_tensors(path, {name: make_array(*spec) for name, spec in tensors.items()})
    return path


def rebuild(delta: Path, base: Path, target: Path) -> bytes:
    """Make a file from a delta as the store does, verified."""
    data = target.read_bytes()
    made = target.with_name("made")
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with Sink(made, digest=digest, size=len(data)) as sink:
        for piece in apply_delta(delta, base, len(data)):
            sink.write(piece)
    return made.read_bytes()


@QUICK
@given(old=tensor_files, new=tensor_files)
def test_any_file_is_made_from_any_other(tmp_path: Path, old: dict, new: dict) -> None:
    base, target = write(tmp_path / "old", old), write(tmp_path / "new", new)
    summary = write_delta(tmp_path / "delta", base, target)
    assert rebuild(tmp_path / "delta", base, target) == target.read_bytes()
    assert summary.size == (tmp_path / "delta").stat().st_size
    assert sum(summary.kinds.values()) == len(new)


@QUICK
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.sampled_from(DTYPES[:2]),
    st.integers(0, 9),
)  # fmt: skip
def test_an_update_by_factors_is_exact(
    tmp_path: Path, rows: int, columns: int, rank: int, dtype: str, seed: int
) -> None:
    rank = min(rank, rows, columns)
    base_DF = make_array((rows, columns), dtype, seed)
    a_DR = make_array((rows, rank), "bfloat16", seed + 1)
    b_RF = make_array((rank, columns), "bfloat16", seed + 2)
    write_tensors(tmp_path / "old", {"w": base_DF})
    write_tensors(tmp_path / "new", {"w": add_product(base_DF, a_DR, b_RF)})
    summary = write_delta(
        tmp_path / "delta", tmp_path / "old", tmp_path / "new", {"w": (a_DR, b_RF)}
    )
    assert summary.kinds["product"] == 1
    assert rebuild(tmp_path / "delta", tmp_path / "old", tmp_path / "new")


def test_a_sum_is_exact_and_rounded_once() -> None:
    """The reference is Python's exact rational arithmetic, one element at a time."""
    from fractions import Fraction

    rng = np.random.default_rng(3)
    base_DF = rng.normal(size=(3, 4)).astype(np.float32)
    a_DR, b_RF = (rng.normal(size=s).astype(ml_dtypes.bfloat16) for s in ((3, 2), (2, 4)))
    sum_DF = add_product(base_DF, a_DR, b_RF)
    for i in range(3):
        for j in range(4):
            total = Fraction(float(base_DF[i, j]))
            for r in range(2):
                # Each sum of two float64 is rounded to float64, which `float` does as well.
                total = Fraction(
                    float(total + Fraction(float(a_DR[i, r])) * Fraction(float(b_RF[r, j])))
                )
            assert sum_DF[i, j] == np.float32(float(total))


GOLDEN = "13b359a275db074c"
SUM = """
import hashlib, ml_dtypes, numpy as np
from composable.files.delta import add_product
def numbers(n, step):
    return ((np.arange(n, dtype=np.int64) * step % 2003 - 1001) / 257).astype(np.float32)
digest = hashlib.sha256()
for dtype in (np.float32, ml_dtypes.bfloat16):
    w = numbers(700 * 900, 7919).reshape(700, 900).astype(dtype)
    a = numbers(700 * 8, 104729).reshape(700, 8).astype(ml_dtypes.bfloat16)
    b = numbers(8 * 900, 1299709).reshape(8, 900).astype(ml_dtypes.bfloat16)
    digest.update(add_product(w, a, b).tobytes())
print(digest.hexdigest()[:16])
"""


@pytest.mark.parametrize("threads", ["1", "7"])
def test_a_sum_has_the_same_bits_everywhere(threads: str) -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    # Without the widest instructions NumPy would use, its loops run in another order of lanes.
    features = {} if threads == "1" else {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F"}
    env = {**os.environ, **dict.fromkeys(names, threads), **features}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SUM],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == GOLDEN


def test_factors_that_do_not_give_the_tensor_are_not_used(tmp_path: Path) -> None:
    base_DF = make_array((8, 8), "float32", 0)
    pair = make_array((8, 2), "bfloat16", 1), make_array((2, 8), "bfloat16", 2)
    write_tensors(tmp_path / "old", {"w": base_DF})
    target_DF = add_product(base_DF, *pair)
    target_DF[0, 0] = np.nextafter(target_DF[0, 0], np.float32(np.inf))
    write_tensors(tmp_path / "new", {"w": target_DF})
    other = make_array((8, 9), "bfloat16", 1), make_array((9, 9), "bfloat16", 2)
    for factors in (pair, other):
        summary = write_delta(tmp_path / "d", tmp_path / "old", tmp_path / "new", {"w": factors})
        assert summary.kinds["product"] == 0
        assert rebuild(tmp_path / "d", tmp_path / "old", tmp_path / "new")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Return two generations of a file."""
    w_DF = make_array((30, 40), "float32", 0)
    write_tensors(tmp_path / "old", {"a": w_DF, "b": w_DF + 1, "c": w_DF})
    write_tensors(tmp_path / "new", {"a": w_DF, "b": w_DF * 1.001, "d": w_DF})
    return tmp_path / "old", tmp_path / "new"


@QUICK
@given(data=st.data())
def test_a_damaged_delta_makes_nothing_else(
    tmp_path: Path, pair: tuple[Path, Path], data: st.DataObject
) -> None:
    write_delta(tmp_path / "delta", *pair)
    bad = bytearray((tmp_path / "delta").read_bytes())
    at = data.draw(st.integers(0, len(bad) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert", "drop"])):
        case "flip":
            bad[at] ^= data.draw(st.integers(1, 255))
        case "cut":
            del bad[at:]
        case "insert":
            bad[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        case "drop":
            del bad[at]
    (tmp_path / "bad").write_bytes(bad)
    try:
        assert rebuild(tmp_path / "bad", *pair) == pair[1].read_bytes()
    except IntegrityError as error:
        assert len(str(error)) < 600  # nothing else may be raised, and nothing is left
        assert not (tmp_path / "made").exists() or (tmp_path / "made").unlink() is None
    assert not list(tmp_path.glob(".tmp-*"))


def section(kind: int, rank: int, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<BHQ", kind, rank, len(data) if length is None else length) + data


def zipped(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def wide(data: bytes) -> bytes:
    """Return data in a frame that asks its reader to keep 128 MiB."""
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


HEADERS = {
    "huge": (1 << 60).to_bytes(8, "little") + b"{}",
    "not json": (4).to_bytes(8, "little") + b"{{{{",
}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ([section(9, 0, b"")], "section of kind 9"),
        ([section(SAME, 0, b"", 1 << 62)], "is truncated"),
        ([section(RAW, 0, zipped(bytes(1 << 26)))] * 3, "more data than"),
        ([section(RAW, 0, zipped(bytes(4)))] * 3, "less data than"),
        ([section(RAW, 0, b"not zstd")] * 3, "is damaged"),
        ([section(RAW, 0, wide(bytes(4800)))] * 3, "is damaged"),
        ([section(PRODUCT, 65535, zipped(bytes(10)))] * 3, "rank 65535"),
        ([section(PRODUCT, 0, zipped(bytes(10)))] * 3, "rank 0"),
        ([section(SAME, 0, b"")] * 3, "which the base does not have so"),
        ([section(RAW, 0, zipped(bytes(4800)))] * 4, "after its last tensor"),
        ([], "is truncated"),
    ],
)  # fmt: skip
def test_what_a_hostile_delta_is_refused_for(
    tmp_path: Path, pair: tuple[Path, Path], sections: list[bytes], expected: str
) -> None:
    target = pair[1].read_bytes()
    header = zipped(target[: 8 + int.from_bytes(target[:8], "little")])
    start = MAGIC + struct.pack("<Q", len(header)) + header
    (tmp_path / "bad").write_bytes(start + b"".join(sections))
    with pytest.raises(DeltaError, match=expected):
        list(apply_delta(tmp_path / "bad", pair[0], len(target)))


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused(tmp_path: Path, pair: tuple[Path, Path], kind: str) -> None:
    header = zipped(HEADERS[kind])
    (tmp_path / "bad").write_bytes(MAGIC + struct.pack("<Q", len(header)) + header)
    with pytest.raises(DeltaError):
        list(apply_delta(tmp_path / "bad", pair[0], 1000))


def test_the_size_is_that_of_the_manifest(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    write_delta(tmp_path / "delta", *pair)
    with pytest.raises(DeltaError, match="does not fit"):
        list(apply_delta(tmp_path / "delta", pair[0], pair[1].stat().st_size + 4))
    (tmp_path / "none").write_bytes(b"")
    with pytest.raises(DeltaError, match="is not a delta"):
        list(apply_delta(tmp_path / "none", pair[0], 10))
    with pytest.raises(DeltaError, match="is gone"):
        list(apply_delta(tmp_path / "delta", tmp_path / "gone", 10))


def test_exclusive_or_is_for_what_hardly_changed(tmp_path: Path) -> None:
    """Half of the bits of these numbers are equal, and the bytes without them are sent."""
    w_DF = make_array((64, 64), "float32", 0)
    write_tensors(tmp_path / "old", {"w": w_DF})
    write_tensors(tmp_path / "new", {"w": w_DF * np.float32(1 + 2**-14)})
    summary = write_delta(tmp_path / "delta", tmp_path / "old", tmp_path / "new")
    assert summary.kinds["xor"] == 1
    assert summary.size < 0.7 * w_DF.nbytes
    assert list(summary.kinds).index("xor") == XOR


def test_without_the_library_the_error_says_what_to_do(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DeltaError, match="need the package zstandard"):
        write_delta(tmp_path / "delta", *pair)
