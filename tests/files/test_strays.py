"""Strays are ignored and named; our own incomplete files are not worth a word."""

import pytest

from composable.errors import StrayWarning
from composable.files.strays import drop_strays


def test_each_stray_is_named() -> None:
    names = ["1.json", "._1.json", ".tmp-7-0123456789abcdef", "1 (copy).json", "2.json"]
    with pytest.warns(StrayWarning) as found:
        kept = drop_strays(names, {"1.json", "2.json"}.__contains__, "folder", "a record")
    assert kept == ["1.json", "2.json"]
    assert [warning.message.name for warning in found] == ["._1.json", "1 (copy).json"]


def test_a_name_cannot_write_to_the_terminal() -> None:
    with pytest.warns(StrayWarning) as found:
        drop_strays(["\x1b[2J\u202e\nfake row"], lambda _: False, "f", "x")
    assert str(found[0].message).isprintable()
