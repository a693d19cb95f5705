"""The power fails after any operation, on a disk that keeps only what was synced.

A run is recorded with its data. For every prefix of its operations, and for every omen (what may
have survived beyond what was synced, see `disk.py`), the disk is written out as it might be found
after the cut. Then:

1. Every step that was acknowledged before the cut has happened, whole.
2. The step that was under way has happened or not, and whatever is in use is whole.
3. The next command, with nothing mended by hand, exits with 0 and ends in the right state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

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
from tests.support.faults.kills import Bench, kill_points
from tests.support.faults.tracer import run_traced
from tests.support.faults.worlds import CorruptionError, check_equal, inspect

FIXED_OMENS = (STRICT, NAMES, ZEROS, CUT, WHOLE)


@dataclass(kw_only=True)
class PowerLoss:
    """What came of cutting the power of one scenario everywhere.

    Args:
        scenario: Its name.
        operations: Operations recorded.
        cuts: Prefixes times omens.
        images: Different disks among them; each was looked at once.
        failures: What went wrong, with where.
    """

    scenario: str
    operations: int = 0
    cuts: int = 0
    images: int = 0
    failures: list[str] = field(default_factory=list)


def omens(chances: int, seed: int = 0) -> list[Omen]:
    """Return the fixed omens and some drawn by chance."""
    return [*FIXED_OMENS, *(draw_omen(seed + number) for number in range(chances))]


def cut_everywhere(
    bench: Bench, tries: Sequence[Omen], *, every: int = 1, offset: int = 0
) -> PowerLoss:
    """Cut the power of a scenario after its operations.

    Args:
        bench: The scenario.
        tries: What may survive; every cut is tried with each.
        every: Take only each n-th prefix, and always the last.
        offset: Begin with this one.
    """
    history = record(bench)
    loss = PowerLoss(scenario=bench.scenario.name, operations=history.n_operations)
    seen = set()
    last = history.n_operations
    for cut in sorted({*range(offset, last + 1, every), last}):
        done = len(history.acknowledged_at(cut))
        for omen in tries:
            loss.cuts += 1
            image = history.image(cut, omen)
            key = (image.digest(), done)
            if key in seen:
                continue
            seen.add(key)
            loss.images += 1
            try:
                bench.recover(bench.write(image), done)
            except CorruptionError as error:
                loss.failures.append(f"after operation {cut}, {omen.name}: {error}")
    return loss


def cut_after_kills(bench: Bench, *, every: int = 1, offset: int = 0) -> PowerLoss:
    """Kill a scenario of one step, let the next command finish, then cut the power.

    What the killed process did not sync, the next command finds in place. It may not count on it:
    once it is acknowledged, all that it needs must be durable, whoever wrote it.
    """
    (step,) = bench.scenario.steps
    loss = PowerLoss(scenario=f"{bench.scenario.name}, killed before")
    seen = set()
    for point in list(kill_points(bench.operations()))[offset::every]:
        world = bench.copy()
        before, numbers = Snapshot.read(world.root)
        first = bench.trace(world, point.decide())
        done = first.acknowledged
        second = run_traced(partial(step.recover, world), world.root)
        wanted = inspect(world)
        history = History(before, numbers, [*first.operations, *second.operations])
        loss.operations += history.n_operations
        loss.cuts += 1
        image = history.image(history.n_operations, STRICT)
        key = (image.digest(), done)
        if key in seen:
            continue
        seen.add(key)
        loss.images += 1
        try:
            if second.code != 0:
                raise CorruptionError(f"the next command failed, {second}")
            check_equal(inspect(bench.write(image)), wanted, is_store_kept=False)
        except CorruptionError as error:
            last = first.operations[-1] if first.operations else "the start"
            loss.failures.append(f"{point}, {last}: {error}")
    return loss


def record(bench: Bench) -> History:
    """Return the disk of a scenario and all that an unhurt run does to it."""
    world = bench.copy()
    before, numbers = Snapshot.read(world.root)
    run = bench.trace(world)
    if run.code != 0:
        raise RuntimeError(f"the unhurt run failed, {run}")
    history = History(before, numbers, run.operations)
    after, _ = Snapshot.read(world.root)
    replayed = history.image(history.n_operations, WHOLE)
    if replayed.digest() != after.digest():
        raise AssertionError("the recorded operations do not lead to what is on the disk")
    return history
