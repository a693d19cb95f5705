"""Explanations: what meets nowhere is said, long chains are short, what is given up is told."""

import re

import pytest

from composable.errors import ResolutionError
from composable.packaging.resolution.resolver import resolve
from composable.packaging.resolution.universe import Universe


def explain(packages, requires, **more):
    universe = Universe.from_dict({"packages": packages, "requires": requires, **more}, "test")
    with pytest.raises(ResolutionError) as caught:
        resolve(universe)
    return caught.value.message


def needing(name, range_, kind="requires"):
    return {"1.0.0": {kind: {name: range_}}}


def releases(*versions):
    return {version: {} for version in versions}


MEETINGS = {
    "two experts": (
        {
            "x": needing("a", ">=1.0, <2.0"),
            "y": needing("a", ">=1.5, <3.0"),
            "a": releases("1.0.0", "2.0.0"),
        },
        {"x": "*", "y": "*"},
        "both",
    ),
    "the user and an expert": (
        {"x": needing("a", ">=1.0, <2.0"), "a": releases("1.0.0", "1.9.0")},
        {"x": "*", "a": ">1.0, !=1.9.0, <3"},
        "both",  # though nothing is in the user's range alone
    ),
    "the user's range and an expert's": (
        {"x": needing("a", "^1"), "a": releases("1.0.0", "2.0.0")},
        {"x": "*", "a": ">=1.2"},
        "both",
    ),
    "a prerelease": (
        {
            "x": needing("a", ">=1.0, <2.0"),
            "y": needing("a", ">=1.5, <3.0"),
            "a": releases("1.0.0", "1.7.0-rc.1", "2.0.0"),
        },
        {"x": "*", "y": "*"},
        "a prerelease matches only",
    ),
    "three": (
        {
            "x": needing("a", "!=1.0.0"),
            "y": needing("a", "!=2.0.0"),
            "z": needing("a", "!=3.0.0"),
            "a": releases("1.0.0", "2.0.0", "3.0.0"),
        },
        {"x": "*", "y": "*", "z": "*"},
        "all of",
    ),
    "a conflict": (
        {
            "x": needing("a", ">=1.0, <3.0"),
            "c": needing("a", "<2.0", "conflicts"),
            "a": releases("1.0.0", "1.1.0"),
        },
        {"x": "*", "c": "*"},
        ">=1.0, <3.0 but not in <2.0",
    ),
    "an extra": (
        {
            "x": {"1.0.0": {"extras": {"code": {"a": ">=1.0, <2.0"}}}},
            "y": needing("a", ">=1.5, <3.0"),
            "a": releases("1.0.0", "2.0.0"),
        },
        {"x[code]": "*", "y": "*"},
        "both",
    ),
}


@pytest.mark.parametrize("case", MEETINGS)
def test_ranges_that_overlap_where_no_release_lies(case):
    packages, requires, said = MEETINGS[case]
    told = explain(packages, requires)
    sentence = next(line for line in told.splitlines() if "No release of a lies in" in line)
    assert said in sentence
    assert "(available: 1.0.0" in sentence


@pytest.mark.parametrize(
    ("packages", "requires"),
    [
        ({"x": needing("a", "^1"), "a": releases("1.0.0", "2.0.0")}, {"x": "*", "a": "^2"}),
        (
            {
                "x": needing("a", "<2.0"),
                "c": needing("a", "<2.0", "conflicts"),
                "a": releases("1.0.0", "2.0.0"),
            },
            {"x": "*", "c": "*"},
        ),
    ],
)
def test_ranges_that_have_nothing_in_common_need_no_word(packages, requires):
    assert "lies in" not in explain(packages, requires)


def chain(length, prefix="level", end=None):
    packages = {
        f"{prefix}{i}": needing(f"{prefix}{i + 1}", "*") for i in range(length - (end is not None))
    }
    return packages if end is None else {**packages, f"{prefix}{length - 1}": end}


@pytest.mark.parametrize("length", [7, 50, 200, 400])
def test_a_chain_is_told_by_its_ends_and_its_cause(length):
    told = explain(chain(length), {"level0": "*"})
    assert told.count("\n") < 20
    assert "You require level0." in told
    assert "level0 1.0.0 needs level1." in told
    assert f"level{length - 1} 1.0.0 needs level{length}." in told
    assert f"There is no expert 'level{length}'" in told
    assert f"a chain of {length - 2} needs" in told


def test_a_short_chain_is_told_in_full():
    told = explain(chain(5), {"level0": "*"})
    for i in range(5):
        assert f"level{i} 1.0.0 needs level{i + 1}." in told


def test_two_chains_that_meet_are_told_by_their_ends():
    packages = {
        **chain(150, "left", needing("shared", "^1")),
        **chain(150, "right", needing("shared", "^2")),
        "shared": releases("1.0.0", "2.0.0"),
    }
    told = explain(packages, {"left0": "*", "right0": "*"})
    assert told.count("\n") < 20
    for text in (
        "left149 1.0.0 needs shared ^1",
        "right149 1.0.0 needs shared ^2",
        "left0",
        "right0",
    ):
        assert text in told


def test_a_chain_of_several_releases_each():
    packages = {
        f"level{i}": {f"{v}.0.0": {"requires": {f"level{i + 1}": f"^{v}"}} for v in (1, 2)}
        for i in range(100)
    }
    told = explain(packages, {"level0": "*"})
    assert told.count("\n") < 20
    assert "'level100'" in told


def test_a_ladder_is_short_too():
    """Each step needs both sides of the next one: no chain, but as long a story."""
    packages = {
        f"{side}{i}": {"1.0.0": {"requires": {f"a{i + 1}": "*", f"b{i + 1}": "*"}}}
        for side in "ab"
        for i in range(100)
    }
    packages |= {
        "a100": needing("end", "^1"),
        "b100": needing("end", "^2"),
        "end": releases("1.0.0", "2.0.0"),
    }
    told = explain(packages, {"a0": "*"})
    assert told.count("\n") < 20


GIVEN_UP = [
    {
        "trap": needing("constrained", ">=1.1.0, <=2.0.0"),
        "constrained": releases("1.0.0", "1.1.0", "2.0.0", "2.0.1"),
        "cloaking": needing("constrained", "~1.0.0"),
    },
    {
        "trap": needing("constrained", "^1"),
        "constrained": releases("1.0.0", "2.0.0", "3.0.0"),
        "cloaking": needing("constrained", "^3"),
        "other": needing("nothing", "*"),
    },
]


@pytest.mark.parametrize("packages", GIVEN_UP)
def test_every_package_that_a_suggestion_gives_up_is_in_the_story(packages):
    requires = {name: "=2" if name == "constrained" else "*" for name in packages}
    if "nothing" not in str(packages):
        requires["constrained"] = "2.0.1"
    story, _, suggestions = explain(packages, requires).partition("would solve it")
    assert "leave out" in suggestions
    for name in packages:
        if re.search(rf"\b{name}\b", suggestions):
            assert f"You require {name}" in story
            assert re.search(rf"{name}\b.* needs|needs {name}", story)


def test_many_requirements_are_listed_short_but_those_given_up_are_told():
    packages = {f"e{i}": needing("a", f"={i}.0.0") for i in range(40)}
    packages["a"] = releases(*(f"{i}.0.0" for i in range(40)))
    told = explain(packages, {f"e{i}": "*" for i in range(40)})
    story, _, suggestions = told.partition("would solve it")
    for name in re.findall(r"\be\d+", suggestions):
        assert f"You require {name}." in story
