"""How long does resolving take? 2,000 packages of 20 versions; 10, 50 and 100 requirements.

Every universe has a planted solution, so an answer exists; ranges are otherwise drawn so that the
newest versions often clash. Packages build on packages of lower layers or, with --tangled, on any,
in cycles too. resolvelib, which pip uses, solves the same universe in the same run under the same
policy. The bound is reading: the time to look at the newest version of everything reachable once.
Times are CPU seconds, for a solver is one thread; the garbage collector is kept from walking over
the universes that wait in memory, for a real process holds one.

    python benchmarks/resolver.py [--packages 2000] [--repeats 5] [--tangled] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import resolvelib

from composable.packaging import Constraint, Requirement, Universe, Version, resolve
from composable.packaging.resolution.universe import Candidate

N_LAYERS = 5
TARGET_SECONDS = {10: 0.1, 50: 0.3, 100: 3.0}
PEER_LIMIT_SECONDS = 20.0


def make_universe(
    n_packages: int, n_versions: int, n_roots: int, seed: int, *, is_tangled: bool = False
) -> Universe:
    """Return a universe with a planted solution.

    Versions of all packages grow older together: version i of one needs versions near i of others,
    as releases of one time do, with enough scatter that not everything newest fits.
    """
    rng = random.Random(seed)
    versions = [Version(f"{1 + i // 5}.{i % 5}.0") for i in range(n_versions)]
    planted = [rng.randrange(n_versions // 2, n_versions) for _ in range(n_packages)]
    packages: dict[str, list[Candidate]] = {}
    for package in range(n_packages):
        below = package * N_LAYERS // n_packages * n_packages // N_LAYERS
        below = n_packages if is_tangled else below
        others = rng.sample(range(below), min(below, rng.randint(0, 4)))
        candidates = []
        for index, version in enumerate(versions):
            requires = {}
            for other in others:
                if other == package or rng.random() < 0.1:
                    continue
                near = min(max(index + rng.randint(-6, 2), 0), n_versions - 1)
                range_ = make_range(rng, versions, near)
                if index == planted[package]:
                    while not range_.contains(versions[planted[other]]):
                        range_ = make_range(rng, versions, rng.randint(0, planted[other]))
                requires[f"package-{other}"] = range_
            candidates.append(Candidate(version=version, requires=requires))
        packages[f"package-{package}"] = candidates
    roots = []
    for package in rng.sample(range(n_packages), n_roots):
        range_ = make_range(rng, versions, rng.randint(0, planted[package]))
        while not range_.contains(versions[planted[package]]):
            range_ = make_range(rng, versions, rng.randint(0, planted[package]))
        roots.append(Requirement(f"package-{package}", range_))
    return Universe(packages=packages, requires=roots)


def make_range(rng: random.Random, versions: list[Version], index: int) -> Constraint:
    base = versions[index]
    kind = rng.random()
    if kind < 0.5:
        return Constraint(f"^{base}")
    if kind < 0.8:
        return Constraint(f">={base}")
    top = versions[min(index + rng.randint(3, 8), len(versions) - 1)]
    return Constraint(f">={base}, <={top}")


class Peer(resolvelib.AbstractProvider[Requirement, tuple[str, Candidate], str]):
    """The same policy for resolvelib: newest first."""

    def __init__(self, universe: Universe) -> None:
        self.newest_first = {
            name: [(name, c) for c in sorted(found, key=lambda c: c.version, reverse=True)]
            for name, found in universe.packages.items()
        }
        self.deadline = time.process_time() + PEER_LIMIT_SECONDS

    def identify(self, requirement_or_candidate: Any) -> str:
        if isinstance(requirement_or_candidate, Requirement):
            return requirement_or_candidate.name
        return str(requirement_or_candidate[0])

    def get_preference(
        self,
        identifier: str,
        resolutions: Any,
        candidates: Any,
        information: Any,
        *_: Any,
        **__: Any,
    ) -> Any:
        if time.process_time() > self.deadline:
            raise TimeoutError
        return (sum(1 for _ in information[identifier]) * -1, identifier)

    def find_matches(self, identifier: str, requirements: Any, incompatibilities: Any) -> Any:
        wanted = [r.constraint for r in requirements[identifier]]
        refused = {candidate.version for _, candidate in incompatibilities[identifier]}
        return [
            match
            for match in self.newest_first[identifier]
            if match[1].version not in refused
            and all(range_.contains(match[1].version) for range_ in wanted)
        ]

    def is_satisfied_by(self, requirement: Requirement, candidate: tuple[str, Candidate]) -> bool:
        return requirement.constraint.contains(candidate[1].version)

    def get_dependencies(self, candidate: tuple[str, Candidate]) -> list[Requirement]:
        return [Requirement(name, range_) for name, range_ in candidate[1].requires.items()]


def solve_with_peer(universe: Universe) -> int:
    """Return how many packages resolvelib chose, or 0 when it gave up."""
    resolver = resolvelib.Resolver(Peer(universe), resolvelib.BaseReporter())
    try:
        return len(resolver.resolve(list(universe.requires), max_rounds=1_000_000).mapping)
    except (resolvelib.ResolutionImpossible, resolvelib.ResolutionTooDeep, TimeoutError):
        return 0


def measure(solve: Callable[[Universe], int], universes: list[Universe]) -> dict[str, Any]:
    """Return times in seconds, one per universe, and the sizes of the answers."""
    seconds, sizes = [], []
    for universe in universes:
        start = time.process_time()
        sizes.append(solve(universe))
        seconds.append(time.process_time() - start)
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "sizes": sizes,
        "failed": sizes.count(0),
    }


def read_answer(universe: Universe) -> int:
    """Look at each candidate of the answer and its requirements once: the least there is to do."""
    names = [r.name for r in universe.requires]
    seen: set[str] = set()
    while names:
        name = names.pop()
        if name not in seen:
            seen.add(name)
            candidate = max(universe.packages[name], key=lambda c: c.version)
            names += [
                n for n, r in candidate.requires.items() if r.contains(candidate.version) or n
            ]
    return len(seen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=int, default=2000)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--roots", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--repeats", type=int, default=5, help="universes per row")
    parser.add_argument("--tangled", action="store_true", help="let packages need any other")
    parser.add_argument("--no-peer", action="store_true", help="leave resolvelib out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    resolve(make_universe(20, 5, 3, seed=0))  # warm up: imports
    print(f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}")
    print(f"{arguments.packages:,} packages x {arguments.versions} versions, median (min-max) of")
    print(
        f"{arguments.repeats} universes, each with a solution; resolvelib {resolvelib.__version__}"
    )
    heads = ("roots", "chosen", "composable", "resolvelib", "reading", "target")
    print("{:>5} {:>7} {:>24} {:>34} {:>9} {:>7}".format(*heads))
    rows = []
    for n_roots in arguments.roots:
        universes = [
            make_universe(
                arguments.packages, arguments.versions, n_roots, seed, is_tangled=arguments.tangled
            )
            for seed in range(arguments.repeats)
        ]
        gc.collect()
        gc.freeze()
        ours = measure(lambda universe: len(resolve(universe).packages), universes)
        peer = None if arguments.no_peer else measure(solve_with_peer, universes)
        bound = measure(read_answer, universes)
        target = TARGET_SECONDS.get(n_roots)
        rows.append(
            {"roots": n_roots, "ours": ours, "peer": peer, "reading": bound, "target_s": target}
        )
        print(
            f"{n_roots:>5} {statistics.median(ours['sizes']):>7.0f} {show(ours):>24} "
            f"{show(peer):>34} {bound['median_s'] * 1e3:>6.2f} ms {target or '':>5} s",
            flush=True,
        )
    if arguments.json:
        head = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "packages": arguments.packages,
            "versions": arguments.versions,
            "resolvelib": resolvelib.__version__,
        }
        arguments.json.write_text(json.dumps({**head, "rows": rows}, indent=2) + "\n")
    met = [r["target_s"] is None or r["ours"]["max_s"] <= r["target_s"] for r in rows]
    return 0 if all(met) and not any(r["ours"]["failed"] for r in rows) else 1


def show(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    failed = f" {row['failed']} gave up" if row["failed"] else ""
    return f"{row['median_s']:.3f} ({row['min_s']:.3f}-{row['max_s']:.3f}){failed}"


if __name__ == "__main__":
    sys.exit(main())
