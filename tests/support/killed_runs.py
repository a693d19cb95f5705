"""A small training run in several processes, killed at random moments, resumed, and looked at.

Processes are forked from one that has imported everything and never starts jax, so that a start
costs little. Every process writes down each step that it did: the loss, and which rows it read.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from composable.cli.group import stop_on_request
from composable.errors import ComposableError
from composable.parallel import leave_group, start_processes
from composable.training import checkpoints
from composable.training.config import TrainConfig
from composable.training.data import batches
from composable.training.loop import fit

STEPS, EVERY = 60, 3
STEP_SECONDS = 0.02
# Losses on another number of devices, whose rows are summed in another order; losses are below 1.
SAME_LOSS = 1e-5
ENDED_SECONDS = 300.0
MOMENTS = ("start", "step", "write")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
BROKEN = ("data", "optimizer", "older")
PREEMPTED, PEER_FAILED = 75, 76


def settings(every: int = EVERY) -> TrainConfig:
    """Return the settings of the run, with a checkpoint every few steps."""
    return TrainConfig(
        steps=STEPS,
        batch_size=4,
        window=7,
        learning_rate=1e-2,
        checkpoint_every=every,
        log_every=1,
    )


@dataclass
class Trace:
    """What one process writes down: a line for each step."""

    path: Path
    rows: list[int] = field(default_factory=list)

    def add(self, step: int, _: int, figures: Any) -> None:
        line = {"step": step, "loss": figures.get("loss"), "rows": self.rows}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(STEP_SECONDS)


@dataclass
class RecordedRows:
    """Batches whose rows are noted in a trace; a broken one ignores where it should go on."""

    data: Any
    trace: Trace
    is_broken: bool

    def __next__(self) -> Any:
        rows_BU = next(self.data)
        self.trace.rows = [zlib.crc32(row_U.tobytes()) for row_U in rows_BU]
        return rows_BU

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.data.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        if not self.is_broken:
            self.data.set_state(state)


def break_restore(how: str) -> None:
    """Let this process restore wrongly, for the harness to notice."""
    whole = checkpoints.Checkpoints.restore
    attempt = checkpoints.Checkpoints._try
    tries = itertools.count()

    def fresh_optimizer(self: Any, trained: Any, opt_state: Any) -> Any:
        found = whole(self, trained, opt_state)
        return found._replace(opt_state=opt_state) if found else None

    def skip_newest(self: Any, *args: Any) -> Any:
        return (None, "skipped") if next(tries) == 0 else attempt(self, *args)

    if how == "optimizer":
        checkpoints.Checkpoints.restore = fresh_optimizer  # type: ignore[method-assign]
    if how == "older":
        checkpoints.Checkpoints._try = skip_newest  # type: ignore[method-assign]


def train(
    folder: Path, address: str, n: int, process: int, run: str, every: int, broken: str
) -> None:
    """Run one process of a group, as `composable train` does."""
    import jax
    import jax.numpy as jnp

    from tests.training.line_program import objective

    if n > 1:
        start_processes(address, n, process, init_timeout=120)
    (folder / f"joined-{run}-{process}").touch()
    trace = Trace(folder / f"trace-{run}-{process}.jsonl")
    rng = np.random.default_rng(0)
    trained = {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)}
    frozen = {"target": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32), "shift": jnp.int32(1)}
    stream_M = rng.integers(0, 100, 500)
    data = batches(stream_M, window=7, batch_size=4, seed=0, process=process, n_processes=n)
    if broken:
        break_restore(broken)
    recorded = RecordedRows(data, trace, broken == "data")
    if every == 1:
        record_sums(folder)
    fitted = fit(
        objective, trained, frozen, recorded, settings(every), directory=folder, progress=trace.add
    )
    if process == 0:
        weights = {
            name: np.asarray(jax.device_get(x)).tolist() for name, x in fitted.trained.items()
        }
        (folder / "weights.json").write_text(json.dumps(weights))


def record_sums(folder: Path) -> None:
    """Let this process write down the sums of every checkpoint, by step."""
    save = checkpoints.Checkpoints.save

    def record(self: Any, step: int, trained: Any, opt_state: Any, data_state: Any) -> None:
        sums = checkpoints._sum_arrays(checkpoints._plain((trained, opt_state)))
        with (folder / "sums.jsonl").open("a") as file:
            file.write(json.dumps([step, sums]) + "\n")
        save(self, step, trained, opt_state, data_state)

    checkpoints.Checkpoints.save = record  # type: ignore[method-assign]


def fork(work: Callable[[], None], log: Path) -> int:
    """Run a function in a process of its own, as a program; return its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            work()
            code = 0
        except ComposableError as error:
            print(f"error: {error}", file=sys.stderr)
            leave_group(error, error.exit_code)
            code = error.exit_code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Group:
    """The processes of one start of a run.

    Args:
        folder: Folder of the run.
        n: Number of processes.
        run: Name of this start.
        every: Steps between checkpoints.
        broken: How they restore wrongly; empty for a right one.
    """

    def __init__(
        self, folder: Path, n: int, run: str, *, every: int = EVERY, broken: str = ""
    ) -> None:
        self.folder, self.n, self.run = folder, n, run
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.codes: dict[int, int] = {}
        self.pids = [
            fork(
                lambda i=i: stop_on_request()(train)(  # type: ignore[misc]
                    folder, address, n, i, run, every, broken
                ),
                folder / f"log-{run}-{i}",
            )
            for i in range(n)
        ]

    def poll(self) -> bool:
        """Return whether all processes have ended."""
        for index, pid in enumerate(self.pids):
            if index not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[index] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == self.n

    def wait_until(self, is_so: Callable[[], bool], seconds: float = ENDED_SECONDS) -> bool:
        """Return whether something became so before all processes ended, or time was over."""
        deadline = time.monotonic() + seconds
        while not is_so():
            if self.poll() or time.monotonic() > deadline:
                return is_so()
            time.sleep(0.003)
        return True

    def end(self) -> None:
        """Kill what is left."""
        for index, pid in enumerate(self.pids):
            if index not in self.codes:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                self.codes[index] = os.waitstatus_to_exitcode(status)

    def trace(self, process: int = 0) -> list[dict[str, Any]]:
        """Return what a process wrote down, whole lines only."""
        return read_lines(self.folder / f"trace-{self.run}-{process}.jsonl")

    @property
    def last_step(self) -> int:
        """The last step that any process did; 0 if none did one."""
        return max((line["step"] for i in range(self.n) for line in self.trace(i)), default=0)


