"""Documents: how text comes in, how it is held out, and how held-out text is spliced.

A document is the unit of everything that is measured: the split into training and held-out text is
by document and never inside one, and the router's track record starts afresh with each.

Deliberately not here: tokens, batches and order (`data.py`), and where text comes from
(`recipe.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from composable.errors import TextError
from composable.files.reading import read_bytes
from composable.files.text import has_json_lines, parse_json_lines, parse_plain_text

# A UTF-8 character is at most this many bytes, so a cut moves by at most one less.
_CHARACTER_BYTES = 4
# Text is read whole; a larger file should be split.
MAX_TEXT_BYTES = 4 << 30


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        id: What the document is called; the split into training and held-out text depends on it.
        text: The text, not empty, without NUL (byte 0 is reserved as begin-of-document).
    """

    id: str
    text: str


class Segment(NamedTuple):
    """A half-open range of bytes of a spliced text, and the domain it was cut from."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Spliced:
    """A text put together from pieces of several domains.

    Args:
        text: The text as UTF-8.
        segments: Which bytes came from which domain, in order and without gaps.
    """

    text: bytes
    segments: tuple[Segment, ...]


def read_documents(paths: Iterable[str | Path]) -> list[Document]:
    """Read the documents of files and folders.

    A `.jsonl` or `.ndjson` file holds one document per line, an object with the fields `id` and
    `text`. Any other file is one document, named by its file name. A folder is read recursively in
    sorted order, without hidden files; its documents are named by their path from the folder's own
    name.

    Args:
        paths: Files and folders.

    Returns:
        The documents, in the order of `paths`.

    Raises:
        TextError: A path that is missing, a file that is not UTF-8, a line that is not such an
            object, such lines in a file of another name, a text that is empty or holds a NUL byte,
            an id that occurs twice, or no document at all. The error's `where` is the file and
            the line.
    """
    documents: dict[str, Document] = {}
    for path in map(Path, paths):
        for document, where in _read_path(path):
            if document.id in documents:
                raise TextError(
                    f"the document id {document.id!r} occurs twice",
                    where=where,
                    hint="held-out documents are chosen by id; rename one of the two",
                )
            documents[document.id] = document
    if not documents:
        raise TextError("no documents in " + (", ".join(map(str, paths)) or "an empty list"))
    return list(documents.values())


def write_documents(path: str | Path, documents: Iterable[Document]) -> None:
    """Write documents as JSON lines; the same documents always give the same bytes.

    Args:
        path: The `.jsonl` file; its folder is made if it is missing.
        documents: What to write, in this order.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n"
        for document in documents
    )
    path.write_bytes("".join(lines).encode())


def truncate_utf8(data: bytes, max_bytes: int) -> bytes:
    """Return the start of UTF-8 text, at most `max_bytes` long, with no character split.

    Example:
        >>> truncate_utf8("naïve".encode(), 3)
        b'na'
    """
    return data[:max_bytes].decode(errors="ignore").encode()


def split_documents(
    documents: Sequence[Document],
    heldout_fraction: float,
    salt: str = "",
    families: Mapping[str, str] | None = None,
) -> tuple[list[Document], list[Document]]:
    """Split documents into training and held-out text by the SHA-256 of their names.

    A document's side depends on its own name (or its family's) alone, so adding documents moves
    none. The one exception keeps both sides in use: where the hashes would leave a side empty,
    the name nearest to the threshold crosses it.

    Args:
        documents: What to split, in any order.
        heldout_fraction: Expected share of names to hold out, between 0 and 1.
        salt: Hashed with each name; another salt is another split.
        families: Document id to family name. A family stays whole, on one side. A document that
            is not listed is a family of its own, named by its id.

    Returns:
        The training documents and the held-out documents, each in the order given. With at
        least two families, neither is empty.

    Raises:
        TextError: `heldout_fraction` is not between 0 and 1.
    """
    if not 0 < heldout_fraction < 1:
        raise TextError(f"heldout_fraction is {heldout_fraction}, expected between 0 and 1")
    families = families or {}
    family_of = {document.id: families.get(document.id, document.id) for document in documents}
    ranked = sorted((hash_fraction(name, salt), name) for name in set(family_of.values()))
    n_heldout = sum(place < heldout_fraction for place, _ in ranked)
    if len(ranked) >= 2:
        n_heldout = min(max(n_heldout, 1), len(ranked) - 1)
    heldout = {name for _, name in ranked[:n_heldout]}
    return (
        [document for document in documents if family_of[document.id] not in heldout],
        [document for document in documents if family_of[document.id] in heldout],
    )


