"""SemVer 2.0.0: order, equality, and what is no version."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from composable.errors import VersionError
from composable.packaging import Version

NODE_SEMVER: dict[str, list[Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "node-semver.json").read_text()
)
# Section 11 of the specification, and the corners it leaves to the reader, oldest first.
IN_ORDER = [
    "0.0.0-0",
    "0.0.0-0.0",
    "0.0.0-a",
    "0.0.0",
    "0.0.1-rc.1",
    "0.0.1",
    "0.1.0",
    "0.9.0",
    "0.10.0",
    "1.0.0-1",
    "1.0.0-2",
    "1.0.0-10",
    "1.0.0--",
    "1.0.0--1",
    "1.0.0-0a",
    "1.0.0-A",
    "1.0.0-Z",
    "1.0.0-alpha",
    "1.0.0-alpha.1",
    "1.0.0-alpha.beta",
    "1.0.0-beta",
    "1.0.0-beta.2",
    "1.0.0-beta.11",
    "1.0.0-rc.1",
    "1.0.0-rc1",
    "1.0.0",
    "1.0.1-x",
    "1.0.1",
    "2.0.0",
    "10.0.0",
    "99999999999999999999.0.0",
]


def test_order_of_all_pairs() -> None:
    versions = [Version(text) for text in IN_ORDER]
    for (i, a), (j, b) in itertools.product(enumerate(versions), repeat=2):
        assert (a < b, a <= b, a == b, a >= b, a > b) == (i < j, i <= j, i == j, i >= j, i > j)
    assert sorted(versions, reverse=True) == versions[::-1]


def test_build_metadata_counts_for_nothing_but_is_kept() -> None:
    a, b = Version("1.0.0-rc.1+cuda.12"), Version("1.0.0-rc.1+cpu")
    assert a == b
    assert hash(a) == hash(b)
    assert not a < b
    assert not a > b
    assert str(a) == "1.0.0-rc.1+cuda.12"
    assert (a.major, a.minor, a.patch, a.prerelease, a.build) == (1, 0, 0, "rc.1", "cuda.12")


@pytest.mark.parametrize(
    "text",
    [
        "", "1", "1.2", "1.2.3.4", "v1.2.3", "=1.2.3", " 1.2.3", "1.2.3 ", "1.2.3\n", "01.2.3",
        "1.02.3", "1.2.3-", "1.2.3+", "1.2.3-01", "1.2.3-a..b", "1.2.3-ä", "1.2.3-a_b", "-1.2.3",
        "١.0.0", "1.2.3+a+b", "1.2.x", "latest", "1." * 200, "9" * 300 + ".0.0",
    ],
)  # fmt: skip
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(VersionError, match="not a semantic version"):
        Version(text)


@pytest.mark.parametrize(
    ("text", "cure"),
    [("1.2", "1.2.0"), ("v1.2.3", "1.2.3"), ("01.2", "1.2.0"), ("7", "7.0.0")],
)
def test_hint_says_how_to_write_it(text: str, cure: str) -> None:
    with pytest.raises(VersionError) as caught:
        Version(text)
    assert caught.value.hint == f"write {cure!r}"


@pytest.mark.parametrize("value", [None, 1, 1.2, b"1.2.3", ["1.2.3"]])
def test_only_text_is_a_version(value: Any) -> None:
    with pytest.raises(VersionError):
        Version(value)


@pytest.mark.parametrize("case", NODE_SEMVER["comparisons"], ids=str)
def test_node_semver_comparisons(case: list[Any]) -> None:
    newer, older = (Version(text.removeprefix("v")) for text in case[:2])  # 'v' is npm's, not ours
    assert newer > older


@pytest.mark.parametrize("case", NODE_SEMVER["equality"], ids=str)
def test_node_semver_equality(case: list[Any]) -> None:
    one, other = (Version(text.strip().lstrip("v= ")) for text in case[:2])
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize("case", NODE_SEMVER["valid-versions"], ids=str)
def test_node_semver_valid_versions(case: list[Any]) -> None:
    text, major, minor, patch, prerelease, build = case
    if text.startswith("v"):
        with pytest.raises(VersionError):
            Version(text)  # SemVer: "v1.2.3" is not a semantic version
        return
    version = Version(text)
    assert version.release == (major, minor, patch)
    assert version.prerelease == ".".join(map(str, prerelease))
    assert version.build == ".".join(map(str, build))


@pytest.mark.parametrize("case", NODE_SEMVER["invalid-versions"], ids=str)
def test_node_semver_invalid_versions(case: list[Any]) -> None:
    text, reason, *_ = case
    if reason == "too big":  # a limit of JavaScript's numbers, not of SemVer's
        assert max(Version(text).release) > 2**53
        return
    with pytest.raises(VersionError):
        Version(text)
