"""Is the resolver right? Thousands of random universes against brute force, and others' cases.

Of every universe, with yanks, prereleases, conflicts, extras, interfaces and locks:

- whether there is a solution, as exhaustive search and, conflicts left out, resolvelib find;
- that an answer is valid, holds nothing that nobody wants, and stays when it is locked;
- that no package of it could be what is preferred, locked or newer, with all else as it is;
- that every fact of a proof is true, and that the facts alone rule out every solution;
- that every cure that a story offers works.

Then the scenarios of packse and the fixtures of node-semver, with what we differ in on purpose. The
generator, the brute force and the fixtures are those of the tests.

    python -m benchmarks.resolver_correctness --universes 5000 --json FILE
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import resolvelib

from composable.errors import ConstraintError, ResolutionError, VersionError
from composable.packaging import Constraint, Version, resolve
from composable.packaging.resolution import pubgrub
from tests.support.node_semver import NODE_SEMVER, why_another_meaning, why_npm_only
from tests.support.resolution import brute_force, scenarios
from tests.support.resolution.checks import check_universe

MIN_SATISFIABLE_SHARE = 1 / 3
MAX_SHOWN = 10


def check_packse() -> list[dict[str, str]]:
    """Return for each scenario of packse what is expected and what came out."""
    rows = []
    for path in sorted(scenarios.PACKSE.rglob("*.toml")):
        expected, universe = scenarios.read_packse(path)
        try:
            found = {name: str(v) for name, v in resolve(universe).packages.items()}
        except ResolutionError:
            found = None
        is_same = (found is not None) == expected["satisfiable"]
        if is_same and found is not None and "packages" in expected:
            is_same = found == expected["packages"]
        rows.append({"scenario": path.stem, "outcome": "same" if is_same else f"wrong: {found}"})
    return rows


def check_node_semver() -> dict[str, collections.Counter[str]]:
    """Return for each kind of fixture how many agree, and why the others do not."""
    rows: dict[str, collections.Counter[str]] = {}
    for kind, cases in NODE_SEMVER.items():
        judge = judge_range if kind.startswith("range") else judge_version
        rows[kind] = collections.Counter(judge(kind, case) for case in cases)
    return rows


def judge_range(kind: str, case: Sequence[Any]) -> str:
    """Return `same`, `wrong: …`, or why we differ on a fixture of ranges."""
    range_, version = case[:2]
    refused = why_npm_only(range_, version)
    if refused:
        is_taken = attempt(lambda: Constraint(range_).contains(Version(version)))
        return f"wrong: {case} is taken" if is_taken is not None else str(refused)
    another = why_another_meaning(range_, case[2] if len(case) > 2 else None)
    if another:
        return str(another)
    held = attempt(lambda: Constraint(range_).contains(Version(version)))
    return "same" if held == (kind == "range-include") else f"wrong: {case}"


def judge_version(kind: str, case: Sequence[Any]) -> str:
    """Return `same`, `wrong: …`, or why we differ on a fixture of versions."""
    if kind in ("comparisons", "equality"):
        one, other = (Version(text.strip().lstrip("v= ")) for text in case[:2])
        is_same = one == other if kind == "equality" else one > other
        bare = all(attempt(lambda text=text: Version(text)) is not None for text in case[:2])
        if is_same and not bare:
            return "a leading `v`, `=` or blank"
        return "same" if is_same else f"wrong: {case}"
    version = attempt(lambda: Version(case[0]))
    if kind == "invalid-versions":
        if version is not None and case[1] == "too big":
            return "numbers above 2^53, a limit of JavaScript's"
        return "same" if version is None else f"wrong: {case}"
    if version is None:
        return "a leading `v`" if case[0].startswith("v") else f"wrong: {case}"
    parts = (*version.release, version.prerelease, version.build)
    wanted = (*case[1:4], *(".".join(map(str, part)) for part in case[4:6]))
    return "same" if parts == wanted else f"wrong: {case}"


def attempt(make: Callable[[], Any]) -> Any:
    """Return what `make` returns, or None where it refuses."""
    try:
        return make()
    except (ConstraintError, VersionError):
        return None


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--universes", type=int, default=5000)
    parser.add_argument("--first-seed", type=int, default=100_000, help="not those of the tests")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    start = time.process_time()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.universes):
        universe = brute_force.make_universe(seed)
        pubgrub.LOOK_AHEAD_AFTER = 0 if seed % 2 else 10  # the small are seldom hard enough for it
        counts["with extras asked for"] += any(r.extras for r in universe.requires)
        found = check_universe(universe, lambda what: counts.update([what]))
        wrong += [f"universe {seed}: {mistake}" for mistake in found]
    seconds = time.process_time() - start
    print(f"{arguments.universes:,} random universes, {seconds:.0f} CPU s")
    for what, n in sorted(counts.items()):
        print(f"  {what:<30} {n:>7,}")
    print(f"  {'mismatches':<30} {len(wrong):>7,}")
    print("".join(f"    {mistake}\n" for mistake in wrong[:MAX_SHOWN]), end="")
    packse, node_semver = check_packse(), check_node_semver()
    n_same = sum(row["outcome"] == "same" for row in packse)
    print(f"packse: {n_same} of {len(packse)} scenarios come out as written")
    strayed = [row for row in packse if row["outcome"] != "same"]
    print("".join(f"  {row['scenario']}: {row['outcome']}\n" for row in strayed), end="")
    print(f"node-semver: {sum(row.total() for row in node_semver.values())} fixtures")
    for kind, row in node_semver.items():
        print(f"  {kind}: {row['same']} of {row.total()} the same")
        for why, n in sorted(row.items()):
            if why != "same":
                print(f"    {n:>3}  {why}")
    share = counts["satisfiable"] / arguments.universes
    strays = [why for row in node_semver.values() for why in row if why.startswith("wrong")]
    if arguments.json:
        report = {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "resolvelib": resolvelib.__version__,
            "universes": arguments.universes,
            "first_seed": arguments.first_seed,
            "cpu_s": round(seconds, 1),
            "satisfiable_share": round(share, 4),
            "counts": dict(sorted(counts.items())),
            "mismatches": wrong,
            "packse": packse,
            "node_semver": node_semver,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    is_right = not wrong and not strays and n_same == len(packse)
    return 0 if is_right and share >= MIN_SATISFIABLE_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