def hash_fraction(name: str, salt: str = "") -> float:
    """Return a fixed number in [0, 1) for `name`, uniform over names, from its SHA-256.

    Args:
        name: What to hash.
        salt: Hashed before it; each salt is an independent draw.
    """
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    # 53 bits, so that the quotient is exact in a float and stays below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def splice_documents(
    groups: Mapping[str, Sequence[Document]],
    n: int,
    seed: int,
    min_bytes: int,
    max_bytes: int,
    segments: int,
) -> list[Spliced]:
    """Make texts that switch domain midway, to measure how fast a router follows.

    Each segment is a random stretch of a random document of a random domain, never the domain of
    the segment before it. Stretches begin and end between characters.

    Args:
        groups: Domain name to its documents; use held-out documents. At least two domains.
        n: How many texts to make.
        seed: Seed of the draws; the same arguments give the same texts.
        min_bytes: Least length of a segment.
        max_bytes: Greatest length of a segment, at least `min_bytes` + 3.
        segments: Segments per text.

    Returns:
        `n` texts with their segments.

    Raises:
        TextError: Fewer than two domains, lengths out of range, or a domain without a document
            that is long enough.
    """
    if len(groups) < 2:
        raise TextError(f"splicing needs two domains, got {sorted(groups)}")
    shortest = min_bytes + _CHARACTER_BYTES - 1
    if min_bytes < 1 or segments < 1 or max_bytes < shortest:
        raise TextError(
            f"cannot splice {segments} segments of {min_bytes} to {max_bytes} bytes, expected"
            " at least 1 segment, at least 1 byte, and max_bytes at least min_bytes + 3"
        )
    pools = {
        name: [data for doc in documents if len(data := doc.text.encode()) >= shortest]
        for name, documents in groups.items()
    }
    for name, pool in pools.items():
        if not pool:
            raise TextError(f"no document of {shortest} bytes or more", where=f"groups.{name}")
    rng = np.random.default_rng(seed)
    return [_splice(pools, rng, (shortest, max_bytes), segments) for _ in range(n)]


def _splice(
    pools: Mapping[str, Sequence[bytes]],
    rng: np.random.Generator,
    length_range: tuple[int, int],
    n_segments: int,
) -> Spliced:
    """Draw one spliced text."""
    text, segments, last = b"", list[Segment](), ""
    for _ in range(n_segments):
        names = [name for name in pools if name != last]
        last = names[int(rng.integers(len(names)))]
        data = pools[last][int(rng.integers(len(pools[last])))]
        shortest, longest = length_range
        length = int(rng.integers(shortest, min(longest, len(data)) + 1))
        start = _character_start(data, int(rng.integers(len(data) - length + 1)))
        piece = data[start : _character_start(data, start + length)]
        segments.append(Segment(last, len(text), len(text) + len(piece)))
        text += piece
    return Spliced(text, tuple(segments))


def _character_start(data: bytes, at: int) -> int:
    """Return the last place not after `at` where a UTF-8 character starts (or the data ends)."""
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _read_path(path: Path) -> Iterator[tuple[Document, str]]:
    """Yield each document under `path` with the place it came from."""
    if path.is_dir():
        root = path.resolve()
        for file in sorted(path.rglob("*")):
            inner = file.relative_to(path)
            if not file.is_dir() and not any(part.startswith(".") for part in inner.parts):
                yield from _read_file(file, f"{root.name}/{inner.as_posix()}")
    else:
        yield from _read_file(path, path.name)


def _read_file(path: Path, name: str) -> Iterator[tuple[Document, str]]:
    """Yield the documents of one file; `name` is the id if the whole file is one document."""
    try:
        data = read_bytes(path, MAX_TEXT_BYTES)
    except FileNotFoundError as error:
        raise TextError("no such file or folder", where=str(path)) from error
    if not has_json_lines(path):
        text = parse_plain_text(data, str(path), ("id", "text"))
        yield Document(name, _checked_text(text, str(path))), str(path)
        return
    for record, where in parse_json_lines(data, str(path), ("id", "text")):
        if not record["id"]:
            raise TextError("the id is empty", where=where)
        yield Document(record["id"], _checked_text(record["text"], where)), where


def _checked_text(text: str, where: str) -> str:
    """Return `text` if it can be a document."""
    if not text.strip():
        raise TextError("the text is empty", where=where)
    if "\0" in text:
        raise TextError(
            f"a NUL byte at character {text.index(chr(0))}",
            where=where,
            hint="byte 0 is reserved as begin-of-document; remove it from the text",
        )
    return text
