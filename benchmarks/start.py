"""How long does a command take to begin, and a project of 50 experts to look at or sync again?

Every command is a process of its own, beside `python -c pass` and `uv` (where it is on the PATH) in
the same run. A sync that has nothing to do is also watched: no connection, no file opened to write.

    python -m benchmarks.start [--experts 50] [--repeats 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

from composable.interface import RouterInterface, body_signature, scout_signature
from composable.packaging import open_for_publishing, write_tensors
from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
from tests.support.servers import run_nginx

HELP_TARGET_RATIO = 6.0
TREE_TARGET_SECONDS = 0.4
RESYNC_TARGET_SECONDS = 0.3
# Runs a command and prints what it would have asked of the network and written to the disk.
WATCH = """
    import os, sys
    seen = []
    def watch(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            seen.append(event)
        elif event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(f"write {arguments[0]}")
        elif event in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.utime"):
            seen.append(f"{event} {arguments[0]}")
    sys.dont_write_bytecode = True
    sys.argv = ["composable", *sys.argv[1:]]
    from composable.cli.main import run
    sys.addaudithook(watch)
    try:
        run()
    except SystemExit as error:
        assert not error.code, error.code
    print(len(seen), *seen, sep="\\n", file=sys.stderr)
"""


def publish_experts(registry: Path, home: Path, n_experts: int, interface: RouterInterface) -> None:
    """Publish experts that know nothing; each builds on the one before it, but for every tenth."""
    rng = np.random.default_rng(0)
    for number in range(n_experts):
        folder = home / f"expert-{number}"
        folder.mkdir(parents=True)
        for file, specs in (
            ("body.safetensors", body_signature(interface, "lora", 1)),
            ("scout.safetensors", scout_signature(interface, 1)),
        ):
            tensors = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in specs.items()}
            write_tensors(folder / file, tensors)
        requires = f'expert-{number - 1} = "^1"\n' if number % 10 else ""
        (folder / "expert.toml").write_text(
            f'[expert]\nname = "expert-{number}"\nversion = "1.0.0"\nbackbone = "tiny-bytes"\n'
            f'[interface]\nname = "{interface.name}"\nrequires = "^{interface.version}"\n'
            f'[body]\nkind = "lora"\nrank = 1\n[scout]\nwidth = 1\n[requires]\n{requires}'
        )
        open_for_publishing(registry).publish(folder, interface=interface)


def time_command(command: list[str], folder: Path, repeats: int) -> dict[str, Any]:
    """Return the wall seconds of a command, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return {
        "median_s": statistics.median(seconds[1:]),
        "min_s": min(seconds[1:]),
        "max_s": max(seconds[1:]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    composable = shutil.which("composable", path=Path(sys.executable).parent) or "composable"
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        os.environ["COMPOSABLE_STORE"] = str(home / "store")
        interface = read_interface(find_backbone("tiny-bytes"))
        publish_experts(home / "registry", home / "experts", arguments.experts, interface)
        project = home / "project"
        project.mkdir()
        with run_nginx(home / "registry", home / "nginx") as nginx:
            subprocess.run([composable, "init", "--registry", nginx.url], cwd=project, check=True)
            names = [f"expert-{number}" for number in range(arguments.experts)]
            subprocess.run([composable, "install", "-q", *names], cwd=project, check=True)
        # nginx is gone: what follows could not ask it for anything.
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "composable --help": [composable, "--help"],
            "composable sync --help": [composable, "sync", "--help"],
            "composable tree": [composable, "tree"],
            "composable sync, nothing to do": [composable, "sync"],
        }
        uv = shutil.which("uv")
        if uv:
            commands |= {"uv --help": [uv, "--help"]}
        rows = {
            what: time_command(command, project, arguments.repeats)
            for what, command in commands.items()
        }
        watched = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(WATCH), "sync"],
            cwd=project,
            check=True,
            capture_output=True,
            text=True,
        )
    return report(rows, watched.stderr.split("\n"), arguments)


def report(rows: dict[str, Any], watched: list[str], arguments: argparse.Namespace) -> int:
    print(f"{platform.machine()}, Python {platform.python_version()}; {arguments.experts} experts,")
    print(f"median (min-max) of {arguments.repeats} processes each")
    bare = rows["python -c pass"]["median_s"]
    for what, row in rows.items():
        row["ratio"] = row["median_s"] / bare
        spread = f"({row['min_s'] * 1e3:.0f}-{row['max_s'] * 1e3:.0f})"
        print(f"{what:<32} {row['median_s'] * 1e3:6.0f} ms {spread:<12} {row['ratio']:5.1f} x pass")
    n_touched = int(watched[0])
    print(
        f"a sync with nothing to do: {n_touched} connections and changes of the disk", *watched[1:]
    )
    if arguments.json:
        head = {"experts": arguments.experts, "repeats": arguments.repeats}
        data = {**head, "rows": rows, "resync_network_and_writes": n_touched}
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    met = (
        rows["composable --help"]["ratio"] <= HELP_TARGET_RATIO
        and rows["composable tree"]["median_s"] <= TREE_TARGET_SECONDS
        and rows["composable sync, nothing to do"]["median_s"] <= RESYNC_TARGET_SECONDS
        and n_touched == 0
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
