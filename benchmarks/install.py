"""How fast is installing? A large expert, from a folder and from nginx on loopback.

The floor is what cannot be left out: reading the bytes once, hashing them, writing them and making
them safe with fsync, by the plainest loop. The peers are `cp` and `curl`, followed by `sha256sum`
and `sync`: what one would type. Everything is measured in one run, in turn, each in a process of
its own; the source is in the page cache, the target is on the disk that --folder names.

    python -m benchmarks.install [--gigabytes 1] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from composable.interface import RouterInterface, body_signature, scout_signature
from composable.packaging import (
    Lock,
    Project,
    Requirement,
    lock_project,
    open_for_publishing,
    write_tensors,
)
from tests.support.servers import run_nginx

ANY_DIGEST = "sha256:" + "0" * 64
SLOT_BYTES = 3 * 1024 * 4096 * 4
TARGET_RATIO = 0.8
TARGET_BYTES = 200e6

FLOOR = """
    import hashlib, os, sys
    state, buffer = hashlib.sha256(), bytearray(1 << 20)
    with open(sys.argv[1], "rb", buffering=0) as source, open(sys.argv[2], "wb", buffering=0) as to:
        while n := source.readinto(buffer):
            view = memoryview(buffer)[:n]
            state.update(view)
            to.write(view)
        os.fsync(to.fileno())
    print(state.hexdigest())
"""
INSTALL = """
    import pathlib, sys
    from composable.packaging import Project, Store, sync_project
    sync_project(Project.read(pathlib.Path(sys.argv[1])), store=Store(sys.argv[2]))
"""


def make_interface(n_slots: int) -> RouterInterface:
    return RouterInterface(
        name="large",
        version="1.0.0",
        **dict.fromkeys(("backbone", "trunk", "tokenizer", "class_map", "anchor"), ANY_DIGEST),
        vocab_size=256,
        n_classes=256,
        d_model=1024,
        d_ff=4096,
        tap=1,
        slots=tuple(range(1, 1 + n_slots)),
        scout_max_width=64,
        lora_max_rank=8,
        discount=0.98,
        top_k=2,
        backbone_prior=0.99,
        switch_rate=0.01,
        output_bounds=(1.0,) * n_slots,
    )


def publish_large(home: Path, gigabytes: float) -> tuple[Path, int]:
    """Publish an expert of about that size; return the registry and the bytes of its body."""
    interface = make_interface(max(1, round(gigabytes * 1e9 / SLOT_BYTES)))
    folder = home / "large"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file, specs in (
        ("body.safetensors", body_signature(interface, "ffn", None)),
        ("scout.safetensors", scout_signature(interface, 64)),
    ):
        tensors = {
            n: rng.standard_normal(s.shape, dtype=np.float32) * 0.01 for n, s in specs.items()
        }
        write_tensors(folder / file, tensors)
    (folder / "expert.toml").write_text(
        '[expert]\nname = "large"\nversion = "1.0.0"\nbackbone = "large"\n'
        '[interface]\nname = "large"\nrequires = "^1"\n'
        '[body]\nkind = "ffn"\n[scout]\nwidth = 64\n'
    )
    open_for_publishing(home / "registry").publish(folder, interface=interface)
    return home / "registry", (folder / "body.safetensors").stat().st_size


def run_measured(command: list[str]) -> tuple[float, int]:
    """Run a command; return its wall seconds and its peak memory in bytes."""
    done = subprocess.run(
        ["/usr/bin/env", sys.executable, "-c", textwrap.dedent(MEASURE), *command],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, peak = done.stderr.split()[-2:]
    return float(seconds), int(peak) * 1024


MEASURE = """
    import resource, subprocess, sys, time
    start = time.perf_counter()
    subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        home = Path(name)
        registry, size = publish_large(home, arguments.gigabytes)
        with run_nginx(registry, home / "nginx") as nginx:
            rows = measure_all(home, registry, nginx.url, size, arguments.repeats)
    return report(rows, size, arguments.repeats, arguments.json)


def measure_all(
    home: Path, registry: Path, url: str, size: int, repeats: int
) -> dict[str, list[tuple[float, int]]]:
    """Return seconds and memory of every way, in turn, so that all see the same machine."""
    source = max((registry / "blobs").glob("*/*"), key=lambda path: path.stat().st_size)
    remote = f"{url}/{source.relative_to(registry)}"
    target = home / "target"
    target.mkdir()
    copy = str(target / "copy")
    check = f"sha256sum {copy} && sync {copy}"
    python = [sys.executable, "-c"]
    ways: dict[str, Callable[[], list[str]]] = {
        "floor": lambda: [*python, textwrap.dedent(FLOOR), str(source), copy],
        "cp, sha256sum, sync": lambda: ["sh", "-c", f"cp {source} {copy} && {check}"],
        "curl, sha256sum, sync": lambda: ["sh", "-c", f"curl -so {copy} {remote} && {check}"],
        "install from the folder": lambda: [*python, textwrap.dedent(INSTALL), *project(registry)],
        "install from nginx": lambda: [*python, textwrap.dedent(INSTALL), *project(url)],
    }

    def project(location: object) -> list[str]:
        made = Project.create(target / "project", "large", {"r": str(location)})
        made = made.add(Requirement.parse("large"))
        lock_project(made)
        assert Lock.read(made.root).versions
        return [str(made.root), str(target / "store")]

    rows: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
    for _ in range(repeats + 1):  # the first is to warm up
        for way, command in ways.items():
            rows[way].append(run_measured(command()))
            shutil.rmtree(target)
            target.mkdir()
            subprocess.run(["sync"], check=True)
    return {way: found[1:] for way, found in rows.items()}


def report(
    rows: dict[str, list[tuple[float, int]]], size: int, repeats: int, json_file: Path | None
) -> int:
    print(f"{platform.machine()}, Python {platform.python_version()}; {size / 1e9:.2f} GB,")
    print(f"median (min-max) of {repeats}; ratio: the floor's median over the row's")
    floor = statistics.median(seconds for seconds, _ in rows["floor"])
    data: dict[str, Any] = {"bytes": size, "repeats": repeats, "rows": {}}
    met = True
    for way, found in rows.items():
        seconds = [s for s, _ in found]
        median, peak = statistics.median(seconds), max(m for _, m in found)
        ratio = floor / median
        data["rows"][way] = {
            "median_s": median,
            "min_s": min(seconds),
            "max_s": max(seconds),
            "ratio": ratio,
            "peak_bytes": peak,
        }
        print(
            f"{way:<26} {median:6.2f} s ({min(seconds):.2f}-{max(seconds):.2f})"
            f" {size / 1e6 / median:7.0f} MB/s   ratio {ratio:.2f}   {peak / 1e6:5.0f} MB"
        )
        if way.startswith("install"):
            met &= ratio >= TARGET_RATIO and peak <= TARGET_BYTES
    if json_file:
        json_file.write_text(json.dumps(data, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