def read_lines(path: Path) -> list[Any]:
    """Return the whole lines of a file of JSON lines."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def whole_steps(folder: Path) -> list[int]:
    """Return the checkpoints that were finished: a folder gets its name when it is."""
    home = folder / "checkpoints"
    return (
        sorted(int(path.name) for path in home.iterdir() if path.name.isdigit())
        if home.is_dir()
        else []
    )


def read_sums(folder: Path, step: int) -> dict[str, str]:
    """Return the sums of the arrays in a checkpoint."""
    record = json.loads((folder / "checkpoints" / str(step) / "run" / "metadata").read_text())
    sums: dict[str, str] = record["sums"]
    return sums


@dataclass
class Reference:
    """A run that nothing stopped: rows and losses by step, sums of checkpoints by step."""

    folder: Path
    lines: dict[int, dict[str, Any]]
    sums: dict[int, dict[str, str]]

    @classmethod
    def make(cls, folder: Path, n: int) -> Reference:
        """Run it, or read it where it was run before."""
        if not (folder / "weights.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            group = Group(folder, n, "whole", every=1)
            group.wait_until(lambda: False)
            group.end()
            if group.codes != dict.fromkeys(range(n), 0):
                raise RuntimeError(f"{folder}: exit codes {group.codes}; see the logs there")
        traces = [read_lines(folder / f"trace-whole-{i}.jsonl") for i in range(n)]
        lines = {}
        for parts in zip(*traces, strict=True):
            # Row i of a step is read by process i modulo their number.
            rows = [
                row
                for together in zip(*(part["rows"] for part in parts), strict=True)
                for row in together
            ]
            lines[parts[0]["step"]] = {**parts[0], "rows": rows}
        sums = {step: found for step, found in read_lines(folder / "sums.jsonl")}
        return cls(folder, lines, sums)


@dataclass(kw_only=True)
class Kill:
    """A process that was killed, and what became of the promises; None where nothing shows it."""

    n: int
    signal: str
    rank: int
    moment: str
    step: int
    codes: list[int]
    seconds: float
    next_n: int | None = None
    promises: dict[str, bool | None] = field(default_factory=dict)
    difference: float = 0.0


def kill_once(
    group: Group, rng: random.Random, moment: str, number: signal.Signals, whole: int
) -> Kill | None:
    """Kill a random process of a group at a moment; None if the run was done before."""
    folder, rank = group.folder, rng.randrange(group.n)
    joined = [folder / f"joined-{group.run}-{i}" for i in range(group.n)]
    group.wait_until(lambda: all(path.exists() for path in joined))
    if moment == "start":
        group.wait_until(lambda: False, rng.uniform(0, 1.0))
    else:
        group.wait_until(lambda: group.last_step > 0)
        group.wait_until(lambda: len(whole_steps(folder)) >= whole)
        group.wait_until(lambda: False, rng.uniform(0, 1.5))
    if moment == "write":
        group.wait_until(lambda: any((folder / "checkpoints").glob("*tmp*")))
        group.wait_until(lambda: False, rng.uniform(0, 0.05))
    if group.poll() or group.codes:
        return None
    os.kill(group.pids[rank], number)
    start = time.monotonic()
    group.wait_until(lambda: False)
    has_ended, seconds = group.poll(), time.monotonic() - start
    group.end()
    codes = [group.codes[i] for i in range(group.n)]
    if 0 in codes and set(codes) <= {0, -number}:
        return None  # it was done
    kill = Kill(
        n=group.n,
        signal=number.name,
        rank=rank,
        moment=moment,
        step=group.last_step,
        codes=codes,
        seconds=round(seconds, 2),
    )
    kill.promises["ends"] = has_ended
    kill.promises["exit codes"] = has_right_codes(kill, number)
    return kill


def has_right_codes(kill: Kill, number: signal.Signals) -> bool:
    """Return whether every process ended as documented."""
    if number == signal.SIGKILL:
        others = [code for rank, code in enumerate(kill.codes) if rank != kill.rank]
        return kill.codes[kill.rank] == -number and set(others) <= {PEER_FAILED}
    return set(kill.codes) == {PREEMPTED}


def live(
    folder: Path,
    references: dict[int, Reference],
    rng: random.Random,
    kills: int,
    counts: Iterator[int],
    *,
    plan: Iterator[tuple[str, signal.Signals]] | None = None,
    broken: str = "",
    whole: int = 0,
) -> Iterator[Kill]:
    """Start a run, kill and resume it some times, let it end, and yield what became of each kill.

    Args:
        folder: Its folder.
        references: Runs that nothing stopped, by number of processes.
        rng: Draws moments, signals and victims.
        kills: How often to kill.
        counts: Numbers of processes of one start after the other.
        plan: The moment and the signal of each kill; drawn at random without it.
        broken: How every start but the first restores wrongly; empty for a right one.
        whole: Whole checkpoints to wait for before a kill that comes after the first step.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = plan or iter(lambda: (rng.choice(MOMENTS), rng.choice(SIGNALS)), None)
    n, used, pending = next(counts), set[int](), list[Kill]()
    for number in range(kills + 1):
        used.add(n)
        before = whole_steps(folder)
        newest = before[-1] if before else 0
        for kill in pending:
            kill.next_n = kill.next_n or n
        group = Group(folder, n, str(number), broken=broken if number else "")
        kill_now = None
        if number < kills:
            kill_now = kill_once(group, rng, *next(plan), whole)
        else:
            group.wait_until(lambda: False)
        group.end()
        # Bits are those of a run that always had as many processes; four are too slow for one.
        is_same = len(used) == 1 and n in references
        reference = references[n if is_same else 1]
        if group.last_step or kill_now is None:
            for kill in pending:
                look_at_resumed(kill, group, newest, reference, is_same=is_same)
                if kill_now is not None:
                    yield kill
            if kill_now is not None:
                pending = []
        if kill_now is None:
            for kill in pending:
                look_at_end(kill, folder, group, reference, is_same=is_same)
                yield kill
            if set(group.codes.values()) != {0} and not pending:
                raise RuntimeError(f"{folder}: exit codes {group.codes}; see the logs there")
            return
        look_at_disk(kill_now, folder, reference, is_same=is_same)
        pending.append(kill_now)
        n = next(counts)


