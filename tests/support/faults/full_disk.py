"""The disk refuses: full, over quota, read only, failing, or a file too large.

`refuse_everywhere` makes the kernel answer one operation after the other with an error, just that
one or all that allocate from there on, while the process runs for real. `fill_tmpfs` and
`limit_file_size` do without the tracer: a file system of so many pages or inodes, and a limit on
the size of files, from none to enough. In all of them:

1. The command ends with exit code 1 and an error in our words, or with 0 for it could do without.
2. Whatever is in use is whole, every part of the world is as before or as after, and no file is
   left that neither the world before nor the finished one has.
3. The next command, once there is room, exits with 0 and ends in the right state.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.faults.disk import Snapshot
from tests.support.faults.kills import Bench
from tests.support.faults.processes import Ending, run_forked
from tests.support.faults.tracer import Fail, Fate, Kind, Operation, Run
from tests.support.faults.worlds import CorruptionError, World, check_between, inspect

ALLOCATING: Final = frozenset(
    {Kind.CREATE, Kind.OPEN, Kind.WRITE, Kind.TRUNCATE, Kind.SYNC, Kind.MKDIR, Kind.LINK}
    | {Kind.RENAME}
)
# What a kernel may answer to an operation of each kind.
CHANGING: Final = frozenset(Kind) - {Kind.ACKNOWLEDGE, Kind.SYNC}
ERRORS: Final = {
    "ENOSPC": (errno.ENOSPC, ALLOCATING),
    "EDQUOT": (errno.EDQUOT, ALLOCATING),
    "EROFS": (errno.EROFS, CHANGING),
    "EIO": (errno.EIO, frozenset(Kind)),
    "EACCES": (errno.EACCES, CHANGING - {Kind.WRITE, Kind.TRUNCATE}),
}
PAGE: Final = 4096


@dataclass(kw_only=True)
class Refusing:
    """What came of refusing one scenario its writes.

    Args:
        scenario: Its name, and what was refused.
        tries: Runs in which something was refused.
        refused: Of these, runs that ended with an error of ours.
        failures: What went wrong, with where.
    """

    scenario: str
    tries: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


def refuse_everywhere(
    bench: Bench, name: str, *, is_lasting: bool, every: int = 1, offset: int = 0
) -> Refusing:
    """Refuse a scenario one operation after the other.

    Args:
        bench: The scenario.
        name: Which of `ERRORS`.
        is_lasting: Whether every later operation of these kinds is refused too.
        every: Take only each n-th operation.
        offset: Of those, begin with this one.
    """
    code, kinds = ERRORS[name]
    refusing = Refusing(
        scenario=f"{bench.scenario.name}, {name}{' from there on' if is_lasting else ''}"
    )
    count = sum(operation.kind in kinds for operation in bench.operations())
    for number in range(1 + offset, count + 1, every):
        world = bench.copy()
        run = bench.trace(world, _refuse_at(number, code, kinds, is_lasting))
        refusing.tries += 1
        # Where nothing more may be removed, what was begun stays, and is swept like after a crash.
        may_leave = is_lasting and Kind.UNLINK in kinds
        _judge(bench, world, run, f"operation {number}", refusing, may_leave=may_leave)
    return refusing


def refuse_reads(bench: Bench, name: str, *, every: int = 1, offset: int = 0) -> Refusing:
    """Refuse a scenario to read, one file or folder after the other.

    Args:
        bench: The scenario.
        name: Which of `ERRORS`.
        every: Take only each n-th.
        offset: Of those, begin with this one.
    """
    code, kinds = ERRORS[name][0], frozenset({Kind.READ})
    refusing = Refusing(scenario=f"{bench.scenario.name}, {name} for reading")
    run = bench.trace(bench.copy(), with_reads=True)
    count = sum(operation.kind is Kind.READ for operation in run.operations)
    for number in range(1 + offset, count + 1, every):
        world = bench.copy()
        decide = _refuse_at(number, code, kinds, is_lasting=False)
        run = bench.trace(world, decide, with_reads=True)
        refusing.tries += 1
        _judge(bench, world, run, f"reading {number}, {_refused(run)}", refusing)
    return refusing


def limit_file_size(bench: Bench) -> Refusing:
    """Run a scenario under limits on the size of files that cut its every write for real."""
    refusing = Refusing(scenario=f"{bench.scenario.name}, files limited")
    ends = {op.offset + len(op.data) for op in bench.operations() if op.kind is Kind.WRITE}
    for limit in sorted({0, 1} | {max(end - 1, 0) for end in ends} | {end // 2 for end in ends}):
        world = bench.copy()

        def run_limited(world: World = world, limit: int = limit) -> int:
            # Not what this process prints to: that is no disk that anybody fills.
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                return bench.scenario.run(world)
            finally:
                hard = resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        run = run_forked(run_limited)
        refusing.tries += 1
        _judge(bench, world, run, f"at most {limit} bytes", refusing)
    return refusing


def fill_tmpfs(bench: Bench, *, every: int = 1) -> Refusing:
    """Run a scenario on a file system with room for a part of it: pages, then inodes, for real.

    Raises:
        PermissionError: Where file systems may not be mounted.
    """
    refusing = Refusing(scenario=f"{bench.scenario.name}, tmpfs too small")
    unhurt = bench.copy()
    before = _usage(unhurt.root)
    run_forked(lambda: bench.scenario.run(unhurt))
    after = _usage(unhurt.root)
    # Temporary names and rewritten files need some room more than what is there at the end.
    for pages in range(max(before[0], 1), after[0] + 16, every):
        _try_tmpfs(bench, f"size={pages * PAGE}", f"{pages} pages", refusing)
    for inodes in range(before[1] + 1, after[1] + 8, every):
        _try_tmpfs(bench, f"nr_inodes={inodes}", f"{inodes} inodes", refusing)
    return refusing


def _try_tmpfs(bench: Bench, options: str, where: str, refusing: Refusing) -> None:
    def run_in_namespace() -> int:
        root = bench.copy().root
        _enter_namespace()
        _mount(root, "size=1g")
        world = World(root=root, inputs=bench.inputs)
        bench.before.write(root)
        try:
            _mount(root, options, is_again=True)
        except OSError:
            return 30  # not even the world before fits
        run = run_forked(lambda: bench.scenario.run(world))
        _mount(root, "size=1g,nr_inodes=100000", is_again=True)
        inner = Refusing(scenario="")
        _judge(bench, world, run, where, inner)
        print("\n".join(inner.failures))
        return 10 + inner.refused if not inner.failures else 20

    run = run_forked(run_in_namespace)
    if run.code == 30:
        return
    refusing.tries += 1
    if run.code in (10, 11):
        refusing.refused += run.code - 10
    elif "PermissionError" in run.output:
        raise PermissionError("file systems may not be mounted here")
    else:
        refusing.failures.append(f"{where}: {run.output.strip()}")


def _refuse_at(
    number: int, code: int, kinds: frozenset[Kind], is_lasting: bool
) -> Callable[[Operation], Fate | Fail]:
    seen = 0

    def decide(operation: Operation) -> Fate | Fail:
        nonlocal seen
        if operation.kind not in kinds:
            return Fate.PASS
        seen += 1
        return Fail(code) if seen == number or (is_lasting and seen > number) else Fate.PASS

    return decide


def _refused(run: Run) -> str:
    return next((operation.path for operation in run.operations if operation.error), "nothing")


def _judge(
    bench: Bench,
    world: World,
    run: Ending,
    where: str,
    refusing: Refusing,
    *,
    may_leave: bool = False,
) -> None:
    """Check how a refused run ended, and that the next one works."""
    done = run.acknowledged if isinstance(run, Run) else 0
    try:
        if run.code == 1 and "error: " in run.output and "Traceback" not in run.output:
            refusing.refused += 1
        elif run.code != 0:
            raise CorruptionError(str(run))
        elif bench.scenario.steps:
            done = done or len(bench.scenario.steps)
        last = len(bench.states) - 1
        check_between(inspect(world), bench.states[done], bench.states[min(done + 1, last)])
        # What has arrived of a download stays on purpose, and goes when the next one is whole.
        left = [name for name in bench.leftovers(world) if not name.startswith("store/partial/")]
        left = [] if may_leave else left
        if left:
            raise CorruptionError(f"left over: {', '.join(left)}")
        bench.recover(world, done)
        left = [name for name in bench.leftovers(world) if "/generations/" not in name]
        if left and not may_leave:
            raise CorruptionError(f"left over when all was done: {', '.join(left)}")
    except CorruptionError as error:
        refusing.failures.append(f"{where}: {error}")


def _usage(root: Path) -> tuple[int, int]:
    """Return the pages and inodes that a folder takes on a tmpfs."""
    snapshot, _ = Snapshot.read(root)
    sizes = [len(node.data) for node in snapshot.nodes.values() if node.data is not None]
    return sum(-(-size // PAGE) for size in sizes), len(snapshot.nodes)


def _enter_namespace() -> None:
    """Give this process mounts of its own, as root or as root of a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_users = 0x20000, 0x10000000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mounts) != 0:
        if libc.unshare(new_mounts | new_users) != 0:
            raise OSError(ctypes.get_errno(), "no namespaces")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    recursive, private = 0x4000, 0x40000
    if libc.mount(b"none", b"/", None, recursive | private, None) != 0:
        raise OSError(ctypes.get_errno(), "no mounts")


def _mount(root: Path, options: str, *, is_again: bool = False) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    remount = 0x20 if is_again else 0
    if libc.mount(b"tmpfs", os.fsencode(root), b"tmpfs", remount, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {options}")


def may_mount() -> bool:
    """Say whether this process may mount a file system of its own."""

    def try_it() -> None:
        _enter_namespace()
        _mount(Path(tempfile.gettempdir()), "size=1m")  # over it, for this process alone

    return run_forked(try_it).code == 0
