"""What is left when packaging is killed, cut off, crowded, out of room, or lied to?

    python -m benchmarks.faults [--only KIND ...] [--quick] [--json FILE]

Prints one line for each scenario and exits with 1 if anything was found that should not be. The
kinds, what they assume and what they found are in `docs/results/faults.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.faults import crowds, flips, full_disk, kills, power_loss, scenarios, wire
from tests.support.faults.kills import Bench
from tests.support.faults.tracer import is_supported
from tests.support.faults.worlds import Inputs

# How many of the bits to flip in each kind of file; 10,000 in all.
FLIPS = {
    flips.REGISTRY_FILES: 2500,
    flips.REGISTRY_MANIFESTS: 1500,
    flips.INDEX_LINES: 2000,
    flips.RECORDS: 500,
    flips.LOCKS: 1300,
    flips.STORED: 700,
    flips.STORED_ELSEWHERE: 700,
    flips.INSTALLED: 600,
    flips.PARTIAL: 200,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to do.

    Args:
        every: Of the points of a run, take only each n-th.
        chances: Random omens for each power cut.
        processes: Processes in a crowd.
        rounds: Rounds of the plain crowds, and of the mixed ones.
        flips: Divides the bits to flip.
        tricks: Of the tricks on the wire, play only each n-th.
    """

    every: int
    chances: int
    processes: int
    rounds: tuple[int, int]
    flips: int
    tricks: int


FULL = Plan(every=1, chances=4, processes=32, rounds=(50, 20), flips=1, tricks=1)
QUICK = Plan(every=10, chances=1, processes=8, rounds=(4, 2), flips=50, tricks=8)
Row = dict[str, Any]


def run_kills(inputs: Inputs, scratch: Path, plan: Plan) -> Iterator[Row]:
    """SIGKILL at every file operation, and at one of the next command's too."""
    for number, scenario in enumerate(scenarios.ALL):
        bench = Bench(scenario, inputs, scratch / str(number))
        found = kills.kill_everywhere(bench, every=plan.every, twice=5)
        row = dataclasses.asdict(found)
        yield {
            **row,
            "name": found.scenario,
            "figures": f"{sum(found.operations.values())} operations, {found.points} kills",
        }


def run_days(inputs: Inputs, scratch: Path, plan: Plan) -> Iterator[Row]:
    """Crash after crash, hours apart: what is left behind is swept."""
    for number, scenario in enumerate(scenarios.ALL):
        bench = Bench(scenario, inputs, scratch / str(number))
        once, twice = kills.crash_for_days(bench, every=plan.every)
        grown = len(twice) > len(once) + (plan.every > 1) * len(twice)
        yield {
            "name": scenario.name,
            "left": [len(once), len(twice)],
            "figures": f"files left after each pass: {len(once)}, {len(twice)}",
            "failures": [f"grew to {twice}"] if grown else [],
        }


def run_power(inputs: Inputs, scratch: Path, plan: Plan) -> Iterator[Row]:
    """Power cut after every operation, what was not synced dropped or spoilt."""
    tries = power_loss.omens(plan.chances)
    for number, scenario in enumerate((*scenarios.ALL, scenarios.HISTORY)):
        bench = Bench(scenario, inputs, scratch / str(number))
        found = [power_loss.cut_everywhere(bench, tries, every=plan.every)]
        if len(scenario.steps) == 1:
            found.append(power_loss.cut_after_kills(bench, every=plan.every))
        for loss in found:
            yield {
                **dataclasses.asdict(loss),
                "name": loss.scenario,
                "figures": f"{loss.cuts:,} cuts, {loss.images:,} different disks",
            }


def run_disk(inputs: Inputs, scratch: Path, plan: Plan) -> Iterator[Row]:
    """Every write refused, and file systems that are really too small."""
    for number, scenario in enumerate(scenarios.ALL):
        bench = Bench(scenario, inputs, scratch / str(number))
        for found in _refuse(bench, plan.every):
            yield {
                **dataclasses.asdict(found),
                "name": found.scenario,
                "figures": f"{found.tries} tries, {found.refused} refused",
            }


