"""The feed of advisories: what it takes, what it refuses, and that nothing in it is lost."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composable.errors import ComposableError, RegistryError, UnknownExpertError, UnreachableError
from composable.interface import RouterInterface
from composable.packaging import Constraint, Registry, Version, open_registry
from composable.packaging.registry.advisories import Advisory, Kind, compile_feed, parse_feed
from composable.packaging.registry.cache import CachedStorage
from composable.packaging.registry.lines import format_document, format_line, parse_line
from composable.packaging.registry.storage import Document, Folder

DIGEST = "sha256:" + "1" * 64
FEED = "advisories.jsonl"


def make_advisory(id_: str = "german-1", name: str = "german", **fields: Any) -> Advisory:
    known: dict[str, Any] = {
        "kind": "recalled",
        "affected": (Constraint("<1.1"),),
        "text": "It is wrong.",
        "published": "2026-11-24T12:00:00Z",
    }
    return Advisory(id=id_, name=name, **{**known, **fields})


@pytest.fixture
def published(
    registry: Registry, make_expert: Callable[..., Path], interface: RouterInterface
) -> Registry:
    for version in ("1.0.0", "1.1.0", "2.0.0-rc.1"):
        registry.publish(make_expert("german", version), interface=interface)
    return registry


def test_a_registry_has_no_feed_until_it_has_an_advisory(published: Registry) -> None:
    assert published.advisories() is None
    first = make_advisory(fixed=(Version("1.1.0"),), digests=(DIGEST,))
    second = make_advisory("german-2", kind="poisoned", affected=(Constraint("^1"),))
    published.advise(first)
    published.advise(second)
    published.advise(first)
    assert open_registry(published.location).advisories() == (first, second)
    withdrawn = dataclasses.replace(first, is_withdrawn=True)
    published.advise(withdrawn)
    assert published.advisories() == (withdrawn, second)
    assert not withdrawn.affects("german", Version("1.0.0"), [DIGEST])


@pytest.mark.parametrize(
    ("ranges", "affected"),
    [
        (["<1.1.0"], ["1.0.0", "1.1.0-rc.1"]),
        (["*"], ["1.0.0", "1.1.0-rc.1", "1.1.0", "2.0.0"]),
        (["=1.0.0", ">=2"], ["1.0.0", "2.0.0"]),
        ([], []),
    ],
)
def test_ranges_count_prereleases(ranges: list[str], affected: list[str]) -> None:
    advisory = make_advisory(affected=tuple(map(Constraint, ranges)), digests=(DIGEST,))
    versions = ["1.0.0", "1.1.0-rc.1", "1.1.0", "2.0.0"]
    found = [text for text in versions if advisory.affects("german", Version(text), ())]
    assert found == affected
    assert not advisory.affects("french", Version("1.0.0"), ())
    assert advisory.affects("french", Version("9.0.0"), ["sha256:0", DIGEST])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "germn"}, "did you mean 'german'"),
        ({"affected": (Constraint("^7"),)}, "no release german"),
        ({"fixed": (Version("1.5.0"),)}, "it is not published"),
        ({"fixed": (Version("1.0.0"),)}, "it is affected itself"),
        ({"affected": ()}, "affects nothing"),
        ({"text": " "}, "says nothing"),
        ({"text": "x" * 2001}, "at most 2,000"),
        ({"id_": "German 1"}, "does not name an advisory"),
        ({"published": "today"}, "is not a time"),
    ],
)
def test_an_advisory_that_is_not_published(
    published: Registry, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises((RegistryError, UnknownExpertError)) as caught:
        published.advise(make_advisory(**fields))
    assert said in str(caught.value)
    assert published.advisories() is None


def test_an_id_keeps_its_package(
    published: Registry, make_expert: Callable[..., Path], interface: RouterInterface
) -> None:
    published.publish(make_expert("french"), interface=interface)
    published.advise(make_advisory())
    with pytest.raises(RegistryError, match="'german-1' is about 'german'"):
        published.advise(make_advisory(name="french"))


def test_publishers_at_once_lose_nothing(published: Registry) -> None:
    ids = [f"german-{number}" for number in range(8)]
    threads = [
        threading.Thread(target=lambda id_=id_: published.advise(make_advisory(id_))) for id_ in ids
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(advisory.id for advisory in published.advisories() or ()) == ids


def test_lines_of_others_keep_their_fields() -> None:
    """A later version signs lines; this one does not read signatures, and does not drop them."""
    signed = {**make_advisory().to_row(), "signature": {"keyid": "1", "sig": "2"}}
    document = Document(format_document([signed]), None)
    assert parse_feed(document, FEED) == (make_advisory(),)
    again = Document(compile_feed(make_advisory("german-2"), document), None)
    first = parse_line(again.data.splitlines()[0], FEED)
    assert first["signature"] == signed["signature"]
    changed = compile_feed(make_advisory(text="Something else."), document)
    assert b"signature" not in changed, "what was signed has changed"


THREE = [make_advisory(f"german-{number}").to_row() for number in range(3)]
HOSTILE: dict[str, Any] = {
    "another kind": {"kind": "boring"},
    "no text": {"text": 3},
    "a long text": {"text": "x" * 5000},
    "no version": {"fixed": ["newest"]},
    "no range": {"affected": ["everything"]},
    "no digest": {"digests": ["md5:1"]},
    "a path": {"name": "../german"},
    "many ranges": {"affected": ["1.0.0"] * 65},
    "many digests": {"digests": [DIGEST] * 300},
    "a table": {"affected": {"german": "*"}},
    "nothing affected": {"affected": [], "digests": []},
    "not withdrawn or not": {"withdrawn": "no"},
    "no id": {"id": "\x1b[2J"},
    "no time": {"published": "9999-99-99T00:00:00Z"},
    "a missing field": {"fixed": None},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_line_is_its_own_error(published: Registry, case: str) -> None:
    row = {**make_advisory().to_row(), **HOSTILE[case]}
    row = {field: value for field, value in row.items() if value is not None}
    path = published.storage.root / FEED
    path.write_bytes(format_document([row]))
    with pytest.raises(RegistryError) as caught:
        published.advisories()
    assert f"{FEED}:1" in str(caught.value.where)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        b"[]\n",
        b'{"id":"german-1"}\n',
        format_line(make_advisory().to_row())[:-5],
        format_document([make_advisory().to_row()] * 2),
        b"\n".join(format_document(THREE).split(b"\n")[:2]),
        b'{"a":' * 100_000,
        b" " * (2 << 20),
    ],
    ids=["empty", "page", "list", "no checksum", "cut", "twice", "lost lines", "deep", "long"],
)
def test_a_damaged_feed_is_its_own_error(published: Registry, data: bytes) -> None:
    (published.storage.root / FEED).write_bytes(data)
    with pytest.raises(RegistryError) as caught:
        published.advisories()
    assert FEED in str(caught.value.where)


class Remote(Folder):
    """A folder that is read like a remote registry."""

    is_remote = True


def test_an_old_feed_is_noticed(published: Registry, tmp_path: Path) -> None:
    published.advise(make_advisory())
    old = (published.storage.root / FEED).read_bytes()
    published.advise(make_advisory("german-2"))
    storage = CachedStorage(Remote(published.storage.root), tmp_path / "cache")
    assert len(Registry(storage).advisories() or ()) == 2
    (published.storage.root / FEED).write_bytes(old)
    with pytest.raises(UnreachableError, match="no longer lists german-2"):
        Registry(storage).advisories()
    offline = CachedStorage(Remote(tmp_path / "nothing"), tmp_path / "cache", is_offline=True)
    with pytest.raises(UnreachableError, match="--offline is set"):
        Registry(offline).advisories()


def test_mutated_feeds_raise_only_deliberate_errors(published: Registry) -> None:
    """Every byte of a feed, changed: an error that says so, or the same advisories."""
    published.advise(make_advisory(fixed=(Version("1.1.0"),)))
    path = published.storage.root / FEED
    good = path.read_bytes()
    expected = published.advisories()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            assert published.advisories() == expected, place
        except ComposableError as error:
            assert FEED in str(error.where)


def test_kinds_are_spelled_alike() -> None:
    kinds: list[Kind] = ["recalled", "poisoned", "licence-withdrawn"]
    for kind in kinds:
        row = json.loads(json.dumps(make_advisory(kind=kind).to_row()))
        assert Advisory.from_row(row, FEED).kind == kind
