"""The lock file: one spelling, strict reading."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composable.errors import LockError
from composable.packaging import Constraint, Lock, Version
from composable.packaging.install.lock import LockedExpert, LockedInterface
from composable.packaging.manifests.manifest import PackageFile

DIGEST = "sha256:" + "ab" * 32
FILE = PackageFile(name="body.safetensors", size=3568, digest=DIGEST)
GERMAN = LockedExpert(
    name="german",
    version=Version("1.2.0"),
    registry="local",
    manifest=DIGEST,
    interface=DIGEST,
    requires={"european": Constraint("^1"), "base": Constraint("*")},
    wanted_by=("composable.toml: ^1.2",),
    files=(FILE, PackageFile(name="README.md", size=0, digest=DIGEST)),
)
BASE = LockedExpert(
    name="base",
    version=Version("1.0.0-rc.1"),
    registry="other",
    manifest=DIGEST,
    interface=None,
    requires={},
    wanted_by=("german 1.2.0: *",),
    files=(FILE,),
)
LOCK = Lock(
    interface=LockedInterface(name="tiny-bytes", version=Version("1.0.0"), digest=DIGEST),
    registries={"other": "/srv/x", "local": "../registry"},
    experts=(GERMAN, BASE),
)


def test_one_spelling(tmp_path: Path) -> None:
    text = LOCK.to_toml()
    shuffled = Lock(
        interface=LOCK.interface,
        registries=dict(reversed(LOCK.registries.items())),
        experts=LOCK.experts[::-1],
    )
    assert shuffled.to_toml() == text
    assert Lock.loads(text).to_toml() == text
    assert list(Lock.loads(text).versions) == ["base", "german"]
    assert LOCK.write(tmp_path / "composable.lock")
    assert not LOCK.write(tmp_path / "composable.lock"), "the same bytes are not written again"
    assert Lock.read(tmp_path).to_toml() == text


def test_a_change_of_one_file_changes_one_line() -> None:
    import dataclasses

    changed = dataclasses.replace(FILE, size=4000)
    other = dataclasses.replace(
        LOCK, experts=(dataclasses.replace(GERMAN, files=(changed, GERMAN.files[1])), BASE)
    )
    one, two = LOCK.to_toml().splitlines(), other.to_toml().splitlines()
    assert len(one) == len(two)
    assert sum(a != b for a, b in zip(one, two, strict=True)) == 1


def test_looking_up() -> None:
    assert LOCK["german"] is GERMAN
    assert "base" in LOCK
    assert "french" not in LOCK
    assert LOCK.digests() == {DIGEST}
    with pytest.raises(KeyError):
        LOCK["french"]


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("schema = 1", "schema = 2", "schema"),
        ('name = "german"', 'name = "../german"', "expert[1].name"),
        ('name = "german"', 'name = "base"', "expert"),
        ('version = "1.2.0"', 'version = "1.2"', "expert[1].version"),
        ('registry = "other"', 'registry = "nowhere"', "expert[0].registry"),
        (f'manifest = "{DIGEST}"', 'manifest = "x"', "expert[0].manifest"),
        ('name = "README.md"', 'name = "../../README.md"', "expert[1].files[0].name"),
        ('name = "README.md"', 'name = "body.safetensors"', "expert[1].files"),
        ("size = 3568", "size = -1", "expert[0].files[0].size"),
        ("wanted-by", "wantedby", "expert[0].wantedby"),
        ('european = "^1"', 'european = "?"', "expert[1].requires.european"),
    ],
)
def test_errors_say_where(old: str, new: str, where: str) -> None:
    text = LOCK.to_toml()
    assert old in text
    with pytest.raises(LockError) as caught:
        Lock.loads(text.replace(old, new, 1))
    assert caught.value.where == f"composable.lock: {where}"


def test_no_lock(tmp_path: Path) -> None:
    with pytest.raises(LockError, match="no lock file"):
        Lock.read(tmp_path)
    (tmp_path / "composable.lock").write_bytes(b"\xff\xff")
    with pytest.raises(LockError, match="not UTF-8 text"):
        Lock.read(tmp_path)


@given(st.text(max_size=40), st.integers(0, 1500), st.integers(0, 30))
def test_damage_raises_only_our_error(insert: str, at: int, cut: int) -> None:
    text = LOCK.to_toml()
    with contextlib.suppress(LockError):
        Lock.loads(text[:at] + insert + text[at + cut :])
