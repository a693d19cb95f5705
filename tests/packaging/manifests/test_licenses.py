"""Licence expressions: one spelling, what satisfies them, and what is not one."""

from __future__ import annotations

import itertools

import pytest

from composable.errors import ManifestError
from composable.packaging.manifests.licenses import (
    list_alternatives,
    parse_allowed_license,
    parse_license,
)


@pytest.mark.parametrize(
    ("text", "alternatives"),
    [
        ("apache-2.0", [{"Apache-2.0"}]),
        ("MIT OR ISC", [{"MIT"}, {"ISC"}]),
        ("MIT AND ISC", [{"MIT", "ISC"}]),
        ("MIT OR ISC AND Zlib", [{"MIT"}, {"ISC", "Zlib"}]),
        ("(MIT OR ISC) AND Zlib", [{"MIT", "Zlib"}, {"ISC", "Zlib"}]),
        ("((MIT))", [{"MIT"}]),
        ("(MIT OR ISC) AND (MIT OR ISC)", [{"MIT"}, {"MIT", "ISC"}, {"ISC"}]),
        (
            "GPL-2.0-only WITH Classpath-exception-2.0 AND LicenseRef-Team-1",
            [{"GPL-2.0-only WITH Classpath-exception-2.0", "LicenseRef-Team-1"}],
        ),
    ],
)
def test_what_satisfies_an_expression(text: str, alternatives: list[set[str]]) -> None:
    assert list_alternatives(text) == alternatives


def test_alternatives_agree_with_the_truth_table() -> None:
    """For every set of allowed licences, an expression of Python operators has the same value."""
    text = "MIT AND (ISC OR Zlib AND (MIT OR CC0-1.0)) OR CC0-1.0 AND Zlib"
    names = ["MIT", "ISC", "Zlib", "CC0-1.0"]
    python = text.replace("AND", "and").replace("OR", "or").replace("CC0-1.0", "CC0")
    for values in itertools.product([False, True], repeat=len(names)):
        truth = dict(zip(["MIT", "ISC", "Zlib", "CC0"], values, strict=True))
        allowed = {name for name, value in zip(names, values, strict=True) if value}
        expected = eval(python, truth)
        assert any(needed <= allowed for needed in list_alternatives(text)) == expected, allowed


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "choose a licence", "MIT OR", "(MIT", "MIT)", "()", "MIT ISC", "MIT WITH MIT"),
        *("not MIT", "MIT\x00", "__import__('os')", "LicenseRef-", "MIT OR (" * 25, "M" * 201),
    ],
)
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(ManifestError):
        parse_license(text)


def test_deep_and_wide_expressions_end() -> None:
    assert list_alternatives("(" * 98 + "MIT" + ")" * 98) == [{"MIT"}]
    wide = " AND ".join(["(MIT OR ISC)", "(0BSD OR X11)", "(Zlib OR W3C)", "(NTP OR BSL-1.0)"] * 3)
    assert len(list_alternatives(wide[: wide.rfind(")", 0, 200) + 1])) <= 81


@pytest.mark.parametrize("text", ["MIT OR ISC", "MIT AND ISC", "nothing"])
def test_a_policy_lists_single_licences(text: str) -> None:
    with pytest.raises(ManifestError):
        parse_allowed_license(text)