def damage_newest(folder: Path, reference: Reference, n: int) -> dict[str, bool]:
    """Stop a run, destroy its newest checkpoint, and return what the resumed run did.

    Args:
        folder: Its folder.
        reference: A run of as many processes that nothing stopped.
        n: Number of processes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    group = Group(folder, n, "0")
    group.wait_until(lambda: len(whole_steps(folder)) >= 2)
    os.kill(group.pids[0], signal.SIGTERM)
    group.wait_until(lambda: False)
    group.end()
    before, newest = whole_steps(folder)[-2:]
    for path in (folder / "checkpoints" / str(newest) / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    group = Group(folder, n, "1")
    group.wait_until(lambda: False)
    group.end()
    said = [(folder / f"log-1-{index}").read_text() for index in range(n)]
    names = (f"step {newest} is damaged", f"resuming from step {before}")
    return {
        "completes": set(group.codes.values()) == {0},
        "named": all(name in text for text in said for name in names),
        "the one before": all(group.trace(i)[0]["step"] == before + 1 for i in range(n)),
        "same end": read_sums(folder, STEPS) == reference.sums[STEPS],
    }


def look_at_disk(kill: Kill, folder: Path, reference: Reference, *, is_same: bool) -> None:
    """Check the newest whole checkpoint that a kill left."""
    steps = whole_steps(folder)
    newest = steps[-1] if steps else 0
    if PREEMPTED in kill.codes and kill.step:
        kill.promises["kept"] = newest == kill.step
    else:
        # One checkpoint may have been on its way when the next was due.
        kill.promises["kept"] = kill.step - newest <= 2 * EVERY
    if newest and is_same:
        kill.promises["same bits"] = read_sums(folder, newest) == reference.sums[newest]


def look_at_resumed(
    kill: Kill, group: Group, newest: int, reference: Reference, *, is_same: bool
) -> None:
    """Check what the next start did with what a kill left."""
    traces = [group.trace(i) for i in range(group.n)]
    firsts = {trace[0]["step"] for trace in traces if trace}
    if firsts:
        kill.promises["newest restored"] = firsts == {newest + 1}
    kill.promises["data order"] = all(
        [line["step"] for line in trace] == list(range(newest + 1, newest + 1 + len(trace)))
        and all(
            line["rows"] == reference.lines[line["step"]]["rows"][i :: group.n] for line in trace
        )
        for i, trace in enumerate(traces)
    )
    differences = [abs(line["loss"] - reference.lines[line["step"]]["loss"]) for line in traces[0]]
    kill.difference = max([kill.difference, *differences])
    kill.promises["losses"] = kill.difference <= (0.0 if is_same else SAME_LOSS)


def look_at_end(
    kill: Kill, folder: Path, group: Group, reference: Reference, *, is_same: bool
) -> None:
    """Check where the run ended after its last kill."""
    kill.promises["completes"] = set(group.codes.values()) == {0}
    if not kill.promises["completes"]:
        return
    if is_same:
        kill.promises["same end"] = read_sums(folder, STEPS) == reference.sums[STEPS]
        return
    ended, expected = (
        json.loads((where / "weights.json").read_text()) for where in (folder, reference.folder)
    )
    kill.promises["same end"] = all(
        np.allclose(ended[name], expected[name], atol=SAME_LOSS) for name in expected
    )
