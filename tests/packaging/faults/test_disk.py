"""The model of a disk: what was not synced is at the mercy of the omen, and nothing else is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.faults.disk import (
    CUT,
    NAMES,
    STRICT,
    WHOLE,
    ZEROS,
    History,
    Omen,
    Snapshot,
    draw_omen,
)
from tests.support.faults.tracer import is_supported, run_traced

pytestmark = pytest.mark.skipif(
    not is_supported() and not os.environ.get("CI"), reason="needs ptrace: Linux on x86_64"
)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read(snapshot: Snapshot, root: Path) -> dict[str, bytes | None]:
    """Write a snapshot out and return what is there."""
    snapshot.write(root)
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


def after(root: Path, work: Callable[[], object], omen: Omen, out: Path) -> dict[str, bytes | None]:
    """Return what is on the disk after work and a power cut."""
    before, numbers = Snapshot.read(root)
    run = run_traced(work, root)
    assert run.code == 0, run.output
    history = History(before, numbers, run.operations)
    return read(history.image(history.n_operations, omen), out)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    return path


@pytest.mark.parametrize(
    ("omen", "found"),
    [(STRICT, None), (NAMES, b""), (ZEROS, b"\0\0\0\0"), (CUT, b"da"), (WHOLE, b"data")],
    ids=lambda value: getattr(value, "name", value),
)
def test_nothing_synced(root: Path, tmp_path: Path, omen: Omen, found: bytes | None) -> None:
    def work() -> None:
        (root / "x").write_bytes(b"data")

    left = after(root, work, omen, tmp_path / "out")
    assert left.get("x") == found
    assert left["old"] == b"old"


def test_data_synced_but_not_its_name(root: Path, tmp_path: Path) -> None:
    def work() -> None:
        (root / "x").write_bytes(b"data")
        sync(root / "x")

    assert "x" not in after(root, work, STRICT, tmp_path / "out")


def test_its_name_synced_but_not_data(root: Path, tmp_path: Path) -> None:
    def work() -> None:
        (root / "x").write_bytes(b"data")
        sync(root)

    assert after(root, work, STRICT, tmp_path / "out")["x"] == b""


def test_a_directory_that_is_not_durable_is_lost_with_all_in_it(root: Path, tmp_path: Path) -> None:
    def work() -> None:
        (root / "deep" / "er").mkdir(parents=True)
        (root / "deep" / "er" / "x").write_bytes(b"data")
        sync(root / "deep" / "er" / "x")
        sync(root / "deep" / "er")
        sync(root / "deep")

    assert after(root, work, STRICT, tmp_path / "out") == {"old": b"old"}


def test_a_rename_is_all_or_nothing(root: Path, tmp_path: Path) -> None:
    def work() -> None:
        (root / "new").write_bytes(b"new")
        sync(root / "new")
        sync(root)
        (root / "new").rename(root / "old")

    for omen in (STRICT, NAMES, *(draw_omen(seed) for seed in range(8))):
        left = after(root, work, omen, tmp_path / omen.name)
        assert left in ({"old": b"old", "new": b"new"}, {"old": b"new"})
        (root / "old").write_bytes(b"old")


def test_links_and_removals(root: Path, tmp_path: Path) -> None:
    def work() -> None:
        os.link(root / "old", root / "link")
        sync(root)
        (root / "old").unlink()

    assert after(root, work, STRICT, tmp_path / "out") == {"old": b"old", "link": b"old"}
    assert (tmp_path / "out" / "old").samefile(tmp_path / "out" / "link")


def test_what_was_written_over_a_synced_file_may_be_half_there(root: Path, tmp_path: Path) -> None:
    def work() -> None:
        with (root / "old").open("r+b") as file:
            file.seek(1)
            file.write(b"XYZ")

    assert after(root, work, STRICT, tmp_path / "1")["old"] == b"old"
    (root / "old").write_bytes(b"old")
    assert after(root, work, CUT, tmp_path / "2")["old"] == b"oXd"
