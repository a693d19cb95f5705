"""The store: only what was promised, found when damaged, pruned with care."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest

from composable.errors import IntegrityError
from composable.interface import digest_bytes
from composable.packaging import Store

DATA = random.Random(0).randbytes(5000)
DIGEST = digest_bytes(DATA)


def test_add_from_bytes_streams_and_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    for number, source in enumerate((DATA, io.BytesIO(DATA), tmp_path / "file")):
        store = Store(tmp_path / f"store{number}")
        assert not store.has(DIGEST)
        path = store.add(source, DIGEST, len(DATA))
        assert path == store.path(DIGEST)
        assert path.read_bytes() == DATA
        assert path.stat().st_mode & 0o777 == 0o444
        assert store.has(DIGEST)
        assert store.has(DIGEST, len(DATA))
        assert not store.has(DIGEST, 1)
        assert store.digests() == [DIGEST]
        assert store.size() == len(DATA)


def test_adding_twice_writes_once(store: Store) -> None:
    path = store.add(DATA, DIGEST)
    before = path.stat()
    store.add(b"whatever", DIGEST)  # it is there: nothing is read, nothing is written
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_cut_at_every_interesting_byte(store: Store) -> None:
    for length in (0, 1, 2, 511, 512, 4095, 4096, len(DATA) - 1):
        with pytest.raises(IntegrityError, match="only"):
            store.add(DATA[:length], DIGEST, len(DATA))
        with pytest.raises(IntegrityError, match="digest"):
            store.add(DATA[:length], DIGEST)
    with pytest.raises(IntegrityError, match="more than"):
        store.add(DATA + b"x", DIGEST, len(DATA))
    assert store.digests() == []
    assert not any(store.root.rglob(".tmp-*"))


def test_every_flipped_bit_is_noticed(store: Store) -> None:
    rng = random.Random(1)
    for _ in range(300):
        flipped = bytearray(DATA)
        position = rng.randrange(len(DATA) * 8)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(IntegrityError, match="digest"):
            store.add(bytes(flipped), DIGEST, len(DATA))
    assert store.digests() == []


def test_an_error_of_the_source_keeps_nothing(store: Store) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        store.add(Broken(), DIGEST)
    assert store.digests() == []


@pytest.mark.parametrize("digest", ["", "abc", "sha256:" + "A" * 64, "sha256:../" + "0" * 61])
def test_what_is_no_digest(store: Store, digest: str) -> None:
    for call in (store.path, store.has):
        with pytest.raises(IntegrityError, match="not a digest"):
            call(digest)


def test_verify_names_and_quarantines(store: Store) -> None:
    good = digest_bytes(b"good")
    store.add(b"good", good)
    path = store.add(DATA, DIGEST)
    path.chmod(0o644)
    path.write_bytes(DATA[:-1] + b"!")
    seen: list[tuple[str, int, int]] = []
    corrupt = store.verify(lambda *event: seen.append(event))
    assert [blob.digest for blob in corrupt] == [DIGEST]
    assert corrupt[0].found == digest_bytes(DATA[:-1] + b"!")
    assert corrupt[0].quarantine.read_bytes()[-1:] == b"!"
    assert store.digests() == [good]
    assert seen[-1] == ("verify", 2, 2)
    store.add(DATA, DIGEST)
    assert store.verify() == []


def test_prune(store: Store) -> None:
    kept, young, old = digest_bytes(b"kept"), digest_bytes(b"young"), digest_bytes(b"old")
    for data, digest in ((b"kept", kept), (b"young", young), (b"old", old)):
        path = store.add(data, digest)
        if data != b"young":
            os.utime(path, (0, 0))
    pruned = store.prune([kept])
    assert pruned.digests == (old,)
    assert pruned.bytes_freed == 3
    assert set(store.digests()) == {kept, young}
    assert store.prune([kept], older_than_seconds=-1).digests == (young,)


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSABLE_STORE", str(tmp_path / "named"))
    assert Store().root == tmp_path / "named"
    assert Store(tmp_path / "given").root == tmp_path / "given"
    monkeypatch.delenv("COMPOSABLE_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Store().root.name == "store"
