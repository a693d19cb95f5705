"""The cache of remote documents: damage to it, and damage on the way, cost one more request."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from composable.errors import UnreachableError
from composable.interface.digest import digest_bytes
from composable.packaging.registry.cache import CachedStorage
from composable.packaging.registry.lines import format_document, format_line
from composable.packaging.registry.storage import Document

OLD = format_document([{"name": "german", "version": f"1.{minor}.0"} for minor in range(3)])
NEW = format_document([{"name": "german", "version": f"1.{minor}.0"} for minor in range(4)])
INDEX = "index/ge/german.jsonl"


@dataclasses.dataclass
class Server:
    """A storage in memory that answers as a web server does, with entity tags."""

    files: dict[str, bytes]
    asked: list[str | None] = dataclasses.field(default_factory=list)
    answers: list[bytes] = dataclasses.field(default_factory=list)
    location: str = "https://example.org/r"
    is_remote: bool = True

    def read(self, path: str, known: Document | None = None) -> Document | None:
        self.asked.append(known.tag if known else None)
        data = self.files.get(path)
        if data is None:
            return None
        tag = digest_bytes(data)
        if known is not None and known.tag == tag:
            return known
        return Document(self.answers.pop(0) if self.answers else data, tag)

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        yield self.files[path][start:]


@pytest.fixture
def server() -> Server:
    return Server({INDEX: OLD, "config.json": b'{"schema": 1}'})


@pytest.fixture
def cache(server: Server, tmp_path: Path) -> CachedStorage:
    return CachedStorage(server, tmp_path)


def read(storage: CachedStorage, path: str = INDEX) -> bytes:
    document = storage.read(path)
    assert document is not None
    return document.data


def test_an_unchanged_document_is_not_sent_again(cache: CachedStorage, server: Server) -> None:
    assert read(cache) == read(cache) == OLD
    assert server.asked == [None, digest_bytes(OLD)]
    server.files[INDEX] = NEW
    assert read(cache) == read(cache) == NEW


def lose_last_line(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize("path", [INDEX, "config.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lose_last_line,
        lambda data: data[:-9],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: b"",
        lambda data: data + b"\n",
    ],
)
def test_a_damaged_entry_is_fetched_again(
    cache: CachedStorage,
    server: Server,
    tmp_path: Path,
    path: str,
    damage: Callable[[bytes], bytes],
) -> None:
    whole = read(cache, path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert read(cache, path) == whole
    assert server.asked == [None, None]
    assert read(CachedStorage(server, tmp_path, is_offline=True), path) == whole


def test_an_entry_of_another_document_is_not_used(cache: CachedStorage, tmp_path: Path) -> None:
    read(cache, "config.json")
    (config,) = tmp_path.iterdir()
    read(cache)
    (index,) = set(tmp_path.iterdir()) - {config}
    index.write_bytes(config.read_bytes())
    assert read(cache) == OLD


@pytest.mark.parametrize("cut", [lose_last_line(NEW), NEW[:-3], b"", NEW[:100]])
def test_what_arrives_truncated_is_requested_again(
    cache: CachedStorage, server: Server, tmp_path: Path, cut: bytes
) -> None:
    read(cache)
    server.files[INDEX] = NEW
    server.answers = [cut]
    assert read(cache) == NEW
    newest = format_document([{"name": "german", "version": f"1.{i}.0"} for i in range(5)])
    server.files[INDEX] = newest
    server.answers = [cut, cut]
    with pytest.raises(UnreachableError, match="twice in a row"):
        read(cache)
    offline = CachedStorage(server, tmp_path, is_offline=True)
    assert read(offline) == NEW, "what is damaged takes no good document's place"
    assert read(cache) == newest


def test_entries_without_a_digest_are_older(
    cache: CachedStorage, server: Server, tmp_path: Path
) -> None:
    read(cache)
    (entry,) = tmp_path.iterdir()
    head, _, data = entry.read_bytes().partition(b"\n")
    fields = json.loads(head)
    del fields["digest"]
    entry.write_bytes(json.dumps(fields).encode() + b"\n" + data)
    assert read(CachedStorage(server, tmp_path, is_offline=True)) == OLD
    assert read(cache) == read(cache) == OLD
    assert server.asked == [None, None, digest_bytes(OLD)]


CATALOG = "catalog.jsonl"
UNMARKED = b"".join(
    format_line({"name": "german", "version": f"1.{minor}.0"}) + b"\n" for minor in range(2)
)
NAMES = [{"name": name, "version": "1.0.0"} for name in ("french", "german")]


@pytest.mark.parametrize(
    ("path", "before", "after", "lost"),
    [
        (INDEX, NEW, OLD, "german 1.3.0"),
        (INDEX, OLD, format_document([{"name": "german", "version": "2.0.0"}]), "and 2 more"),
        # Of before 0.3, without a length of its own: cut, with a length in the answer that fits.
        (INDEX, UNMARKED, UNMARKED.splitlines(keepends=True)[0], "german 1.1.0"),
        (CATALOG, format_document(NAMES), format_document(NAMES[:1]), "german"),
    ],
)
def test_a_document_never_goes_back_to_an_older_state(
    cache: CachedStorage, server: Server, path: str, before: bytes, after: bytes, lost: str
) -> None:
    server.files[path] = before
    read(cache, path)
    server.files[path] = after
    with pytest.raises(UnreachableError, match=r"no longer lists") as caught:
        read(cache, path)
    assert lost in caught.value.message
    server.files[path] = before  # a copy that was behind has caught up
    assert read(cache, path) == before
    server.files[path] = after  # removed on purpose: the hint cures it
    assert "removed on purpose" in str(caught.value.hint)
    Path(str(caught.value.hint).rpartition("rm ")[2]).unlink()
    assert read(cache, path) == after


def test_an_answer_that_is_behind_is_asked_for_again(cache: CachedStorage, server: Server) -> None:
    read(cache)
    server.files[INDEX], server.answers = NEW, [OLD[: len(OLD) // 2], NEW]
    assert read(cache) == NEW
    newest = format_document([{"name": "german", "version": f"1.{i}.0"} for i in range(5)])
    server.files[INDEX], server.answers = newest, [OLD]
    assert read(cache) == newest
    newer = format_document([{"name": "french", "version": "1.1.0"}, *NAMES[1:]])
    server.files[CATALOG] = format_document(NAMES)
    read(cache, CATALOG)
    server.files[CATALOG] = newer
    assert read(cache, CATALOG) == newer, "the newest version of a package may be another"
