"""Tensor files: what is written is read back, and nothing hostile gets through."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composable.errors import TensorFileError
from composable.files import safetensors as checked
from composable.files.safetensors import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    TensorFile,
    read_header,
    stream_tensors,
)
from composable.interface import TensorSpec
from composable.packaging import check_tensors, read_tensors, write_tensors

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([1.5, -2.0, 0.0], dtype=ml_dtypes.bfloat16)
SPECS = {"slots.4.w_up": TensorSpec(shape=(2, 3)), "b_in": TensorSpec(shape=(3,))}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    write_tensors(path, {"slots.4.w_up": A, "b_in": B}, {"format": "composable"})
    return path


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], start: int, stop: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_round_trip(good: Path) -> None:
    check_tensors(good, SPECS)
    tensors = read_tensors(good, SPECS)
    assert list(tensors) == list(SPECS)
    np.testing.assert_array_equal(tensors["slots.4.w_up"], A)
    np.testing.assert_array_equal(tensors["b_in"], B)
    assert tensors["b_in"].dtype == ml_dtypes.bfloat16


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_tensors(one, {"a": A, "b": B}, {"x": "1", "y": "2"})
    write_tensors(other, {"b": B.copy(), "a": np.asfortranarray(A)}, {"y": "2", "x": "1"})
    assert one.read_bytes() == other.read_bytes()


def test_a_stream_gives_the_bytes_of_the_arrays_and_asks_for_each_once(tmp_path: Path) -> None:
    arrays = {"slots.4.w_up": A, "b_in": B}
    write_tensors(tmp_path / "whole", arrays)
    asked: list[str] = []

    def read(name: str) -> np.ndarray:
        asked.append(name)
        return arrays[name]

    specs = {
        "b_in": TensorSpec(shape=(3,), dtypes=("BF16",)),
        "slots.4.w_up": TensorSpec(shape=(2, 3), dtypes=("F32",)),
    }
    stream_tensors(tmp_path / "streamed", specs, read)
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert asked == ["slots.4.w_up", "b_in"]


def test_a_stream_refuses_an_array_other_than_announced(tmp_path: Path) -> None:
    specs = {"b_in": TensorSpec(shape=(3,), dtypes=("F32",))}
    with pytest.raises(
        TensorFileError, match=r"bfloat16 of shape \[3\], expected float32 of \[3\]"
    ):
        stream_tensors(tmp_path / "x", specs, lambda name: B)
    assert not (tmp_path / "x").exists()


def test_a_tensor_file_reads_what_is_asked_for(good: Path) -> None:
    tensors = TensorFile(good, SPECS)
    assert dict(tensors.items()).keys() == SPECS.keys()
    assert len(tensors) == 2
    np.testing.assert_array_equal(tensors["slots.4.w_up"], A)
    good.write_bytes(good.read_bytes()[:-6] + b"\x80\x7f\0\0\0\0")  # infinity
    with pytest.raises(TensorFileError, match=r"'b_in' is not finite at \[0\]"):
        TensorFile(good, SPECS)["b_in"]
    with pytest.raises(TensorFileError, match="'c' is missing"):
        TensorFile(good, {**SPECS, "c": TensorSpec(shape=(1,))})


def test_others_read_what_we_write(good: Path) -> None:
    theirs = safetensors.numpy.load_file(good)
    np.testing.assert_array_equal(theirs["slots.4.w_up"], A)
    np.testing.assert_array_equal(theirs["b_in"], B)
    with safetensors.safe_open(good, "numpy") as file:
        assert file.metadata() == {"format": "composable"}


def test_we_read_what_others_write(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    safetensors.numpy.save_file({"slots.4.w_up": A, "b_in": B}, path, {"k": "v"})
    np.testing.assert_array_equal(read_tensors(path, SPECS)["slots.4.w_up"], A)


@pytest.mark.parametrize("name", ["A", "a..b", ".a", "a.", "../x", "a/b", "", "a b", "ä"])
def test_names_that_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(TensorFileError, match="not a tensor name"):
        write_tensors(tmp_path / "x", {name: A})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_what_is_not_finite(tmp_path: Path, value: float, dtype: Any) -> None:
    array = np.zeros((3, 4), dtype)
    array[1, 2] = value
    with pytest.raises(TensorFileError, match=r"tensor 'a' is not finite at \[1, 2\]"):
        write_tensors(tmp_path / "ours", {"a": array})
    path = tmp_path / "theirs"
    safetensors.numpy.save_file({"a": array}, path)
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[str(array.dtype)]
    specs = {"a": TensorSpec(shape=(3, 4), dtypes=(kind,))}
    for read in (check_tensors, read_tensors):
        with pytest.raises(TensorFileError, match=r"tensor 'a' is not finite at \[1, 2\]"):
            read(path, specs)


def test_not_finite_in_a_late_block(tmp_path: Path) -> None:
    array = np.zeros(3_000_000, np.float32)
    array[2_999_999] = np.nan
    path = tmp_path / "big"
    safetensors.numpy.save_file({"a": array}, path)
    for read in (check_tensors, read_tensors):
        with pytest.raises(TensorFileError, match=r"not finite at \[2999999\]"):
            read(path, {"a": TensorSpec(shape=(3_000_000,))})


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({**SPECS, "w_out": TensorSpec(shape=(1,))}, r"'w_out' is missing, expected shape \[1\]"),
        ({"b_in": TensorSpec(shape=(3,))}, "'slots.4.w_up' is not expected"),
        ({**SPECS, "b_in": TensorSpec(shape=(4,))}, r"'b_in' has shape \[3\], expected \[4\]"),
        ({**SPECS, "b_in": TensorSpec(shape=(3, 1))}, r"has shape \[3\], expected \[3, 1\]"),
        ({**SPECS, "b_in": TensorSpec(shape=(3,), dtypes=("F32",))}, "dtype BF16, expected F32"),
    ],
)
def test_what_does_not_fit(good: Path, specs: dict[str, TensorSpec], message: str) -> None:
    for read in (check_tensors, read_tensors):
        with pytest.raises(TensorFileError, match=message) as caught:
            read(good, specs)
        assert caught.value.where == str(good)


def test_a_misspelt_tensor_gets_a_hint(good: Path) -> None:
    specs = {"slots.4.w_upp": SPECS["slots.4.w_up"], "b_in": SPECS["b_in"]}
    with pytest.raises(TensorFileError) as caught:
        check_tensors(good, specs)
    assert caught.value.hint == "did you mean 'slots.4.w_upp'?"


Z = b"\0"
DEEP = b'{"a":' + b"[" * 100_000
MANY = {f"t{i}": entry([0], 0, 0) for i in range(MAX_TENSORS + 1)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "does not start with"),
        (b"[]", b"", "does not start with"),
        (b"{", b"", "not JSON"),
        (b"{}}", b"", "not JSON"),
        (b'{"a":NaN}', b"", "not JSON"),
        (b"{\xff}", b"", "not JSON"),
        (DEEP, b"", "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "not JSON"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b"", "twice"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "'a' twice"),
        ({"../../x": entry([1], 0, 4)}, Z * 4, "not a tensor name"),
        ({"A": entry([1], 0, 4)}, Z * 4, "not a tensor name"),
        ({"a" * 300: entry([1], 0, 4)}, Z * 4, "not a tensor name"),
        ({"a": []}, b"", "needs exactly"),
        ({"a": {**entry([1], 0, 4), "extra": 1}}, Z * 4, "needs exactly"),
        ({"a": entry([1], 0, 8, "F64")}, Z * 8, "has dtype 'F64'"),
        ({"a": entry([1], 0, 4, 7)}, Z * 4, "has dtype 7"),
        ({"a": entry([1] * 9, 0, 4)}, Z * 4, "at most 8 sizes"),
        ({"a": entry([-1], 0, 4)}, Z * 4, "has shape"),
        ({"a": entry([True], 0, 4)}, Z * 4, "has shape"),
        ({"a": entry([1.0], 0, 4)}, Z * 4, "has shape"),
        ({"a": entry([2**62, 2**62], 0, 4)}, Z * 4, "spans 4 bytes"),
        ({"a": entry([1], 0, 2**63)}, Z * 4, "has offsets"),
        ({"a": entry([1], 4, 0)}, Z * 4, "spans -4 bytes"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, Z * 4, "overlaps"),
        ({"a": entry([1], 4, 8)}, Z * 8, "leaves a gap"),
        ({"a": entry([1], 0, 4)}, Z * 3, "truncated: "),
        ({"a": entry([10**15], 0, 4 * 10**15)}, Z * 3, "truncated: "),
        ({"a": entry([1], 0, 4)}, Z * 5, "1 bytes after the last tensor"),
        ({"__metadata__": {"k": 1}, "a": entry([1], 0, 4)}, Z * 4, "not a table of text"),
        ({"__metadata__": [], "a": entry([1], 0, 4)}, Z * 4, "not a table of text"),
        (MANY, b"", "4,097 tensors"),
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "hostile", header, data)
    specs = {"a": TensorSpec(shape=(1,))}
    for read in (lambda: read_header(path), lambda: check_tensors(path, specs)):
        with pytest.raises(TensorFileError, match=message) as caught:
            read()
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("length", "message"),
    [(MAX_HEADER_BYTES + 1, "at most 1,048,576"), (2**64 - 1, "at most"), (100, "truncated")],
)
def test_lengths_that_lie(tmp_path: Path, length: int, message: str) -> None:
    path = write_raw(tmp_path / "x", b"{}", length=length)
    with pytest.raises(TensorFileError, match=message):
        read_header(path)


def test_a_file_cut_anywhere_is_refused(good: Path) -> None:
    whole = good.read_bytes()
    for length in range(len(whole)):
        good.write_bytes(whole[:length])
        for read in (check_tensors, read_tensors):
            with pytest.raises(TensorFileError):
                read(good, SPECS)


def test_flipped_bits_never_do_worse_than_change_values(good: Path) -> None:
    """A flip is refused or leaves a file of the declared form: never another exception."""
    whole = good.read_bytes()
    rng = random.Random(0)
    n_refused = 0
    for _ in range(1500):
        position = rng.randrange(len(whole) * 8)
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        good.write_bytes(flipped)
        try:
            tensors = read_tensors(good, SPECS)
        except TensorFileError:
            n_refused += 1
        else:
            assert {name: a.shape for name, a in tensors.items()} == {
                name: spec.shape for name, spec in SPECS.items()
            }
    assert n_refused > 500


KEYS = st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"])
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_random_headers_raise_only_our_error(tmp_path: Path, header: bytes) -> None:
    path = write_raw(tmp_path / "fuzz", header, b"\0" * 8)
    try:
        read_header(path)
    except TensorFileError as error:
        assert error.where == str(path)


def test_an_empty_tensor_and_scalar(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"empty": np.zeros((0, 3), np.float32), "one": np.float32(2).reshape(())})
    specs = {"empty": TensorSpec(shape=(0, 3)), "one": TensorSpec(shape=())}
    tensors = read_tensors(path, specs)
    assert tensors["one"] == 2
    assert tensors["empty"].shape == (0, 3)


def test_what_is_read_is_what_was_checked(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened once: swapping it after the check cannot change what is loaded."""
    opened: list[Path] = []
    real: Callable[..., Any] = checked.open_file

    def counting(path: Path) -> Any:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(checked, "open_file", counting)
    read_tensors(good, SPECS)
    assert opened == [good]
