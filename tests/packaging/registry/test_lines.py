"""Documents of lines: whatever is lost or changed is noticed, and older documents are read."""

from __future__ import annotations

import pytest

from composable.errors import RegistryError
from composable.packaging.registry.lines import (
    MAX_LINE_BYTES,
    check_document,
    check_extent,
    format_document,
    format_line,
    parse_line,
)
from composable.packaging.registry.storage import Document

ROWS = [{"name": "german", "version": f"1.{minor}.0"} for minor in range(4)]
PATH = "index/ge/german.jsonl"


def without_extent(rows: list[dict[str, str]]) -> bytes:
    """Return a document as versions before 0.3 wrote it."""
    return b"".join(format_line(row) + b"\n" for row in rows)


def test_a_document_is_read_as_it_was_written() -> None:
    data = format_document(ROWS)
    check_document(PATH, Document(data, None), "x")
    found = [parse_line(line, "x") for line in data.splitlines()]
    assert [{key: row[key] for key in ("name", "version")} for row in found] == ROWS
    assert format_document([]) == b""


@pytest.mark.parametrize("n_rows", [1, 2, 4])
def test_every_cut_is_noticed(n_rows: int) -> None:
    data = format_document(ROWS[:n_rows])
    for size in range(len(data) - 1):  # the last newline carries nothing
        with pytest.raises(RegistryError):
            check_document(PATH, Document(data[:size], None), "x")


def test_every_flipped_bit_is_noticed() -> None:
    data = format_document(ROWS[:2])
    for index in range(len(data) - 1):
        damaged = data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :]
        with pytest.raises(RegistryError):
            check_document(PATH, Document(damaged, None), "x")


def test_lines_that_are_lost_added_or_of_another_state_are_noticed() -> None:
    lines = format_document(ROWS).splitlines(keepends=True)
    other = format_document([*ROWS[:2], {"name": "german", "version": "9.0.0"}, ROWS[3]])
    states = [lines[:index] + lines[index + 1 :] for index in range(4)]
    states += [[*lines, lines[3]], [lines[1], lines[0], *lines[2:]], [lines[0], lines[2]]]
    states += [[*lines[:2], other.splitlines(keepends=True)[2], lines[3]]]
    for state in states:
        with pytest.raises(RegistryError, match="damaged"):
            check_extent(Document(b"".join(state), None), "x")


def test_older_documents_are_read_if_the_response_states_its_length() -> None:
    data = without_extent(ROWS)
    check_document(PATH, Document(data, None), "x")
    with pytest.raises(RegistryError, match="may be truncated"):
        check_document(PATH, Document(data, None, is_length_known=False), "x")
    check_document(PATH, Document(format_document(ROWS), None, is_length_known=False), "x")


def test_other_documents_are_json() -> None:
    check_document("config.json", Document(b'{"schema": 1}', None), "x")
    for data in (b"", b'{"schema"', b"[" * 100_000, b"\xff"):
        with pytest.raises(RegistryError, match="damaged"):
            check_document("config.json", Document(data, None), "x")


def test_a_line_is_bounded() -> None:
    with pytest.raises(RegistryError, match="expected at most"):
        parse_line(b" " * (MAX_LINE_BYTES + 1), "x")


@pytest.mark.parametrize("extent", [3, None, [], {}, {"lines": "1"}, {"lines": 1, "rest": 5}])
def test_a_malformed_extent_is_damage(extent: object) -> None:
    with pytest.raises(RegistryError, match=r"damaged|truncated"):
        line = format_line({"name": "german", "whole": extent})
        check_extent(Document(line + b"\n", None, is_length_known=False), "x")
