import json

import pytest

from composable.errors import InteropError
from composable.interop.tables import DELETE_IT, Count, Finite, Positive, Schema, convert, read_json

SCHEMA = Schema(
    types={"r": Count, "names": list[str] | None},
    only={"bias": ("none",), "is_new": (None, False)},
    ignored=frozenset({"note"}),
    ignored_prefixes=("_",),
    changes="the result",
    hints={"known": "a cure of its own"},
)


def test_what_is_read_allowed_or_ignored_passes():
    table = {"r": 4, "names": ["a"], "bias": "none", "note": object(), "_hash": 1, "later": None}
    SCHEMA.check(table, "x.")


@pytest.mark.parametrize(
    ("table", "where", "hint"),
    [
        ({"r": "4"}, "x.r", None),
        ({"r": True}, "x.r", None),
        ({"r": 4.0}, "x.r", None),
        ({"r": 0}, "x.r", None),
        ({"r": 1 << 40}, "x.r", None),
        ({"r": [4]}, "x.r", None),
        ({"names": "a"}, "x.names", None),
        ({"names": [1]}, "x.names", None),
        ({"bias": "all"}, "x.bias", None),
        ({"is_new": 0}, "x.is_new", None),  # equal to False, and yet no truth value
        ({"later": False}, "x.later", DELETE_IT),
        ({"known": 1}, "x.known", "a cure of its own"),
    ],
)
def test_anything_else_is_refused_by_name(table, where, hint):
    with pytest.raises(InteropError) as caught:
        SCHEMA.check(table, "x.")
    assert (caught.value.where, caught.value.hint) == (where, hint)


@pytest.mark.parametrize("kind", [Finite, Positive, float, list[Finite], dict[str, Positive]])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400])
def test_numbers_are_finite(kind, number):
    value = [number] if kind == list[Finite] else {"a": number} if "dict" in str(kind) else number
    with pytest.raises(InteropError, match="is not valid"):
        convert(value, kind, "x")


def test_a_long_value_is_not_repeated_whole():
    with pytest.raises(InteropError) as caught:
        SCHEMA.check({"later": "x" * 100_000}, "x.")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "a again: 1 contradicts"),
        ('{"b": {"a": 1, "a": [1]}}', "contradicts"),
        ("[1]", "expected a table"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text, errors="surrogateescape")
    with pytest.raises(InteropError, match=message):
        read_json(tmp_path / "x.json")


def test_a_field_may_be_stated_twice_alike(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1, "a": 1}')
    assert read_json(tmp_path / "x.json") == json.loads('{"a": 1}')
