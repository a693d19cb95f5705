"""A second name for a file: a clone is a file of its own, a hard link is not."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from composable.errors import DiskError
from composable.files import cloning
from composable.files.cloning import place_file


@pytest.fixture
def cloning_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel clone files, by copying."""

    def ioctl(target: int, request: int, source: int) -> int:
        assert request == 0x4004_9409
        os.write(target, os.pread(source, os.fstat(source).st_size, 0))
        return 0

    monkeypatch.setattr(cloning, "_CANNOT_CLONE", set())
    monkeypatch.setattr(fcntl, "ioctl", ioctl)


def test_a_clone_is_a_file_of_its_own(tmp_path: Path, cloning_disk: None) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"text")
    place_file(source, target)
    assert target.read_bytes() == b"text"
    assert target.stat().st_mode & 0o777 == 0o444
    assert not target.samefile(source)
    target.chmod(0o644)
    with target.open("r+b") as file:
        file.write(b"TEXT")
    assert source.read_bytes() == b"text"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EXDEV])
def test_where_files_cannot_be_cloned_they_are_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    asked: list[int] = []

    def refuse(*_: object) -> None:
        asked.append(code)
        raise OSError(code, "no clones here")

    monkeypatch.setattr(cloning, "_CANNOT_CLONE", set())
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    (tmp_path / "source").write_bytes(b"text")
    for name in ("one", "two"):
        place_file(tmp_path / "source", tmp_path / name)
        assert (tmp_path / name).samefile(tmp_path / "source")
    assert len(asked) == (2 if code == errno.EXDEV else 1)  # asked once for each file system


def test_an_existing_file_is_kept(tmp_path: Path, cloning_disk: None) -> None:
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "target").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        place_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"old"


def test_what_is_no_regular_file_is_not_placed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DiskError, match="named pipe"):
        place_file(tmp_path / "pipe", tmp_path / "target")
    with pytest.raises(FileNotFoundError):
        place_file(tmp_path / "nothing", tmp_path / "target")
