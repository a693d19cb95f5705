"""Does training survive being killed?

    python -m benchmarks.survival [--kills 200] [--work DIR] [--json FILE]

*Kills.* A small run with a checkpoint every third step is started in one, two or four processes
over loopback, a random one (the coordinator too) gets SIGKILL or SIGTERM at a random moment
(between start and first step, in a step, while a checkpoint is written), and the run is started
again, five times until it may end; half of the runs always have two processes, the others change
their number.
For each kill it is counted whether all processes ended (`ends`) as documented (`exit codes`), the
newest checkpoint was not too old (`kept`) and bit for bit that of a run that was never stopped
(`same bits`), the next start began there (`newest restored`), read the rows that follow, none twice
(`data order`) and had the same losses, and the run came to the same end. With the same processes
losses and end are equal to the bit, with others within a tolerance. Last, the newest checkpoint of
two processes is destroyed, and three restores are broken on purpose; each has to be noticed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import itertools
import json
import platform
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.killed_runs import BROKEN, Kill, Reference, damage_newest, live

KILLS_PER_RUN = 5
# What notices each broken restore.
NOTICED_BY = {"data": "data order", "optimizer": "losses", "older": "newest restored"}


def run_kills(work: Path, kills: int, seed: int) -> list[Kill]:
    """Kill until there are enough; what `work` has from an earlier call counts."""
    references = {n: Reference.make(work / f"whole-{n}", n) for n in (1, 2)}
    done = work / "kills.jsonl"
    found = [Kill(**row) for row in read_rows(done)]
    for life in itertools.count(len(found)):
        if len(found) >= kills:
            return found[:kills]
        rng = random.Random(f"{seed} {life}")
        counts = (
            itertools.repeat(2)
            if rng.random() < 0.5
            else iter(lambda rng=rng: rng.choices((1, 2, 4), (3, 5, 2))[0], None)
        )
        wanted = min(KILLS_PER_RUN, kills - len(found))
        for kill in live(work / "run", references, rng, wanted, counts):
            found.append(kill)
            with done.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(kill)) + "\n")
            if broken := [name for name, kept in kill.promises.items() if kept is False]:
                kept = work / f"broken-{len(found)}"
                (work / "run").rename(kept) if not kept.exists() else None
                print(f"kill {len(found)}: not kept: {', '.join(broken)}: {kill}; see {kept}")
                break
    raise AssertionError


def run_few(work: Path) -> list[Kill]:
    """Stop two processes by SIGTERM, kill one of them after they resumed, and go on with one."""
    references = {n: Reference.make(work / f"whole-{n}", n) for n in (1, 2)}
    plan = iter([("step", signal.SIGTERM), ("write", signal.SIGKILL)])
    counts = iter([2, 2, 1])
    return list(live(work / "run", references, random.Random(0), 2, counts, plan=plan))


def run_broken(work: Path, kinds: Sequence[str]) -> dict[str, bool]:
    """Return for each kind of broken restore whether it was noticed."""
    references = {n: Reference.make(work / f"whole-{n}", n) for n in (1, 2)}
    noticed = {}
    for how in kinds:
        rng = random.Random(how)
        kills = live(
            work / "run",
            references,
            rng,
            1,
            itertools.repeat(2),
            plan=itertools.repeat(("step", signal.SIGKILL)),
            broken=how,
            whole=2,
        )
        noticed[how] = any(kill.promises.get(NOTICED_BY[how]) is False for kill in kills)
    return noticed


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarise(kills: list[Kill]) -> dict[str, Any]:
    """Return counts over all kills."""
    promises: dict[str, collections.Counter[bool]] = collections.defaultdict(collections.Counter)
    for kill in kills:
        for name, kept in kill.promises.items():
            if kept is not None:
                promises[name][kept] += 1
    kinds = ("signal", "moment", "n", "next_n")
    return {
        "kills": len(kills),
        "all kept": sum(
            all(kept is not False for kept in kill.promises.values()) for kill in kills
        ),
        "promises": {name: [counts[True], counts.total()] for name, counts in promises.items()},
        "coordinator": sum(kill.rank == 0 for kill in kills),
        "another count": sum(kill.next_n not in (None, kill.n) for kill in kills),
        **{
            kind: dict(collections.Counter(str(getattr(kill, kind)) for kill in kills))
            for kind in kinds
        },
        "seconds until all ended": {
            "median": statistics.median(kill.seconds for kill in kills),
            "largest": max(kill.seconds for kill in kills),
        },
        "largest difference of a loss": max(kill.difference for kill in kills),
    }


def describe_machine() -> str:
    """Return machine, versions and date."""
    import jax

    return (
        f"{platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    )


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="how many; 200 by default")
    parser.add_argument("--quick", action="store_true", help="two kills of one run, in seconds")
    parser.add_argument("--seed", type=int, default=0, help="of moments, signals and victims")
    parser.add_argument("--work", type=Path, help="folder of the runs; the next call goes on in it")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if arguments.quick:
            kills, noticed = run_few(work), run_broken(work, BROKEN[:1])
        else:
            kills = run_kills(work, arguments.kills, arguments.seed)
            noticed = run_broken(work, BROKEN)
        damaged = damage_newest(work / "damaged", Reference.make(work / "whole-2", 2), 2)
    figures = {
        "machine": describe_machine(),
        **summarise(kills),
        "broken restores noticed": noticed,
        "damaged checkpoint": damaged,
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    is_noticed = all(noticed.values()) and all(damaged.values())
    if figures["all kept"] < len(kills) or not is_noticed:
        sys.exit(1)


if __name__ == "__main__":
    main()
