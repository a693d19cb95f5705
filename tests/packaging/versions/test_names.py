"""Names that are safe in a path and to the eye."""

from __future__ import annotations

import pytest

from composable.errors import ManifestError, did_you_mean
from composable.packaging.versions.names import (
    check_file_name,
    check_package_name,
    confusable_key,
    is_package_name,
)


@pytest.mark.parametrize("name", ["a", "german", "set-mm", "x2", "a-1-b", "a" * 64])
def test_package_names(name: str) -> None:
    assert check_package_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", "A", "Set-mm", "set_mm", "set.mm", "-a", "a-", "a--b", "1a", "a b", "a/b", "../a", "ä",
        "a\n", "a" * 65, "con", "nul", "com1", "lpt9", "\x00", "а", None, 3,
    ],
)  # fmt: skip
def test_what_may_not_name_a_package(name: object) -> None:
    assert not is_package_name(name)
    with pytest.raises(ManifestError) as caught:
        check_package_name(name, "expert.toml: expert.name")
    assert caught.value.where == "expert.toml: expert.name"


@pytest.mark.parametrize("name", ["body.safetensors", "README.md", "card.json", "a", "a-b_c.d.e"])
def test_file_names(name: str) -> None:
    assert check_file_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", ".hidden", "a/b", "a\\b", "../a", "/etc/passwd", "a..b", "a.", "con",
        "NUL.txt", "a b", "a:b", "ä", "a\n", "a\x00", "x" * 101, None,
    ],
)  # fmt: skip
def test_what_may_not_name_a_file(name: object) -> None:
    with pytest.raises(ManifestError):
        check_file_name(name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("german", "gerrnan"), ("set-mm", "setmm"), ("set-mm", "SET_MM"), ("tool", "t00l"),
        ("mail", "mai1"), ("list", "1ist"), ("wave", "vvave"), ("model", "modei"), ("s3", "53"),
        ("cafe", "café"), ("dog", "clog"),
    ],
)  # fmt: skip
def test_look_alikes_share_a_key(one: str, other: str) -> None:
    assert confusable_key(one) == confusable_key(other)


def test_names_that_look_different_have_different_keys() -> None:
    names = ["german", "french", "set-mm", "tcl", "sql", "law", "bio", "chess", "go", "rust"]
    assert len({confusable_key(name) for name in names}) == len(names)


def test_did_you_mean() -> None:
    assert did_you_mean("germen", ["german", "french"]) == "did you mean 'german'?"
    assert did_you_mean("zzz", ["german", "french"]) is None
