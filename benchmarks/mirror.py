"""How fast is a mirror? A large expert, from a folder, nginx and an OCI registry to a folder.

The floor is what cannot be left out: reading the bytes once, hashing them, writing them and making
them safe with fsync, by the plainest loop. Everything is measured in one run, in turn, each in a
process of its own; the source is in the page cache, the target is on the disk that --folder names.
A ratio is that of the floor's time to the row's in the same round.

    python -m benchmarks.mirror [--gigabytes 1] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.install import FLOOR, publish_large, run_measured
from composable.packaging import open_for_publishing, open_registry
from composable.packaging.install.mirror import mirror_registry
from tests.support.oci_registries import run_oci_registry
from tests.support.servers import run_nginx

TARGET_RATIO = 0.8
TARGET_BYTES = 200e6
MIRROR = """
    import sys
    from composable.packaging import open_for_publishing, open_registry
    from composable.packaging.install.mirror import mirror_registry
    done = mirror_registry(open_registry(sys.argv[1]), open_for_publishing(sys.argv[2]))
    assert len(done.releases) == int(sys.argv[3]), done
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
        with (
            run_nginx(registry, home / "nginx") as nginx,
            run_oci_registry(home / "oci") as host,
        ):
            oci = f"oci://{host}/experts"
            mirror_registry(open_registry(registry), open_for_publishing(oci))
            sources = {"folder": str(registry), "nginx": nginx.url, "OCI registry": oci}
            rows = measure_all(home, registry, sources, arguments.repeats)
    return report(rows, size, arguments.repeats, arguments.json)


def measure_all(
    home: Path, registry: Path, sources: dict[str, str], repeats: int
) -> dict[str, list[tuple[float, int]]]:
    """Return seconds and peak bytes of every way, in turn, so that all see the same machine."""
    large = max((registry / "blobs").glob("*/*"), key=lambda path: path.stat().st_size)
    target = home / "target"
    python = [sys.executable, "-c"]
    mirror = [*python, textwrap.dedent(MIRROR)]
    ways = {"floor": [*python, textwrap.dedent(FLOOR), str(large), str(target / "copy")]}
    ways |= {f"from {name}": [*mirror, at, str(target), "1"] for name, at in sources.items()}
    again = [*mirror, str(registry), str(home / "mirrored"), "0"]
    mirror_registry(open_registry(registry), open_for_publishing(home / "mirrored"))
    ways["nothing to copy"] = again
    rows: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
    for _ in range(repeats + 1):  # the first is to warm up
        for way, command in ways.items():
            target.mkdir()
            rows[way].append(run_measured(command))
            shutil.rmtree(target)
            subprocess.run(["sync"], check=True)
    return {way: found[1:] for way, found in rows.items()}


def report(
    rows: dict[str, list[tuple[float, int]]], size: int, repeats: int, json_file: Path | None
) -> int:
    at = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(f"{at}; {machine}; {size / 1e9:.2f} GB; median (min-max) of {repeats}")
    floors = [seconds for seconds, _ in rows["floor"]]
    data: dict[str, Any] = {
        "date": at, "machine": machine, "bytes": size, "repeats": repeats, "rows": {}
    }  # fmt: skip
    is_met = True
    for way, found in rows.items():
        seconds = [s for s, _ in found]
        ratios = [floor / s for floor, s in zip(floors, seconds, strict=True)]
        ratio, peak = statistics.median(ratios), max(m for _, m in found)
        median = statistics.median(seconds)
        data["rows"][way] = {
            "median_s": median,
            "min_s": min(seconds),
            "max_s": max(seconds),
            "ratio": ratio,
            "min_ratio": min(ratios),
            "max_ratio": max(ratios),
            "peak_bytes": peak,
        }
        print(
            f"{way:<18} {median:6.2f} s ({min(seconds):.2f}-{max(seconds):.2f})  ratio {ratio:.2f}"
            f" ({min(ratios):.2f}-{max(ratios):.2f})  {peak / 1e6:5.0f} MB"
        )
        if way.startswith("from "):
            is_met &= ratio >= TARGET_RATIO and peak <= TARGET_BYTES
    if json_file:
        json_file.write_text(json.dumps(data, indent=2) + "\n")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
