"""SIGKILL at every file operation: is what is there old or new, and does the next command work?

For every operation of a command, the same command is run in the same world by a process that is
killed there: right after the operation, before the first, and in the middle of every write. (Right
before an operation is the same as right after the one before it, as far as a disk can tell.) Then:

1. Whatever is in use is whole, and every part of the world is as it was or as it was to be.
2. The next command, with nothing mended by hand, exits with 0 and ends in the right state.
3. Crashing at one point after the other for days leaves a bounded number of files behind.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.support.faults.disk import Snapshot
from tests.support.faults.processes import run_forked
from tests.support.faults.scenarios import Scenario
from tests.support.faults.tracer import Decide, Fate, Kind, Operation, Run, run_traced
from tests.support.faults.worlds import (
    CorruptionError,
    Inputs,
    State,
    World,
    check_between,
    check_equal,
    files_of,
    inspect,
)


@dataclass(frozen=True)
class Point:
    """Where a process is killed.

    Args:
        fate: How.
        number: At which of its operations, counted from 1.
    """

    fate: Fate
    number: int

    def decide(self) -> Callable[[Operation], Fate]:
        """Return what a tracer asks at every operation of one process."""
        seen = 0

        def decide(operation: Operation) -> Fate:
            nonlocal seen
            seen += 1
            if seen != self.number:
                return Fate.PASS
            is_torn = self.fate is Fate.TEAR and operation.kind is not Kind.WRITE
            return Fate.KILL_AFTER if is_torn else self.fate

        return decide


@dataclass(kw_only=True)
class Killing:
    """What came of killing one scenario everywhere.

    Args:
        scenario: Its name.
        operations: Of how many kinds the operations of the unhurt run are.
        points: Processes that were killed.
        failures: What went wrong, with where.
    """

    scenario: str
    operations: dict[str, int] = field(default_factory=dict)
    points: int = 0
    failures: list[str] = field(default_factory=list)


class Bench:
    """One scenario, prepared once and run as often as one likes.

    Args:
        scenario: The scenario.
        inputs: What its commands read.
        scratch: An empty folder to work in.
    """

    def __init__(self, scenario: Scenario, inputs: Inputs, scratch: Path) -> None:
        self.scenario = scenario
        self.scratch = scratch
        self.inputs = inputs
        world = scenario.prepare(scratch / "world", inputs)
        self.before, _ = Snapshot.read(world.root)
        known = set(files_of(world))
        self.states = scenario.states(world)
        self._known_files = known | files_of(world).keys()

    def copy(self) -> World:
        """Return a fresh copy of the world before."""
        return self.write(self.before)

    def write(self, snapshot: Snapshot) -> World:
        """Return a world with these files."""
        root = self.scratch / "world"
        shutil.rmtree(root, ignore_errors=True)
        snapshot.write(root)
        return World(root=root, inputs=self.inputs)

    def trace(self, world: World, decide: Decide | None = None, *, with_reads: bool = False) -> Run:
        """Run all steps in a traced process."""
        work = partial(self.scenario.run, world)
        return run_traced(work, world.root, decide, with_reads=with_reads)

    def operations(self) -> list[Operation]:
        """Return the operations of an unhurt run."""
        run = self.trace(self.copy())
        if run.code != 0:
            raise RuntimeError(f"the unhurt run failed, {run}")
        return [op for op in run.operations if op.kind is not Kind.ACKNOWLEDGE]

    def recover(self, world: World, done: int) -> State:
        """Run what comes after `done` whole steps, the cut one first; return the state.

        Raises:
            CorruptionError: When a command fails or ends in another state than it should.
        """
        before, after = self.states[done], self.states[min(done + 1, len(self.states) - 1)]
        check_between(inspect(world), before, after)
        for step in self.scenario.steps[done : done + 1]:
            run = run_forked(partial(step.recover, world))
            if run.code != 0:
                raise CorruptionError(f"the next command failed, {run}")
            found = inspect(world)
            try:
                check_equal(found, after)
            except CorruptionError:
                if not step.may_stay_undone:
                    raise
                check_between(found, before, after)
                if found.installed != found.lock:
                    raise
        return inspect(world)

    def leftovers(self, world: World) -> dict[str, bytes]:
        """Return the files of a world that was cut short and mended, and that no unhurt one has."""
        names = files_of(world).keys() - self._known_files
        return {name: (world.root / name).read_bytes() for name in sorted(names)}


def kill_everywhere(
    bench: Bench, *, every: int = 1, offset: int = 0, twice: int = 0, seed: int = 0
) -> Killing:
    """Kill a scenario at its operations.

    Args:
        bench: The scenario.
        every: Take only each n-th point.
        offset: Of those, begin with this one.
        twice: Take only each n-th of the points again to kill the next command too, at an
            operation drawn by chance; 0 for none.
        seed: Of that chance.
    """
    killing = Killing(scenario=bench.scenario.name)
    rng = random.Random(seed)
    operations = bench.operations()
    killing.operations = dict(Counter(operation.kind.value for operation in operations))
    for index, point in enumerate(list(kill_points(operations))[offset::every]):
        world = bench.copy()
        run = bench.trace(world, point.decide())
        if not run.was_killed:
            killing.failures.append(f"{point}: was not killed, {run}")
            continue
        killing.points += 1
        where = f"{point.fate.name} {point.number}, {_last(run)}"
        done = run.acknowledged
        try:
            if twice and index % twice == 0 and done < len(bench.scenario.steps):
                _kill_the_next(bench, world, done, rng)
                killing.points += 1
            bench.recover(world, done)
        except CorruptionError as error:
            killing.failures.append(f"{where}: {error}")
    return killing


def crash_for_days(bench: Bench, *, every: int = 1, passes: int = 2) -> list[list[str]]:
    """Crash at one point after the other, three hours apart, and mend it each time.

    Every crash finds what all crashes before it left behind. If that is swept in time, the second
    pass over the same points ends with no more of it than the first.

    Returns:
        The files that were left at the end of each pass.
    """
    points = list(kill_points(bench.operations()))[::every]
    left: dict[str, bytes] = {}
    ends = []
    for _ in range(passes):
        for point in points:
            world = bench.copy()
            for name, data in left.items():
                (world.root / name).parent.mkdir(parents=True, exist_ok=True)
                (world.root / name).write_bytes(data)
            world.age()
            run = bench.trace(world, point.decide())
            done = run.acknowledged
            bench.recover(world, done)
            left = bench.leftovers(world)
        ends.append(sorted(left))
    return ends


def _kill_the_next(bench: Bench, world: World, done: int, rng: random.Random) -> None:
    """Kill the command after the killed one as well."""
    step = bench.scenario.steps[done]
    after = bench.states[done + 1]
    point = Point(Fate.KILL_AFTER, rng.randint(1, 60))
    run_traced(lambda: step.recover(world), world.root, point.decide())
    check_between(inspect(world), bench.states[done], after)


def kill_points(operations: list[Operation]) -> Iterator[Point]:
    """Yield every point of a run to kill it at."""
    yield Point(Fate.KILL_BEFORE, 1)
    for number, operation in enumerate(operations, 1):
        if operation.kind is Kind.WRITE and len(operation.data) > 1:
            yield Point(Fate.TEAR, number)
        yield Point(Fate.KILL_AFTER, number)


def _last(run: Run) -> str:
    return str(run.operations[-1]) if run.operations else "at the start"
