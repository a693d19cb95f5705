"""Incoming text: what is read, what is refused, and what the cure is."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from composable.errors import ManifestError, TextError
from composable.files.text import (
    check_text,
    decode_text,
    has_json_lines,
    parse_json_lines,
    parse_plain_text,
)

WORDS = "Die Straße führt zum 🦊."


def test_a_byte_order_mark_is_no_text():
    assert decode_text(WORDS.encode("utf-8-sig"), "a") == WORDS
    assert decode_text(WORDS.encode(), "a") == WORDS
    assert decode_text("in the \ufeffmiddle".encode(), "a") == "in the \ufeffmiddle"


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (WORDS.encode("utf-16"), "UTF-16", "iconv -f UTF-16 -t UTF-8"),
        (b"\xfe\xff" + WORDS.encode("utf-16-be"), "UTF-16", "iconv -f UTF-16"),
        (WORDS.encode("utf-32"), "UTF-32", "iconv -f UTF-32"),
        (gzip.compress(WORDS.encode(), mtime=0), "gzip", "gunzip"),
        (bz2.compress(WORDS.encode()), "bzip2", "bunzip2"),
        (lzma.compress(WORDS.encode()), "xz", "unxz"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "PDF", "pdftotext"),
        ("naïve".encode("latin-1"), "not UTF-8 at byte 2", "iconv -f LATIN1"),
        (WORDS.encode()[:9], "ends inside a character", "cut text between characters"),
        (b"a\xed\xa0\xbe", "not UTF-8 at byte 1", "save it as UTF-8"),
    ],
)
def test_what_is_not_utf8_is_named_with_its_cure(data, message, hint):
    with pytest.raises(TextError, match=message) as caught:
        decode_text(data, "notes.txt")
    assert caught.value.where == "notes.txt"
    assert hint in caught.value.hint
    with pytest.raises(ManifestError):
        decode_text(data, "expert.toml", ManifestError)


@pytest.mark.parametrize("half", ["\ud83e", "\udd8a", "\udd8a\ud83e"])
def test_half_a_character_in_memory_is_refused(half):
    with pytest.raises(TextError, match="half of a surrogate pair at character 4") as caught:
        check_text(f"The {half}", "prompt")
    assert caught.value.where == "prompt"


def test_a_byte_that_python_kept_of_an_argument_is_named():
    argument = b"na\xefve".decode(errors="surrogateescape")
    with pytest.raises(TextError, match=r"not UTF-8 at character 2 \(byte 0xef\)"):
        check_text(argument)


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.NdJson"])
def test_names_of_json_lines(name):
    assert has_json_lines(Path(name))


@pytest.mark.parametrize("name", ["a.json", "a.txt", "jsonl", "a.jsonl.txt"])
def test_other_names(name):
    assert not has_json_lines(Path(name))


def test_lines_end_where_json_says_and_nowhere_else():
    """Not at the separators that Python's `splitlines` knows, which JSON text may hold."""
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    for joined in ("\n".join(lines), "\r\n".join(lines) + "\r\n", "\n\n".join(lines)):
        found = list(parse_json_lines(joined.encode("utf-8-sig"), "t.jsonl", ["text"]))
        assert [record["text"] for record, _ in found] == texts


def test_files_that_were_joined_are_read_without_their_marks():
    one = '{"text": "a"}\n'.encode("utf-8-sig")
    assert [r["text"] for r, _ in parse_json_lines(one + one, "t.jsonl", ["text"])] == ["a", "a"]


@pytest.mark.parametrize("value", ["3", "null", '["a"]', '{"a": "b"}', "true"])
def test_a_field_of_another_type_is_not_made_text(value):
    data = b'{"prompt": "fine"}\n{"prompt": ' + value.encode() + b"}"
    with pytest.raises(TextError, match="expected a string") as caught:
        list(parse_json_lines(data, "p.jsonl", ["prompt"]))
    assert caught.value.where == "p.jsonl:2"


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a"}\n{"prompt": "b"}\n',
        '\ufeff\r\n{"prompt": "a"}',
        '[{"prompt": "a"}, {"prompt": "b"}]',
        '{\n  "id": 1,\n  "prompt": "a"\n}\n',
    ],
)
def test_json_in_a_text_file_is_not_read_with_its_braces(text):
    with pytest.raises(TextError, match="JSON with the field 'prompt'") as caught:
        parse_plain_text(text.encode(), "p.txt", ["prompt"])
    assert ".jsonl" in caught.value.hint


@pytest.mark.parametrize("text", ['{"name": "a"}', "{", "[1, 2]", "[]", "{x} + {y}", "[" * 5000])
def test_other_json_is_text_like_any_other(text):
    assert parse_plain_text(text.encode(), "p.txt", ["prompt"]) == text
