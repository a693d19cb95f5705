"""The one way to write: whole or not at all, under the right name, with nothing left over."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from composable.errors import DiskError, IntegrityError
from composable.files import atomic
from composable.files.cloning import place_file
from composable.interface import digest_bytes


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    atomic.write_bytes(path, b"one")
    atomic.write_text(path, "zwei ü")
    assert path.read_bytes() == "zwei ü".encode()
    assert names_in(path.parent) == ["file"]


def test_digest_and_size_while_writing(tmp_path: Path) -> None:
    with atomic.Sink(tmp_path / "file") as sink:
        for chunk in (b"a" * 10, b"", b"b" * 5):
            sink.write(chunk)
    assert sink.size == 15
    assert sink.digest == digest_bytes(b"a" * 10 + b"b" * 5)


def test_an_error_inside_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write_bytes(path, b"old")
    with pytest.raises(RuntimeError), atomic.Sink(path) as sink:
        sink.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [(b"abcd", 3, "more than"), (b"ab", 3, "only 2 of 3"), (b"abX", 3, "digest")],
)
def test_what_was_not_promised_is_not_kept(
    tmp_path: Path, data: bytes, size: int, message: str
) -> None:
    with (
        pytest.raises(IntegrityError, match=message),
        atomic.Sink(tmp_path / "file", digest=digest_bytes(b"abc"), size=size) as sink,
    ):
        sink.write(data)
    assert names_in(tmp_path) == []


def test_read_only_files(tmp_path: Path) -> None:
    with atomic.Sink(tmp_path / "file", is_read_only=True) as sink:
        sink.write(b"x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o444


def test_of_many_creators_exactly_one_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "name"
    barrier, created = threading.Barrier(16), []

    def create(owner: int) -> None:
        barrier.wait()
        if atomic.create_bytes(path, str(owner).encode()):
            created.append(owner)

    threads = [threading.Thread(target=create, args=(owner,)) for owner in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(path.read_text())] == created
    assert names_in(tmp_path) == ["name"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.ENOTSUP])
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    atomic.write_bytes(tmp_path / "source", b"data")
    place_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"data"
    with pytest.raises(FileExistsError):
        place_file(tmp_path / "source", tmp_path / "copy")
    assert atomic.create_bytes(tmp_path / "new", b"1")
    assert not atomic.create_bytes(tmp_path / "new", b"2")
    assert (tmp_path / "new").read_bytes() == b"1"


def test_links_share_bytes(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / "source", b"data")
    place_file(tmp_path / "source", tmp_path / "link")
    assert (tmp_path / "link").samefile(tmp_path / "source")


def test_a_directory_gets_its_name_once(tmp_path: Path) -> None:
    for number in (1, 2):
        scratch = atomic.make_scratch_directory(tmp_path)
        (scratch / "file").write_text(str(number))
        assert atomic.rename_directory(scratch, tmp_path / "final") == (number == 1)
    assert (tmp_path / "final" / "file").read_text() == "1"
    assert atomic.sweep(tmp_path, older_than_seconds=0) == 1
    assert names_in(tmp_path) == ["final"]


def test_sweep_leaves_what_is_young_or_not_ours(tmp_path: Path) -> None:
    young, old = (tmp_path / f".tmp-1-{digit * 16}" for digit in "01")
    theirs = tmp_path / ".tmp-notes"
    old.mkdir()
    for path in (young, theirs, tmp_path / "file", old / "inside"):
        path.write_text("")
    os.utime(old, (0, 0))
    os.utime(theirs, (0, 0))
    assert atomic.sweep(tmp_path) == 1
    assert names_in(tmp_path) == sorted([young.name, theirs.name, "file"])


def test_writing_sweeps_what_a_crash_left_beside(tmp_path: Path) -> None:
    left = tmp_path / f".tmp-1-{'0' * 16}"
    left.write_text("")
    os.utime(left, (0, 0))
    atomic.write_text(tmp_path / "file", "new")
    assert names_in(tmp_path) == ["file"]


def test_a_lock_that_cannot_be_had_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    def refuse(self: object, *_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with atomic.advisory_lock(tmp_path / "lock"):
        atomic.write_bytes(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_disk_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    atomic.write_bytes(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with (
        pytest.raises(DiskError, match="no space") as caught,
        atomic.Sink(path, is_read_only=True) as sink,
    ):
        sink.write(b"new")
    assert "free some space" in str(caught.value)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_killed_while_writing(tmp_path: Path) -> None:
    """Kill -9 between the bytes and the rename: the old content stays."""
    path = tmp_path / "file"
    atomic.write_bytes(path, b"old")
    script = f"""
        import os, signal, pathlib
        from composable.files import atomic
        sink = atomic.Sink(pathlib.Path({str(path)!r}))
        sink.write(b"new" * 100_000)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode < 0
    assert path.read_bytes() == b"old"
    assert atomic.sweep(tmp_path, older_than_seconds=0) == 1


@pytest.mark.parametrize("place", ["file", "pipe", "/dev/null", "/proc/nowhere"])
def test_where_no_folder_can_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DiskError, match=r"cannot be (created|written)"):
        atomic.write_bytes(tmp_path / place / "deeper" / "file", b"x")


def test_a_lock_is_only_advice(tmp_path: Path) -> None:
    (tmp_path / "locks").write_bytes(b"")
    with atomic.advisory_lock(tmp_path / "locks" / "one"):
        pass
