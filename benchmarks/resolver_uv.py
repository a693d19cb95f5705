"""How does resolving compare with uv and resolvelib, on the same universe?

The universes of `benchmarks/resolver.py` are served to uv as a package index on loopback: the
simple API in JSON (PEP 691) with the metadata of every wheel beside it (PEP 658), ranges translated
exactly to PEP 440. Every answer is checked against the universe. What the columns hold:

- composable: the library call, on a universe in memory.
- composable, command: the process `composable resolve --universe FILE`: start, reading JSON,
  resolving, printing.
- resolvelib: the library call, under the same policy. It and uv are given --limit CPU seconds.
- uv, cold: `uv pip compile` with an empty cache: start, asking the index over HTTP, parsing
  metadata, resolving, printing. The index is served by Python, so the wall time is not uv's alone.
- uv, warm: the same with everything in its cache and --offline: start, reading the cache,
  resolving, printing.
- reading: the least there is to do; see `benchmarks/resolver.py`.

    pip install uv
    python -m benchmarks.resolver_uv [--roots 10 50 100] [--tangled] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import http.server
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import resolvelib

from benchmarks import resolver as single
from composable.packaging import Constraint, Universe, Version, resolve

COLUMNS = ("composable", "composable, command", "resolvelib", "uv, cold", "uv, warm", "reading")


@dataclasses.dataclass(frozen=True)
class Run:
    """One solve: CPU and wall seconds, and what was chosen; None where it gave up."""

    cpu_s: float
    wall_s: float
    chosen: Mapping[str, Version] | None


def translate(range_: Constraint) -> str:
    """Return a range in the words of PEP 440; only forms that the universes use."""
    parts = []
    for comparator in range_.comparators:
        numbers = f"{comparator.major}.{comparator.minor}.{comparator.patch}"
        if comparator.op == "^" and comparator.major > 0:
            parts += [f">={numbers}", f"<{comparator.major + 1}"]
        elif comparator.op in (">=", "<=") and comparator.patch is not None:
            parts.append(f"{comparator.op}{numbers}")
        else:
            raise ValueError(f"{range_} is not a range of these universes")
    return ",".join(parts)


def make_index(universe: Universe) -> dict[str, bytes]:
    """Return every page of a package index by its path."""
    pages = {}
    for name, candidates in universe.packages.items():
        files = []
        for candidate in candidates:
            file = f"{name.replace('-', '_')}-{candidate.version}-py3-none-any.whl"
            needs = [
                f"Requires-Dist: {n}{translate(r)}\n" for n, r in sorted(candidate.requires.items())
            ]
            head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {candidate.version}\n"
            pages[f"/files/{file}.metadata"] = (head + "".join(needs)).encode()
            files.append(
                {"filename": file, "url": f"/files/{file}", "hashes": {}, "core-metadata": True}
            )
        page = {"meta": {"api-version": "1.0"}, "name": name, "files": files}
        pages[f"/simple/{name}/"] = json.dumps(page).encode()
    return pages


def serve(pages: Mapping[str, bytes], port: Connection) -> None:
    """Answer requests for pages for ever; tell which port first."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet

        def do_GET(self) -> None:
            body = pages.get(self.path)
            self.send_response(404 if body is None else 200)
            kind = (
                "application/vnd.pypi.simple.v1+json" if "/simple/" in self.path else "text/plain"
            )
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("Cache-Control", "max-age=86400, immutable")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 1024  # uv asks for much at once

    server = Server(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def index_of(universe: Universe) -> Iterator[str]:
    """Serve a universe from another process; yield the URL of the index."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(make_index(universe), theirs), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/simple"
    finally:
        server.terminate()
        server.join()


def call(solve: Callable[[Universe], Mapping[str, Version] | None], universe: Universe) -> Run:
    """Measure a library."""
    cpu, wall = time.process_time(), time.perf_counter()
    chosen = solve(universe)
    return Run(time.process_time() - cpu, time.perf_counter() - wall, chosen)


def launch(
    command: list[str],
    read: Callable[[str], Mapping[str, Version]],
    env: Mapping[str, str],
    limit_s: float | None = None,
) -> Run:
    """Measure a process, with all its threads."""

    def limit() -> None:
        if limit_s is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit_s), math.ceil(limit_s) + 1))

    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=limit)
    wall = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    if done.returncode:
        why = "out of time" if done.returncode == -signal.SIGXCPU else done.stderr[-2000:]
        print(f"{Path(command[0]).name}: {why}", file=sys.stderr)
    return Run(cpu, wall, None if done.returncode else read(done.stdout))


def run_command(universe: Universe, folder: Path) -> Run:
    """Resolve with `composable resolve`."""
    path = folder / "universe.json"
    packages = {
        name: {
            str(c.version): {"requires": {n: str(r) for n, r in c.requires.items()}}
            for c in candidates
        }
        for name, candidates in universe.packages.items()
    }
    requires = {r.name: str(r.constraint) for r in universe.requires}
    path.write_text(json.dumps({"packages": packages, "requires": requires}))
    code = "from composable.cli.main import run; run()"
    command = [sys.executable, "-c", code, "resolve", "--universe", str(path)]

    def read(text: str) -> dict[str, Version]:
        return {name: Version(version) for name, version in json.loads(text)["packages"].items()}

    return launch(command, read, os.environ)


def run_uv(
    uv: str, universe: Universe, url: str, folder: Path, limit_s: float, *, is_offline: bool
) -> Run:
    """Resolve with `uv pip compile`, whose cache is in `folder`."""
    wanted = folder / "requirements.in"
    lines = [f"{r.name}{translate(r.constraint)}\n" for r in universe.requires]
    wanted.write_text("".join(lines))
    command = [
        *(uv, "pip", "compile", str(wanted), "--index-url", url, "--cache-dir", str(folder / "uv")),
        *("--no-config", "--no-header", "--no-annotate", "--no-build", "--quiet"),
        *("--python", sys.executable, *(["--offline"] if is_offline else [])),
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}

    def read(text: str) -> dict[str, Version]:
        pins = (line.split("==") for line in text.split() if "==" in line)
        return {name: Version(version) for name, version in pins}

    return launch(command, read, env, limit_s)


def is_solution(universe: Universe, chosen: Mapping[str, Version]) -> bool:
    """Say whether an answer meets every requirement and holds nothing that nobody wants."""
    wanted = [(r.name, r.constraint) for r in universe.requires]
    for name, version in chosen.items():
        candidate = next(c for c in universe.packages[name] if c.version == version)
        wanted += candidate.requires.items()
    names = {name for name, _ in wanted}
    return names == set(chosen) and all(range_.contains(chosen[name]) for name, range_ in wanted)


def solve_ours(universe: Universe) -> Mapping[str, Version]:
    return resolve(universe).packages


def solve_resolvelib(universe: Universe) -> Mapping[str, Version] | None:
    resolver = resolvelib.Resolver(single.Peer(universe), resolvelib.BaseReporter())
    try:
        mapping = resolver.resolve(list(universe.requires), max_rounds=1_000_000).mapping
    except (resolvelib.ResolutionImpossible, resolvelib.ResolutionTooDeep, TimeoutError):
        return None
    return {name: candidate.version for name, (_, candidate) in mapping.items()}


def measure(universe: Universe, uv: str, limit_s: float) -> dict[str, Run]:
    """Let everyone solve one universe."""
    with tempfile.TemporaryDirectory() as name, index_of(universe) as url:
        folder = Path(name)
        runs = {
            "composable": call(solve_ours, universe),
            "composable, command": run_command(universe, folder),
            "uv, cold": run_uv(uv, universe, url, folder, limit_s, is_offline=False),
            "uv, warm": run_uv(uv, universe, url, folder, limit_s, is_offline=True),
            "resolvelib": call(solve_resolvelib, universe),
        }
    cpu, wall = time.process_time(), time.perf_counter()
    single.read_answer(universe)
    return {
        **runs,
        "reading": Run(time.process_time() - cpu, time.perf_counter() - wall, None),
    }


def summarise(universes: list[Universe], runs: list[dict[str, Run]]) -> dict[str, Any]:
    """Return medians and spreads by column, and what became of the answers."""
    found: dict[str, Any] = {}
    for column in COLUMNS:
        cpu = [run[column].cpu_s for run in runs]
        wall = [run[column].wall_s for run in runs]
        answers = [
            (u, run[column].chosen, run["composable"].chosen)
            for u, run in zip(universes, runs, strict=True)
        ]
        solved = [(u, chosen, ours) for u, chosen, ours in answers if chosen is not None]
        found[column] = {
            "cpu_s": {"median": statistics.median(cpu), "min": min(cpu), "max": max(cpu)},
            "wall_s": {"median": statistics.median(wall), "min": min(wall), "max": max(wall)},
        }
        if column != "reading":
            found[column] |= {
                "solved": len(solved),
                "valid": sum(is_solution(universe, chosen) for universe, chosen, _ in solved),
                "same_as_ours": sum(chosen == ours for _, chosen, ours in solved),
                "chosen": [len(chosen) for _, chosen, _ in solved],
            }
    return found


def find_uv(given: str | None) -> str | None:
    """Return the path of uv: the one given, the one beside this Python, or the one on the path."""
    beside = Path(sys.executable).with_name("uv")
    return given or (str(beside) if beside.exists() else shutil.which("uv"))


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=int, default=2000)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--roots", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--repeats", type=int, default=5, help="universes per row")
    parser.add_argument("--tangled", action="store_true", help="let packages need any other")
    parser.add_argument("--limit", type=float, default=60, help="CPU seconds for each peer")
    parser.add_argument("--uv", metavar="PATH", help="the uv to measure")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    uv = find_uv(arguments.uv)
    if uv is None:
        print("uv is not here: `pip install uv`, or name one with --uv PATH.", file=sys.stderr)
        return 2
    single.PEER_LIMIT_SECONDS = arguments.limit
    resolve(single.make_universe(20, 5, 3, seed=0))  # warm up: imports
    version = subprocess.run([uv, "--version"], capture_output=True, text=True, check=True)
    head = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "uv": version.stdout.split()[1],
        "resolvelib": resolvelib.__version__,
        "packages": arguments.packages,
        "versions": arguments.versions,
        "tangled": arguments.tangled,
        "repeats": arguments.repeats,
        "limit_cpu_s": arguments.limit,
    }
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    rows = []
    for n_roots in arguments.roots:
        universes = [
            single.make_universe(
                arguments.packages, arguments.versions, n_roots, seed, is_tangled=arguments.tangled
            )
            for seed in range(arguments.repeats)
        ]
        gc.collect()
        gc.freeze()  # see benchmarks/resolver.py
        found = summarise(
            universes, [measure(universe, uv, arguments.limit) for universe in universes]
        )
        rows.append({"roots": n_roots, **found})
        print(f"\n{n_roots} roots{'CPU s':>28}{'wall s':>28}  solved valid same")
        for column in COLUMNS:
            row = found[column]
            seconds = f"{show(row['cpu_s']):>28}{show(row['wall_s']):>28}"
            counts = [row.get(key, "-") for key in ("solved", "valid", "same_as_ours")]
            print(
                f"{column:<20}{seconds}  {counts[0]:>6} {counts[1]:>5} {counts[2]:>4}", flush=True
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({**head, "rows": rows}, indent=2) + "\n")
    columns = [column for row in rows for column in COLUMNS if column != "reading"]
    wrong = any(row[c]["valid"] < row[c]["solved"] for row in rows for c in columns)
    gave_up = any(row["composable"]["solved"] < arguments.repeats for row in rows)
    return 1 if wrong or gave_up else 0


def show(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['min']:.3f}-{spread['max']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
