"""Many processes at once, with file locks and with locks that lie.

Every round has a world of its own and lets all its processes go at the same moment. Every process
must exit with 0; then every byte in use, in the store and in the registry must be what it should
be, and every project must hold what its lock says.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from composable.files import atomic
from tests.support.faults.disk import Snapshot
from tests.support.faults.processes import run_together
from tests.support.faults.scenarios import Command, Scenario, cli, publish, run_whole, yank
from tests.support.faults.worlds import CorruptionError, Inputs, World, inspect


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """Processes that are let go at once.

    Args:
        name: What it is called in reports.
        before: What made the world.
        members: Returns what each process does, for a number of processes.
        n_projects: Projects that they share; process i works in project i modulo this.
        published: Versions of `german` that are published in the end, for a number of processes.
        yanked: Those of them that are yanked.
    """

    name: str
    before: Sequence[Command]
    members: Callable[[int], list[Command]]
    n_projects: int = 1
    published: Callable[[int], Sequence[str]] = lambda n: ("1.0.0", "1.1.0")
    yanked: Sequence[str] = ()


@dataclass(kw_only=True)
class Crowding:
    """What came of the rounds of one crowd.

    Args:
        crowd: Its name.
        processes: Processes in each round.
        rounds: Rounds.
        without_locks: Of these, rounds in which file locks did nothing.
        failed: Processes that did not exit with 0.
        corrupt: Rounds that left something corrupt.
        failures: What went wrong.
    """

    crowd: str
    processes: int
    rounds: int = 0
    without_locks: int = 0
    failed: int = 0
    corrupt: int = 0
    failures: list[str] = field(default_factory=list)


_RELEASES = (
    publish("german", "1.0.0"),
    publish("french", "1.0.0", "german"),
    publish("german", "1.1.0", size=(1 << 20) + 1000),
    publish("french", "1.1.0", "german"),
)
_INSTALL = cli("install", "french", "german", "--quiet")
_PRUNE = cli("cache", "prune", "--older-than", "0", "--quiet")


def _repeat(command: Command, times: int) -> Command:
    def run(world: World) -> int:
        return max(command(world) for _ in range(times))

    return run


def _release(number: int) -> Command:
    return publish("german", f"1.2.{number}")


SAME_SET = Crowd(
    name="the same set into one project",
    before=_RELEASES,
    members=lambda n: [_INSTALL] * n,
)
SHARED_STORE = Crowd(
    name="the same set into eight projects",
    before=_RELEASES,
    members=lambda n: [_INSTALL] * n,
    n_projects=8,
)
WITH_PRUNE = Crowd(
    name="installers and prune --older-than 0",
    before=_RELEASES,
    members=lambda n: [_repeat(_PRUNE, 10) if i % 4 == 3 else _INSTALL for i in range(n)],
    n_projects=8,
)
WITH_VERIFY = Crowd(
    name="installers, verify and prune",
    before=_RELEASES,
    members=lambda n: [
        {3: _repeat(_PRUNE, 5), 2: _repeat(cli("verify", "--quiet"), 5)}.get(i % 4, _INSTALL)
        for i in range(n)
    ],
    n_projects=8,
)
WITH_PUBLISHERS = Crowd(
    name="installers, publishers and yanks",
    before=_RELEASES,
    members=lambda n: [
        {1: _release(i), 3: yank("german", "1.0.0")}.get(i % 4, _INSTALL) for i in range(n)
    ],
    n_projects=4,
    published=lambda n: ("1.0.0", "1.1.0", *(f"1.2.{i}" for i in range(1, n, 4))),
    yanked=("1.0.0",),
)
PUBLISHERS = Crowd(
    name="publishers of one package",
    before=(),
    members=lambda n: [_release(i // 2) for i in range(n)],  # each version by two at once
    published=lambda n: [f"1.2.{i // 2}" for i in range(n)],
)
UPGRADERS = Crowd(
    name="upgrades and syncs in one project",
    before=(*_RELEASES[:2], _INSTALL, *_RELEASES[2:]),
    members=lambda n: [
        cli("upgrade", "--quiet") if i % 2 else cli("sync", "--quiet") for i in range(n)
    ],
)
ALL = (SAME_SET, SHARED_STORE, WITH_PRUNE, WITH_VERIFY, WITH_PUBLISHERS, PUBLISHERS, UPGRADERS)


def crowd_together(
    crowd: Crowd, inputs: Inputs, scratch: Path, *, processes: int, rounds: int, seed: int = 0
) -> Crowding:
    """Let a crowd go, round after round; every other round without file locks.

    Args:
        crowd: The crowd.
        inputs: What its commands read.
        scratch: An empty folder to work in.
        processes: Processes in each round.
        rounds: Rounds.
        seed: Of the order in which processes are started.
    """
    crowding = Crowding(crowd=crowd.name, processes=processes)
    rng = random.Random(seed)
    world = Scenario(name="", before=crowd.before, steps=()).prepare(scratch / "world", inputs)
    template, _ = Snapshot.read(world.root)
    root = scratch / "world"
    for number in range(rounds):
        shutil.rmtree(root, ignore_errors=True)
        template.write(root)
        worlds = [
            World(root=root, inputs=inputs, name=f"project-{i}") for i in range(crowd.n_projects)
        ]
        for world in worlds:
            shutil.copytree(root / "project", world.project)
        has_locks = number % 2 == 0
        crowding.rounds += 1
        crowding.without_locks += not has_locks
        jobs = [
            _member(command, worlds[index % len(worlds)], has_locks)
            for index, command in enumerate(crowd.members(processes))
        ]
        rng.shuffle(jobs)
        bad = [ending for ending in run_together(jobs) if ending.code != 0]
        crowding.failed += len(bad)
        crowding.failures += [f"round {number}: {ending}" for ending in bad]
        try:
            for world in worlds:
                _check(world, crowd, processes)
        except (CorruptionError, RuntimeError) as error:
            crowding.corrupt += 1
            crowding.failures.append(f"round {number}: {error}")
    return crowding


def _member(command: Command, world: World, has_locks: bool) -> Callable[[], int]:
    def run() -> int:
        if not has_locks:
            atomic.advisory_lock = contextlib.nullcontext  # type: ignore[assignment]
        return command(world)

    return run


def _check(world: World, crowd: Crowd, processes: int) -> None:
    """Check what is published, one project, and that a sync leaves it with what it locked."""
    state = inspect(world)
    wanted = {version: version in crowd.yanked for version in crowd.published(processes)}
    for view in (state.releases, state.recorded):
        found = {
            version: is_yanked
            for (name, version), (_, is_yanked) in view.items()
            if name == "german"
        }
        if found != wanted:
            raise CorruptionError(f"published are {found}, expected {wanted}")
    if state.lock is None:
        return
    run_whole(cli("sync", "--quiet"), world)
    state = inspect(world)
    if state.installed != state.lock:
        raise CorruptionError("what is installed is not what is locked")
