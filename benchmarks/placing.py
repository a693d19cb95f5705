"""What it costs to install a file as a clone, a hard link or a copy, and to check it later.

Question: experts are placed into every project from one store. A hard link costs nothing, but an
edit in one project changes the others; a copy costs time and space; a clone needs neither, where
the file system can. And what do the two checks cost: the state of a file, and its digest?

    python -m benchmarks.placing [--folder DIR] [--out FILE]

The bound of a copy is writing the same bytes and syncing them, that of a digest is SHA-256 over
bytes in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from composable.files import cloning
from composable.files.blobs import digest_file
from composable.packaging.install.snapshot import inspect_files, record_files

SIZES = (100_000, 10_000_000, 100_000_000)
REPEATS = 7


def measure(run: Callable[[int], object]) -> dict[str, float]:
    """Return the median and the spread of the seconds of a call, after one call to warm up."""
    run(0)
    seconds = []
    for number in range(1, REPEATS + 1):
        start = time.perf_counter()
        run(number)
        seconds.append(time.perf_counter() - start)
    return {"median_s": statistics.median(seconds), "spread_s": max(seconds) - min(seconds)}


def copy(source: Path, target: Path) -> None:
    """Copy a file and sync it."""
    with source.open("rb") as file, target.open("xb") as other:
        while data := file.read(1 << 20):
            other.write(data)
        other.flush()
        os.fsync(other.fileno())


def clone(source: Path, target: Path) -> None:
    """Clone a file and sync it."""
    with source.open("rb") as file:
        if not cloning._clone(file, target):
            raise OSError("this file system cannot clone files")


def measure_size(folder: Path, size: int) -> dict[str, object]:
    """Return the figures for a file of one size."""
    data = os.urandom(size)
    source = folder / f"source-{size}"
    source.write_bytes(data)
    ways: dict[str, Callable[[Path, Path], object]] = {
        "clone": clone,
        "hard link": os.link,
        "copy": copy,
    }
    found: dict[str, object] = {"bytes": size}
    for way, place in ways.items():
        try:
            found[way] = measure(lambda n, p=place, w=way: p(source, folder / f"{w}-{size}-{n}"))
        except OSError as error:
            found[way] = str(error)
    digest = digest_file(source)
    record_files(folder, [source.name])
    files = {source.name: digest}
    found["check of the state"] = measure(lambda _: inspect_files(folder, files))
    found["check of the digest"] = measure(lambda _: digest_file(source))
    found["bound of the digest"] = measure(lambda _: hashlib.sha256(data).digest())
    return found


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m " + __spec__.name)
    parser.add_argument("--folder", type=Path, help="a folder of the file system to measure")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/placing.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sizes = [measure_size(Path(folder), size) for size in SIZES]
    result = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "repeats": REPEATS,
        "sizes": sizes,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
