"""What others wrote is printed by one function, whatever it holds, and JSON stays exact."""

import json
import sys
import unicodedata

import pytest

from composable.errors import ComposableError, ComposableWarning, ResolutionError
from composable.printable import printable, printable_json

ESCAPES = "\x1b]0;title\x07\x1b[2J"
HOSTILE = (
    ESCAPES,
    "\x9b31m",
    "\u202egnp.exe",
    "\u2066\u2069",
    "1.0\nevil  9.9.9",
    "a\r b",
    "\u2028",
    "ger\u200bman",
    "\ufeff",
    "\U000e0041",
    "\udcff",
    "\x7f",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_acts_on_is_escaped(text):
    assert printable(text) != text
    assert printable(text).encode()
    assert len(printable(text).splitlines()) == 1
    assert printable(printable(text)) == printable(text)


def test_no_character_of_a_control_category_is_left():
    joiners = "\u200c\u200d\xad"
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            assert printable(character) != character
        if unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "RLI"):
            assert printable(character) != character
    assert printable(joiners) == joiners


@pytest.mark.parametrize("text", ["Größe 3 µm", "नमस्ते", "می‌خواهم", "👩‍🔬🏴", "a\xa0b", r"C:\x1b"])
def test_text_of_all_scripts_stays(text):
    assert printable(text) == text


def test_an_error_that_quotes_a_long_text_is_short_as_text_and_exact_as_data():
    long = "a" * 20_000
    error = ComposableError(f"{long!r} is not a token", where=f"/x/{long}", hint=f"delete {long}")
    assert len(str(error)) < 5000
    assert str(error).startswith("/x/aaa")
    assert "aaa' is not a token\n  hint: delete aaa" in str(error)
    assert error.message == f"{long!r} is not a token"
    assert len(str(ResolutionError("a line\n" * 1000))) == 7000


@pytest.mark.parametrize("text", HOSTILE)
def test_json_is_safe_and_exact(text):
    data = {text: [text, {"deep": text}]}
    shown = printable_json(data, indent=2)
    assert json.loads(shown) == data
    assert shown == printable(shown, keep="\n")
    assert "\n" not in printable_json(data)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("part", ["message", "where", "hint"])
def test_an_error_has_one_line_and_one_hint_and_keeps_its_data(part, text):
    parts = {"message": "bad", "where": "a.toml", "hint": "do this", part: text}
    error = ComposableError(parts["message"], where=parts["where"], hint=parts["hint"])
    assert getattr(error, part) == text
    assert len(str(error).splitlines()) == 2
    assert str(error) == printable(str(error), keep="\n")


def test_an_explanation_keeps_its_lines():
    assert str(ResolutionError(f"a\n\n  b {ESCAPES}")).startswith("a\n\n  b \\x1b]0")


def test_a_warning_is_one_line():
    assert str(ComposableWarning("a\nb")) == "a\\nb"
