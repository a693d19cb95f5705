import hashlib

import ml_dtypes
import numpy as np
import pytest

from composable.interface import canonical_json, digest_bytes, digest_tensors, is_digest


def test_a_digest_is_sha256_in_hex():
    assert digest_bytes(b"abc") == "sha256:" + hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("sha256:" + "0f" * 32, True),
        ("sha256:" + "0F" * 32, False),
        ("sha256:" + "0" * 65, False),
        ("sha512:" + "0" * 64, False),
        (" sha256:" + "0" * 64, False),
        ("sha256:" + "0" * 64 + "\n", False),
        (b"sha256:" + b"0" * 64, False),
        (None, False),
    ],
)
def test_what_has_the_form_of_a_digest(text, holds):
    assert is_digest(text) is holds


def test_canonical_json_has_one_spelling():
    value = {"b": [1, 2.5, None], "a": {"z": "ü", "y": True}}
    assert canonical_json(value) == '{"a":{"y":true,"z":"ü"},"b":[1,2.5,null]}'.encode()


TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros(2, np.int32)}


def test_the_digest_of_tensors_is_the_one_it_always_was():
    assert (
        digest_tensors(TENSORS)
        == "sha256:7237a4f85c2102c30b6cc67fe7ef8fa517f10e5253de052502cfd60de4b53e46"
    )


def test_the_digest_of_tensors_does_not_hang_on_order_or_strides():
    transposed = np.asfortranarray(TENSORS["b"])
    assert not transposed.flags["C_CONTIGUOUS"]
    assert digest_tensors({"a": TENSORS["a"], "b": transposed}) == digest_tensors(TENSORS)


@pytest.mark.parametrize(
    "changed",
    [
        {"c": TENSORS["b"], "a": TENSORS["a"]},
        {"b": TENSORS["b"].reshape(3, 2), "a": TENSORS["a"]},
        {"b": TENSORS["b"].astype(ml_dtypes.bfloat16), "a": TENSORS["a"]},
        {"b": TENSORS["b"].view(np.int32), "a": TENSORS["a"]},
        {"b": np.nextafter(TENSORS["b"], np.float32(9)), "a": TENSORS["a"]},
        {"b": TENSORS["b"]},
    ],
    ids=["name", "shape", "dtype", "same bytes, other dtype", "one bit", "fewer"],
)
def test_the_digest_of_tensors_hears_every_change(changed):
    assert digest_tensors(changed) != digest_tensors(TENSORS)
