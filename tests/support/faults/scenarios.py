"""The commands that are hurt, each in a world where it has something to do."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.faults.processes import acknowledge, run_forked
from tests.support.faults.worlds import Inputs, State, World, inspect

Command = Callable[[World], int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command.

    Args:
        name: What it is called in reports.
        run: The command; returns its exit code.
        again: The next command after this one was cut short: by default the same one.
        may_stay_undone: Whether the old state, whole, is a right end for `again` too.
    """

    name: str
    run: Command
    again: Command | None = None
    may_stay_undone: bool = False

    def recover(self, world: World) -> int:
        """Run the next command after this one was cut short."""
        return (self.again or self.run)(world)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Commands in a row, in a world that others made.

    Args:
        name: What it is called in reports.
        before: What made the world; never hurt.
        steps: What is hurt.
    """

    name: str
    before: Sequence[Command]
    steps: Sequence[Step]

    def prepare(self, root: Path, inputs: Inputs) -> World:
        """Make the world in an empty folder."""
        world = World(root=root, inputs=inputs)
        root.mkdir(parents=True)
        world.create_project()
        for command in self.before:
            run_whole(command, world)
        return world

    def run(self, world: World) -> int:
        """Run all steps in this process, which must be a forked one, acknowledging each."""
        for step in self.steps:
            code = step.run(world)
            if code != 0:
                return code
            acknowledge(step.name)
        return 0

    def states(self, world: World) -> list[State]:
        """Run all steps unhurt; return the state before the first and after each."""
        found = [inspect(world)]
        for step in self.steps:
            run_whole(step.run, world)
            found.append(inspect(world))
        return found


def run_whole(command: Command, world: World) -> None:
    """Run a command unhurt in a process of its own; it must succeed."""
    run = run_forked(lambda: command(world))
    if run.code != 0:
        raise RuntimeError(str(run))


def warm_up(root: Path, inputs: Inputs) -> None:
    """Import here whatever commands import when they are run, so that forked ones are quick."""
    world = World(root=root, inputs=inputs)
    root.mkdir(parents=True)
    world.create_project()

    def list_modules() -> int:
        for command in (*_UPGRADED, cli("rollback"), _PRUNE, cli("verify")):
            command(world)
        print("\nmodules", *sys.modules)
        return 0

    output = run_forked(list_modules).output
    for name in output.rpartition("\nmodules")[2].split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def cli(*arguments: str) -> Command:
    """Return a command of the command line."""
    return lambda world: world.run(*arguments)


def publish(name: str, version: str, *requires: str, size: int = 0) -> Command:
    """Return a command that publishes a release which needs `^1` of others."""
    ranges = dict.fromkeys(requires, "^1")
    return lambda world: world.publish(name, version, requires=ranges, size=size)


def yank(name: str, version: str) -> Command:
    """Return a command that yanks a release."""
    return lambda world: world.yank(name, version)


def step(*arguments: str) -> Step:
    """Return a step that is a command of the command line."""
    return Step(name=" ".join(arguments), run=cli(*arguments))


# A README of more than one chunk, so that some file takes more than one write.
_LARGE: Final = (1 << 20) + 1000
_OLD: Final = (publish("german", "1.0.0"), publish("french", "1.0.0", "german"))
_NEW: Final = (publish("german", "1.1.0", size=_LARGE), publish("french", "1.1.0", "german"))
_PRUNE: Final = cli("cache", "prune", "--older-than", "0", "--quiet")
_UPGRADED: Final = (*_OLD, cli("install", "french"), *_NEW, cli("upgrade"))


def _forget_generations(world: World) -> int:
    """Install something else and forget the rest, so that the store has blobs of no use."""
    import shutil

    current = (world.project / ".composable" / "current").read_text().strip()
    for path in (world.project / ".composable" / "generations").iterdir():
        if path.name != current:
            shutil.rmtree(path)
    return 0


PUBLISH_FIRST: Final = Scenario(
    name="publish to an empty registry",
    before=(),
    steps=(Step(name="publish", run=publish("german", "1.0.0")),),
)
PUBLISH: Final = Scenario(
    name="publish",
    before=_OLD,
    steps=(Step(name="publish", run=publish("german", "1.1.0", size=_LARGE)),),
)
YANK: Final = Scenario(
    name="yank", before=_OLD, steps=(Step(name="yank", run=yank("german", "1.0.0")),)
)
INSTALL: Final = Scenario(
    name="install",
    before=(*_OLD, *_NEW),
    steps=(step("install", "french", "german", "--quiet"),),
)
SYNC: Final = Scenario(
    name="sync", before=(*_OLD, cli("add", "french"), cli("lock")), steps=(step("sync"),)
)
UPGRADE: Final = Scenario(
    name="upgrade",
    before=(*_OLD, cli("install", "french"), *_NEW),
    steps=(step("upgrade", "--quiet"),),
)
ROLLBACK: Final = Scenario(
    name="rollback",
    before=_UPGRADED,
    steps=(
        Step(
            name="rollback",
            run=cli("rollback", "--quiet"),
            again=cli("sync", "--quiet"),
            may_stay_undone=True,
        ),
    ),
)
REMOVE: Final = Scenario(
    name="remove and sync",
    before=(*_OLD, cli("install", "french", "german")),
    steps=(
        Step(
            name="remove and sync",
            run=lambda world: world.run("remove", "french", "--quiet") or world.run("sync"),
            again=cli("sync"),
            may_stay_undone=True,
        ),
    ),
)
PRUNE: Final = Scenario(
    name="prune",
    before=(*_UPGRADED, _forget_generations),
    steps=(Step(name="prune", run=_PRUNE),),
)
HISTORY: Final = Scenario(
    name="a history of ten commands",
    before=(),
    steps=(
        Step(name="publish german 1.0.0", run=publish("german", "1.0.0")),
        Step(name="publish french 1.0.0", run=publish("french", "1.0.0", "german")),
        step("install", "french"),
        Step(name="publish german 1.1.0", run=publish("german", "1.1.0")),
        step("upgrade"),
        Step(name="yank german 1.1.0", run=yank("german", "1.1.0")),
        Step(name="publish german 1.2.0", run=publish("german", "1.2.0")),
        step("upgrade", "german"),
        Step(name="rollback", run=cli("rollback"), again=cli("sync"), may_stay_undone=True),
        Step(name="prune", run=_PRUNE),
    ),
)
ALL: Final = (PUBLISH_FIRST, PUBLISH, YANK, INSTALL, SYNC, UPGRADE, ROLLBACK, REMOVE, PRUNE)
