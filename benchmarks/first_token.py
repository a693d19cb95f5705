"""How long from pressing enter to the first token, and in a running process for long prompts?

`composable generate` runs in a process of its own, first with an empty cache of compiled programs
and then again and again; beside it `python -c "import jax"`, which no start is faster than. A
running process then gets prompts of several lengths, the second one to get them: the first compiles
the programs of longer chunks. Targets: 3 s from the second start on, and 1 s in a running process.

    python -m benchmarks.first_token [--backbone NAME|DIR] [--experts 2] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.start import publish_experts
from composable.packaging.manifests.backbone_folder import find_backbone, read_interface

START_TARGET_SECONDS = 3.0
RUNNING_TARGET_SECONDS = 1.0
# Counts programs, and those that were compiled, and prints both when the command ends.
COUNT = """
import atexit, sys
from collections import Counter
import jax
seen = Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.update([event]))
n_programs = lambda: seen["/jax/core/compile/backend_compile_duration"]
n_read = lambda: seen["/jax/compilation_cache/cache_hits"]
atexit.register(lambda: print(n_programs(), n_programs() - n_read(), file=sys.stderr))
from composable.cli.main import run
run()
"""
# Streams prompts of given lengths from one model; prints the seconds to the first token of each.
RUNNING = """
import json, sys, time
import composable as cx
model = cx.load()
seconds = []
for length in json.loads(sys.argv[1]):
    start = time.perf_counter()
    next(model.stream("the " * (length // 4) + "the "[: length % 4], 2))
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def time_first_byte(command: list[str], folder: Path) -> dict[str, float]:
    """Return the seconds until a command writes its first byte, and what it took until its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        counted = process.stderr.read().decode().split()
    if process.returncode:
        sys.exit(" ".join(counted))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    programs, compiled = map(int, counted[-2:]) if counted else (0, 0)
    return {"seconds": seconds, "cpu_seconds": cpu, "programs": programs, "compiled": compiled}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tiny-bytes", metavar="NAME|DIR")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    home = find_backbone(arguments.backbone)
    interface = read_interface(home)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The cache of programs starts empty, whatever is configured.
        for variable in [name for name in os.environ if name.startswith("JAX_")]:
            del os.environ[variable]
        os.environ |= {"COMPOSABLE_STORE": f"{name}/store", "XDG_CACHE_HOME": f"{name}/cache"}
        publish_experts(folder / "registry", folder / "experts", arguments.experts, interface)
        project = folder / "project"
        project.mkdir()
        composable = [sys.executable, "-m", "composable.cli"]
        for step in (
            ["init", "--backbone", str(home), "--registry", str(folder / "registry")],
            ["install", "-q", *(f"expert-{number}" for number in range(arguments.experts))],
        ):
            subprocess.run([*composable, *step], cwd=project, check=True, capture_output=True)
        prompt = "the " * 12 + "the"  # whole chunks and single tokens: both programs
        generate = [sys.executable, "-c", COUNT, "generate", prompt, "--max-tokens", "2"]
        jax = [sys.executable, "-c", "import jax; print()"]
        first = time_first_byte(generate, project)
        later, bare = [], []
        for _ in range(arguments.repeats):
            later.append(time_first_byte(generate, project))
            bare.append(time_first_byte(jax, project))
        lengths = [1, 10, 30, 63, 127, 255, 500]
        for _ in range(2):
            running = subprocess.run(
                [sys.executable, "-c", RUNNING, json.dumps(lengths)],
                cwd=project,
                check=True,
                capture_output=True,
            )
    seconds = dict(zip(lengths, json.loads(running.stdout), strict=True))
    return report(arguments, first, later, bare, seconds)


def report(
    arguments: argparse.Namespace,
    first: dict[str, float],
    later: list[dict[str, float]],
    bare: list[dict[str, float]],
    running: dict[int, float],
) -> int:
    """Print the figures, write them as JSON, and return 0 if the targets are met."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    date = datetime.date.today().isoformat()
    print(f"{machine}; {date}; {arguments.backbone}, {arguments.experts} experts")

    def row(what: str, runs: list[dict[str, Any]]) -> dict[str, float]:
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        walls = [run["seconds"] for run in runs]
        print(
            f"{what:<28} {middle['seconds']:6.2f} s ({min(walls):.2f}-{max(walls):.2f})  "
            f"{middle['cpu_seconds']:6.2f} s of CPU  {middle['compiled']:.0f} of "
            f"{middle['programs']:.0f} programs compiled"
        )
        return middle

    rows = {
        "first start": row("first start", [first]),
        "later starts": row("later starts", later),
        "import jax": row("python -c 'import jax'", bare),
    }
    for length, value in running.items():
        print(f"running, {length:>4} tokens         {value:6.2f} s")
    if arguments.json:
        data = {"machine": machine, "date": date, "starts": rows, "running_seconds": running}
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    met = (
        rows["later starts"]["seconds"] <= START_TARGET_SECONDS
        and rows["later starts"]["compiled"] == 0
        # The first prompts of a process trace its programs.
        and max(list(running.values())[2:]) <= RUNNING_TARGET_SECONDS
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
