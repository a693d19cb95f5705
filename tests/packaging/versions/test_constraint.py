"""Ranges: Cargo's meaning, pip's spellings, npm's fixtures."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composable.errors import ConstraintError, VersionError
from composable.packaging import Constraint, Requirement, Version
from composable.packaging.versions.constraint import (
    have_common_version,
    join_extra,
    parse_target,
    split_extra,
)
from tests.support.node_semver import NODE_SEMVER, why_another_meaning, why_npm_only


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        # The tables of the Cargo Book.
        ("1.2.3", "1.2.3 1.9.0", "1.2.2 2.0.0"),
        ("1.2", "1.2.0 1.9.9", "1.1.9 2.0.0"),
        ("1", "1.0.0 1.9.9", "0.9.9 2.0.0"),
        ("^0.2.3", "0.2.3 0.2.9", "0.2.2 0.3.0"),
        ("^0.2", "0.2.0 0.2.9", "0.1.9 0.3.0"),
        ("^0.0.3", "0.0.3", "0.0.2 0.0.4 0.1.0"),
        ("^0.0", "0.0.0 0.0.9", "0.1.0"),
        ("^0", "0.0.0 0.9.9", "1.0.0"),
        ("~1.2.3", "1.2.3 1.2.9", "1.2.2 1.3.0"),
        ("~1.2", "1.2.0 1.2.9", "1.1.9 1.3.0"),
        ("~1", "1.0.0 1.9.9", "0.9.9 2.0.0"),
        ("*", "0.0.0 99.0.0", "1.0.0-rc.1"),
        ("1.*", "1.0.0 1.9.9", "0.9.9 2.0.0"),
        ("1.2.*", "1.2.0 1.2.9", "1.1.9 1.3.0"),
        ("1.*.*", "1.0.0 1.9.9", "2.0.0"),
        (">=1.2.0", "1.2.0 9.0.0", "1.1.9"),
        (">1", "2.0.0", "1.0.0 1.9.9"),
        (">1.2", "1.3.0", "1.2.0 1.2.9"),
        ("<2", "1.9.9 0.0.0", "2.0.0 2.0.1"),
        ("<=1.2", "1.2.9", "1.3.0"),
        ("=1.2.3", "1.2.3", "1.2.2 1.2.4"),
        ("=1.2", "1.2.0 1.2.9", "1.3.0"),
        (">=1.2, <1.5", "1.2.0 1.4.9", "1.1.9 1.5.0"),
        # pip's.
        ("==1.2.3", "1.2.3", "1.2.4"),
        ("==1.2.*", "1.2.0 1.2.9", "1.3.0"),
        ("!=1.2.3", "1.2.2 1.2.4", "1.2.3"),
        ("!=1.2.*", "1.1.9 1.3.0", "1.2.0 1.2.9"),
        ("~=1.2", "1.2.0 1.9.9", "1.1.9 2.0.0"),
        ("~=0.2", "0.2.0 0.9.9", "0.1.9 1.0.0"),
        ("~=1.2.3", "1.2.3 1.2.9", "1.2.2 1.3.0"),
        ("^1, !=1.4.2", "1.4.1 1.4.3", "1.4.2"),
        # Prereleases, by Cargo's rule.
        ("^1.0.0-rc.1", "1.0.0-rc.1 1.0.0-rc.2 1.0.0 1.3.0", "1.0.0-beta 1.1.0-rc.1 2.0.0-rc.1"),
        (">=1.0.0-rc.1, <2", "1.0.0-rc.1 1.5.0", "1.5.0-rc.1 2.0.0-rc.1"),
        ("=1.0.0-rc.1", "1.0.0-rc.1 1.0.0-rc.1+build", "1.0.0-rc.2 1.0.0"),
        ("<2.0.0-rc.1", "1.0.0 2.0.0-beta", "2.0.0-rc.1 2.0.0 1.5.0-rc.1"),
        ("<2", "1.9.9", "2.0.0-rc.1 1.9.9-rc.1"),
        ("!=1.0.0-rc.1", "1.0.0", "1.0.0-rc.2 1.0.0-rc.1"),
        ("~1.2.3-rc.1", "1.2.3-rc.1 1.2.4", "1.2.4-rc.1 1.3.0"),
    ],
)  # fmt: skip
def test_what_a_range_holds(range_: str, inside: str, outside: str) -> None:
    constraint = Constraint(range_)
    for text in inside.split():
        assert constraint.contains(Version(text)), f"{range_} must hold {text}"
    for text in outside.split():
        assert not constraint.contains(Version(text)), f"{range_} must not hold {text}"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("1.2", "^1.2"),
        ("==1.2.3", "=1.2.3"),
        ("=1.2", "1.2.*"),
        ("1.x", "1.*"),
        ("X", "*"),
        ("< 2,>=1.2", ">=1.2, <2"),
        ("~=1.2.3", "~1.2.3"),
        ("~=1.2", ">=1.2, <2"),
        ("!=1.2.*", "!=1.2.*"),
        ("^1.2.3+build", "^1.2.3"),
        ("^1, ^1", "^1"),
        ("=1.0.0-rc.1", "=1.0.0-rc.1"),
    ],
)
def test_canonical_spelling(text: str, canonical: str) -> None:
    assert str(Constraint(text)) == canonical
    assert Constraint(text) == Constraint(canonical)
    assert hash(Constraint(text)) == hash(Constraint(canonical))


@pytest.mark.parametrize(
    "text",
    [
        "", ",", "1,", "foo", "1.2.3.4", "^", ">=", "1.*.3", "^*", ">=*", "1.2-rc", "=>1", "1 2",
        "1 - 2", "1 || 2", "v1", "~=1", "~=1.*", "===1.0.0", "~>1", "01", "^1.2.3-", "1.2.*-rc",
        "*, <2", "١", "^1\n", "1," * 40 + "1", "9" * 400, "x" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(ConstraintError) as caught:
        Constraint(text)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("1 - 2", "write '>=1, <=2'"),
        ("1 || 2", "alternatives"),
        (">=1 <2", "comma"),
        ("^v1", "leave out the 'v'"),
        ("~=1", "write '^1'"),
        ("", "write '*'"),
    ],
)
def test_hint_says_how_to_write_it(text: str, hint: str) -> None:
    with pytest.raises(ConstraintError) as caught:
        Constraint(text)
    assert hint in str(caught.value.hint)


def test_pinned() -> None:
    assert Constraint("==1.2.3-rc.1").pinned == Version("1.2.3-rc.1")
    for text in ("^1.2.3", "=1.2", "=1.2.3, <2", "*"):
        assert Constraint(text).pinned is None


numbers = st.integers(0, 3).map(str)
prereleases = st.sampled_from(["", "", "", "-0", "-alpha", "-alpha.1", "-rc.1"])
versions = st.builds(
    lambda a, b, c, p: Version(f"{a}.{b}.{c}{p}"), numbers, numbers, numbers, prereleases
)
operators = st.sampled_from(["", "=", "==", "!=", "^", "~", ">", ">=", "<", "<="])
comparators = st.one_of(
    st.builds(lambda op, v: f"{op}{v}", operators, versions),
    st.builds(lambda op, a: f"{op}{a}", operators, numbers),
    st.builds(lambda op, a, b: f"{op}{a}.{b}", operators, numbers, numbers),
    st.builds(lambda a, b: f"{a}.{b}.*", numbers, numbers),
    st.builds(lambda a, b: f"~={a}.{b}", numbers, numbers),
)
ranges = st.lists(comparators, min_size=1, max_size=3).map(", ".join)


@given(ranges, st.lists(versions, max_size=20))
def test_spelling_canonically_changes_nothing(text: str, some: list[Version]) -> None:
    constraint = Constraint(text)
    again = Constraint(str(constraint))
    assert str(again) == str(constraint)
    assert [constraint.contains(v) for v in some] == [again.contains(v) for v in some]


@given(ranges, ranges, versions)
def test_a_comma_is_an_and_for_releases(one: str, other: str, version: Version) -> None:
    if not version.is_prerelease:
        both = Constraint(f"{one}, {other}").contains(version)
        assert both == (Constraint(one).contains(version) and Constraint(other).contains(version))


@given(versions)
def test_not_equal_is_the_complement_of_equal(version: Version) -> None:
    release = Version(".".join(map(str, version.release)))
    for text in ("1.2.3", "1.2", "1"):
        assert Constraint(f"={text}").contains(release) != Constraint(f"!={text}").contains(release)


@pytest.mark.parametrize("kind", ["range-include", "range-exclude"])
def test_node_semver_ranges(kind: str) -> None:
    n_agreeing = 0
    for range_, version, *rest in NODE_SEMVER[kind]:
        options = rest[0] if rest else None
        if why_npm_only(range_, version):
            with pytest.raises((ConstraintError, VersionError)):
                Constraint(range_).contains(Version(version))
        elif not why_another_meaning(range_, options):
            held = Constraint(range_).contains(Version(version))
            assert held == (kind == "range-include"), (range_, version)
            n_agreeing += 1
    assert n_agreeing >= 50


@pytest.mark.parametrize(
    ("text", "name", "range_"),
    [
        ("set-mm", "set-mm", "*"),
        ("german>=1.2,<2", "german", ">=1.2, <2"),
        ("german ^1.2", "german", "^1.2"),
        ("german 1.2", "german", "^1.2"),
        ("german@1.2.0", "german", "=1.2.0"),
        ("german==1.2.*", "german", "1.2.*"),
        ("german!=1.2.3", "german", "!=1.2.3"),
        ("german*", "german", "*"),
    ],
)
def test_requirements(text: str, name: str, range_: str) -> None:
    requirement = Requirement.parse(text)
    assert requirement == Requirement(name, Constraint(range_))
    assert Requirement.parse(str(requirement)) == requirement


@pytest.mark.parametrize(
    ("text", "extras", "range_"),
    [
        ("german[code]", ("code",), "*"),
        ("german[code]>=1.2,<2", ("code",), ">=1.2, <2"),
        ("german[news,code] ^1.2", ("code", "news"), "^1.2"),
        ("german [ news , code, news ] 1.2", ("code", "news"), "^1.2"),
        ("german[code]@1.2.0", ("code",), "=1.2.0"),
    ],
)
def test_requirements_with_extras(text: str, extras: tuple[str, ...], range_: str) -> None:
    requirement = Requirement.parse(text)
    assert requirement == Requirement("german", Constraint(range_), extras)
    assert requirement.extras == extras
    assert Requirement.parse(str(requirement)) == requirement
    assert parse_target(requirement.target) == ("german", extras)


names = st.sampled_from(["code", "news", "a", "x-1"])


@given(ranges, st.lists(names))
def test_extras_are_a_set_and_spell_canonically(range_: str, extras: list[str]) -> None:
    requirement = Requirement("german", Constraint(range_), tuple(extras))
    assert requirement == Requirement("german", Constraint(range_), tuple(set(extras)))
    assert list(requirement.extras) == sorted(set(extras))
    assert Requirement.parse(str(requirement)) == requirement


@pytest.mark.parametrize("extra", ["", "Code", "a b", "[", "../x", "x" * 65])
def test_what_is_no_extra(extra: str) -> None:
    with pytest.raises(ConstraintError):
        Requirement("german", extras=(extra,))
    with pytest.raises(ConstraintError):
        Requirement.parse(f"german[{extra}]")
    with pytest.raises(ConstraintError):
        parse_target(f"german[{extra}]")


@given(names, names)
def test_an_extra_joins_and_splits(name: str, extra: str) -> None:
    assert split_extra(join_extra(name, extra)) == (name, extra)
    assert split_extra(name) == (name, None)


@pytest.mark.parametrize(
    "text",
    [
        "", "German", "a b", "../x", "german@1.2", "german@^1", "@1.0.0", "con", "x" * 70, ">=1",
        "german[", "german]", "german[]", "german[code", "german[code]]", "german[code][news]",
        "german>=1[code]", "[code]", "german[code,]", "german[code]1.2",
    ],
)  # fmt: skip
def test_what_is_no_requirement(text: str) -> None:
    with pytest.raises(ConstraintError):
        Requirement.parse(text)


@given(st.lists(ranges, min_size=1, max_size=3), st.lists(versions, max_size=30))
def test_a_common_version_is_found_if_there_is_one(texts: list[str], some: list[Version]) -> None:
    constraints = list(map(Constraint, texts))
    if any(all(c.contains(v) for c in constraints) for v in some):
        assert have_common_version(constraints)


@pytest.mark.parametrize(
    "texts", [[">=2", "<2"], ["^1", "^2"], ["=1.0.0", "!=1.0.0"], [">=1.0.0-rc.1, <1.0.0", "^1"]]
)
def test_no_common_version(texts: list[str]) -> None:
    assert not have_common_version(map(Constraint, texts))


def test_every_process_writes_ranges_that_mean_the_same_in_one_order() -> None:
    script = "from composable.packaging import Constraint; print(Constraint('1.0,1,1.0.0,=2,=2.0'))"
    written = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(6)
    }
    assert len(written) == 1
