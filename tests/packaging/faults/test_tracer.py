"""The tracer sees what the kernel does, and can stop, tear and fail it."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.support.faults.processes import CRASHED, acknowledge
from tests.support.faults.tracer import Fail, Fate, Kind, NotModelledError, Operation, run_traced


def work(root: Path) -> None:
    """Change files in all the ways that are modelled."""
    (root / "a").mkdir()
    with (root / "a" / "x").open("wb") as file:
        file.write(b"one")
        file.flush()
        os.fsync(file.fileno())
        file.write(b"two")
    with (root / "a" / "x").open("ab") as file:
        file.write(b"three")
    (root / "a" / "x").rename(root / "b")
    shutil.copyfile(root / "b", root / "c")  # by sendfile or copy_file_range, not by write
    os.link(root / "c", root / "d")
    acknowledge("linked")
    (root / "d").chmod(0o444)
    os.truncate(root / "c", 4)
    thread = threading.Thread(target=(root / "thread").write_text, args=("from a thread",))
    thread.start()
    thread.join()
    shutil.rmtree(root / "a")
    (root / "b").unlink()
    Path("/dev/null").write_text("elsewhere")


SEEN = [
    (Kind.MKDIR, "a", b""),
    (Kind.CREATE, "a/x", b""),
    (Kind.WRITE, "a/x", b"one"),
    (Kind.SYNC, "a/x", b""),
    (Kind.WRITE, "a/x", b"two"),
    (Kind.OPEN, "a/x", b""),
    (Kind.WRITE, "a/x", b"three"),
    (Kind.RENAME, "a/x", b""),
    (Kind.CREATE, "c", b""),
    (Kind.WRITE, "c", b"onetwothree"),
    (Kind.LINK, "c", b""),
    (Kind.ACKNOWLEDGE, "linked", b""),
    (Kind.CHMOD, "d", b""),
    (Kind.TRUNCATE, "c", b""),
    (Kind.CREATE, "thread", b""),
    (Kind.WRITE, "thread", b"from a thread"),
    (Kind.RMDIR, "a", b""),
    (Kind.UNLINK, "b", b""),
]


def test_all_changes_are_seen_with_their_data(tmp_path: Path) -> None:
    run = run_traced(lambda: work(tmp_path), tmp_path)
    assert run.code == 0, run.output
    changes = [op for op in run.operations if op.kind is not Kind.WRITE or op.data]
    assert [(op.kind, op.path, op.data) for op in changes] == SEEN
    assert [op.offset for op in changes if op.kind is Kind.WRITE][:3] == [0, 3, 6]
    assert run.acknowledged == 1


@pytest.mark.parametrize("fate", [Fate.KILL_BEFORE, Fate.KILL_AFTER])
def test_killed_at_every_operation(tmp_path: Path, fate: Fate) -> None:
    for number in range(1, len(SEEN)):
        root = tmp_path / f"{number}"
        root.mkdir()
        left = number

        def decide(operation: Operation) -> Fate:
            nonlocal left
            left -= 1
            return fate if left == 0 else Fate.PASS

        run = run_traced(lambda root=root: work(root), root, decide)
        assert run.was_killed
        done = sum(operation.kind is not Kind.ACKNOWLEDGE for operation in run.operations)
        assert done == (number if fate is Fate.KILL_AFTER else number - 1)


def test_torn_writes(tmp_path: Path) -> None:
    def decide(operation: Operation) -> Fate:
        return Fate.TEAR if operation.kind is Kind.WRITE else Fate.PASS

    run = run_traced(lambda: (tmp_path / "x").write_bytes(b"0123456789"), tmp_path, decide)
    assert run.was_killed
    assert (tmp_path / "x").read_bytes() == b"01234"


def test_refused(tmp_path: Path) -> None:
    def decide(operation: Operation) -> Fate | Fail:
        return Fail(errno.ENOSPC) if operation.kind is Kind.MKDIR else Fate.PASS

    run = run_traced(lambda: work(tmp_path), tmp_path, decide)
    assert run.code == CRASHED
    assert "No space left on device" in run.output
    assert list(tmp_path.iterdir()) == []
    assert [operation.error for operation in run.operations] == [errno.ENOSPC]


def test_what_is_not_modelled_does_not_pass_unseen(tmp_path: Path) -> None:
    def map_it() -> None:
        (tmp_path / "x").write_bytes(b"0123")
        with (tmp_path / "x").open("r+b") as file, mmap.mmap(file.fileno(), 4) as memory:
            memory[0] = 1

    for function in (map_it, lambda: (tmp_path / "link").symlink_to("x"), os.sync):
        with pytest.raises(NotModelledError):
            run_traced(function, tmp_path)