def _refuse(bench: Bench, every: int) -> Iterator[full_disk.Refusing]:
    yield full_disk.refuse_everywhere(bench, "ENOSPC", is_lasting=False, every=every)
    for name in full_disk.ERRORS:
        yield full_disk.refuse_everywhere(bench, name, is_lasting=True, every=every)
    for name in ("EACCES", "EIO"):
        yield full_disk.refuse_reads(bench, name, every=every)
    yield full_disk.limit_file_size(bench)
    if full_disk.may_mount():
        yield full_disk.fill_tmpfs(bench, every=every)


def run_crowds(inputs: Inputs, scratch: Path, plan: Plan) -> Iterator[Row]:
    """Many processes at once, half of the rounds without file locks."""
    for number, crowd in enumerate(crowds.ALL):
        found = crowds.crowd_together(
            crowd,
            inputs,
            scratch / str(number),
            processes=plan.processes,
            rounds=plan.rounds[crowd not in (crowds.SAME_SET, crowds.SHARED_STORE)],
        )
        yield {
            **dataclasses.asdict(found),
            "name": found.crowd,
            "figures": f"{found.processes} processes x {found.rounds} rounds, "
            f"{found.failed} failed, {found.corrupt} corrupt",
        }


def run_flips(inputs: Inputs, scratch: Path, plan: Plan) -> Iterator[Row]:
    """Random single bits of every kind of file."""
    for number, (target, count) in enumerate(FLIPS.items()):
        found = flips.flip_everywhere(
            target, inputs, scratch / str(number), flips=count // plan.flips
        )
        yield {
            **dataclasses.asdict(found),
            "name": found.target,
            "figures": f"{found.flips:,} bits: {found.noticed:,} noticed, "
            f"{found.harmless:,} harmless, {len(found.failures)} missed",
        }


def run_wire(inputs: Inputs, scratch: Path, plan: Plan) -> Iterator[Row]:
    """Downloads cut at every interesting byte, and a server that lies."""
    found = wire.play_tricks(inputs, scratch, every=plan.tricks)
    yield {
        **dataclasses.asdict(found),
        "name": "a download over HTTP",
        "figures": f"{found.tries} tricks: {found.survived} survived, {found.refused} refused, "
        f"{found.resumed} resumed",
    }


KINDS = {
    "kills": run_kills,
    "days": run_days,
    "power": run_power,
    "disk": run_disk,
    "crowds": run_crowds,
    "flips": run_flips,
    "wire": run_wire,
}


def main() -> int:
    """Run the kinds asked for; exit with 1 if anything was found that should not be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", action="append", choices=KINDS, metavar="KIND")
    parser.add_argument("--quick", action="store_true", help="a small part of everything")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not is_supported():
        print("faults are injected with ptrace and seccomp: Linux on x86_64", file=sys.stderr)
        return 2
    plan = QUICK if arguments.quick else FULL
    # In memory, where there is such a file system: thousands of worlds are written.
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix="faults-", dir=home))
    results: dict[str, Any] = {}
    n_failures = 0
    try:
        inputs = Inputs(scratch / "inputs")
        scenarios.warm_up(scratch / "warm", inputs)
        for kind in arguments.only or KINDS:
            started = time.monotonic()
            rows = []
            print(f"{kind}: {KINDS[kind].__doc__}")
            for row in KINDS[kind](inputs, scratch / kind, plan):
                rows.append(row)
                print(f"  {row['name']:<44} {row['figures']}, {len(row['failures'])} wrong")
                for failure in row["failures"][:5]:
                    print(f"      {failure[:2000]}")
                sys.stdout.flush()
            n_failures += sum(len(row["failures"]) for row in rows)
            results[kind] = {"seconds": round(time.monotonic() - started), "rows": rows}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if arguments.json:
        head = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "quick": arguments.quick,
        }
        arguments.json.write_text(json.dumps({**head, **results}, indent=2) + "\n")
    print(f"{n_failures} wrong")
    return int(n_failures > 0)


if __name__ == "__main__":
    sys.exit(main())
