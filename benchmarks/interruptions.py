"""What does an interruption cost, and what does it cost to be ready for one?

    python -m benchmarks.interruptions [--repeats 3] [--pairs 3] [--json FILE]

*Restarts.* An expert for the shipped backbone is trained in one and in two processes over loopback,
as `composable train` does. One of them gets SIGKILL; when all have ended, all are started again.
Measured is the time from the signal to the end of all processes, and from there to the end of the
first new step, with the cache of compiled programs and without it, in turns.

*Overhead.* As many steps as lie between two checkpoints are trained with a folder for checkpoint,
curves and ledger, and without one, in turns, in one process. Counted is everything from the end of
the first step until the checkpoint is whole on disk. The target is 2 % of a step.

What is not measured in a call, by --processes without numbers or --pairs 0, is kept from the file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from benchmarks.environment import describe_environment
from composable.corpora.recipe import shipped_folder
from tests.support.servers import free_port

BACKBONE: Final = "tiny-bytes"
TEXT: Final = shipped_folder("legal") / "text" / "train.jsonl"
# The first kill comes after the first checkpoint, so that the restart restores one.
EVERY: Final = 20
TARGET: Final = 0.02
COMPILED: Final = "/jax/core/compile/backend_compile_duration"
READ: Final = "/jax/compilation_cache/cache_hits"


def train_member(folder: Path) -> None:
    """Train in this process until it is killed; print a line at the end of every step."""
    import jax

    seen: Counter[str] = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: seen.update([event])
    )

    from composable.assembly.backbones import load_backbone
    from composable.assembly.compile_memory import schedule_for_memory
    from composable.parallel import start_processes
    from composable.workflows.train import expert_config, train_expert

    schedule_for_memory()
    start_processes()
    loaded = load_backbone(BACKBONE)
    cfg = expert_config(100_000, backbone=loaded.backbone)
    # The figures of every step are fetched, so that a step that is reported is done.
    cfg = dataclasses.replace(cfg, checkpoint_every=EVERY, log_every=1)

    def report(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if stage == "body and scout" and figures:
            n_compiled = seen[COMPILED] - seen[READ]
            line = {"step": done, "at": time.monotonic(), "compiled": n_compiled}
            print(json.dumps(line), flush=True)

    train_expert(loaded, folder, [TEXT], cfg, progress=report)


def write_expert(folder: Path) -> None:
    """Write the manifest of an expert for the shipped backbone."""
    from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
    from composable.packaging.manifests.manifest import BodySpec, InterfaceNeed, Manifest
    from composable.packaging.versions.constraint import Constraint
    from composable.packaging.versions.version import Version

    interface = read_interface(find_backbone(BACKBONE))
    manifest = Manifest(
        name="measured",
        version=Version("1.0.0"),
        backbone=BACKBONE,
        license="Apache-2.0",
        interface=InterfaceNeed(name=interface.name, requires=Constraint("*")),
        body=BodySpec(kind="ffn", rank=None, dtype="F32"),
        scout_width=64,
    )
    folder.mkdir(parents=True)
    (folder / "expert.toml").write_text(manifest.to_toml())


class Group:
    """The processes of one start of a run.

    Args:
        folder: The expert.
        n: Number of processes.
        cache: Folder of compiled programs; None for none.
        log: Where they write their errors.
    """

    def __init__(self, folder: Path, n: int, cache: Path | None, log: IO[bytes]) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        env["JAX_PLATFORMS"] = "cpu"
        if cache is None:
            env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        else:
            env["XDG_CACHE_HOME"] = str(cache)
        if n > 1:
            env["COMPOSABLE_COORDINATOR"] = f"127.0.0.1:{free_port()}"
            env["COMPOSABLE_PROCESSES"] = str(n)
        command = [sys.executable, "-m", __spec__.name, "--member", str(folder)]
        self.members = [
            subprocess.Popen(
                command,
                env={**env, "COMPOSABLE_PROCESS": str(index)} if n > 1 else env,
                stdout=subprocess.PIPE,
                stderr=log,
            )
            for index in range(n)
        ]

    def read_step(self) -> dict[str, Any]:
        """Return what process 0 reports of its next step."""
        out = self.members[0].stdout
        assert out is not None
        for line in out:
            if line.startswith(b"{"):  # gloo prints there, too
                step: dict[str, Any] = json.loads(line)
                return step
        raise RuntimeError(f"a process ended: {[member.poll() for member in self.members]}")

    def kill_last(self) -> tuple[float, float]:
        """Kill one process by SIGKILL; return when that was, and when all had ended."""
        at = time.monotonic()
        self.members[-1].send_signal(signal.SIGKILL)
        for member in self.members:
            member.wait()
        return at, time.monotonic()

    def end(self) -> None:
        """Kill what is left."""
        for member in self.members:
            member.kill()
            member.wait()
            assert member.stdout is not None
            member.stdout.close()


def measure_restarts(n: int, repeats: int, scratch: Path) -> list[dict[str, Any]]:
    """Return what every kill of a run cost, half of them with the cache."""
    folder, cache, rows = scratch / "expert", scratch / "cache", []
    write_expert(folder)
    with (scratch / "log").open("wb") as log:
        group = Group(folder, n, cache, log)
        try:
            while not any((folder / ".work" / "checkpoints").glob(f"{EVERY}/_CHECKPOINT*")):
                group.read_step()
            # The first restart compiles what only a restart runs.
            for number, uses_cache in enumerate([True, *[False, True] * repeats]):
                killed, ended = group.kill_last()
                group.end()
                group = Group(folder, n, cache if uses_cache else None, log)
                first = group.read_step()
                row = {
                    "processes": n,
                    "cache": uses_cache,
                    "ended": round(ended - killed, 2),
                    "first step": round(first["at"] - killed, 2),
                    "compiled": first["compiled"],
                    "step": first["step"],
                }
                print(row, flush=True)
                if number:
                    rows.append(row)
        finally:
            group.end()
    return rows


def measure_overhead(pairs: int, scratch: Path) -> list[dict[str, Any]]:
    """Return time and processor time of the steps between two checkpoints, with and without one."""
    from flax import nnx

    from composable.assembly.backbones import load_backbone
    from composable.assembly.experts import make_expert
    from composable.packaging.manifests.manifest import Manifest
    from composable.training.data import batches, token_stream
    from composable.training.objectives import expert_objective
    from composable.training.optimizers import muon
    from composable.workflows.train import expert_config, read_texts

    write_expert(scratch / "expert")
    loaded = load_backbone(BACKBONE)
    cfg = expert_config(1, backbone=loaded.backbone)
    cfg = dataclasses.replace(cfg, steps=cfg.checkpoint_every)
    expert = make_expert(loaded.backbone, Manifest.read(scratch / "expert"), cfg.seed)
    graph, params = nnx.split(expert)
    # One objective and one optimiser: what is compiled once serves all runs.
    objective, optimizer = expert_objective(graph), muon(cfg)
    stream_M = token_stream(read_texts([TEXT], "measured")[0], loaded.tokenizer)

    def run(directory: Path | None) -> dict[str, float]:
        from composable.training.loop import fit

        begun: list[tuple[float, float]] = []

        def note(step: int, *_: Any) -> None:
            if step == 1:
                begun.append((time.perf_counter(), time.process_time()))

        data = batches(stream_M, window=cfg.window, batch_size=cfg.batch_size, seed=cfg.seed)
        fit(
            objective,
            params,
            loaded.backbone,
            data,
            cfg,
            optimizer=optimizer,
            directory=directory,
            progress=note,
        )
        ((wall, cpu),) = begun
        return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    run(scratch / "first")  # compiles, and imports what is imported late
    rows = []
    for index in range(pairs):
        arms = [("without", None), ("with", scratch / f"run-{index}")]
        found = {name: run(folder) for name, folder in (arms if index % 2 else arms[::-1])}
        ledger = read_ledger(scratch / f"run-{index}" / "goodput.jsonl")
        rows.append(
            {
                "steps": cfg.steps,
                "with": round(found["with"]["seconds"], 3),
                "without": round(found["without"]["seconds"], 3),
                "overhead": round(found["with"]["seconds"] / found["without"]["seconds"] - 1, 4),
                "cpu overhead": round(found["with"]["cpu"] / found["without"]["cpu"] - 1, 4),
                "checkpoint": round(ledger["checkpoint"], 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def read_ledger(path: Path) -> Counter[str]:
    """Return the seconds of each kind in a ledger."""
    seconds: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        seconds.update(json.loads(line)["seconds"])
    return seconds


def summarise(
    restarts: Sequence[Mapping[str, Any]], overheads: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return medians and spreads."""

    def spread(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
        values = [row[key] for row in rows]
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    groups = sorted({(row["processes"], row["cache"]) for row in restarts})
    return {
        "restarts": [
            {
                "processes": n,
                "cache": cache,
                **{
                    key: spread(
                        [r for r in restarts if (r["processes"], r["cache"]) == (n, cache)], key
                    )
                    for key in ("ended", "first step", "compiled")
                },
            }
            for n, cache in groups
        ],
        "overhead": {
            key: spread(overheads, key)
            for key in ("steps", "without", "overhead", "cpu overhead", "checkpoint")
        }
        if overheads
        else {},
    }


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="kills with and without the cache")
    parser.add_argument("--pairs", type=int, default=3, help="runs with and without checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--member", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member:
        train_member(arguments.member)
        return
    head = {
        **describe_environment(),
        "backbone": BACKBONE,
    }
    print(*(f"{key} {value}" for key, value in head.items()), sep=" | ", flush=True)
    known = (
        json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    )
    restarts = [
        row for row in known.get("kills", []) if row["processes"] not in arguments.processes
    ]
    overheads = [] if arguments.pairs else known.get("runs", [])
    for n in arguments.processes:
        with _scratch() as scratch:
            restarts += measure_restarts(n, arguments.repeats, scratch)
    if arguments.pairs:
        with _scratch() as scratch:
            overheads = measure_overhead(arguments.pairs, scratch)
    restarts.sort(key=lambda row: row["processes"])
    figures = {**head, **summarise(restarts, overheads), "kills": restarts, "runs": overheads}
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if overheads and figures["overhead"]["overhead"]["median"] > TARGET:
        print(f"more than {TARGET:.0%}", file=sys.stderr)


if __name__ == "__main__":
    main()
