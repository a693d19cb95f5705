"""What an update of an expert costs to send, and what a low-rank update keeps of its gain.

Question: a contributor improves a published expert on new text. How many bytes does the second
generation send and an install download, without constraint (as a lossless delta) and as a low-rank
update (`train --update rank=N`)? Which share of the gain on held-out text does the low-rank update
keep, after as many steps on the same text? And how long does rebuilding a file take, beside copying
it, which is the floor?

    python -m benchmarks.updates [--expert NAME] [--steps N] [--ranks N ...] [--seeds N] [--json F]

The text is that in `experts/NAME/text`, which its recipe makes. The first generation is trained on
one half of the training documents, every second generation on the other half. Held-out text is that
of the recipe, which no training reads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, read_documents, write_documents
from composable.corpora.recipe import shipped_folder
from composable.files.atomic import CHUNK, Sink
from composable.files.delta import apply_delta, write_delta
from composable.packaging import (
    Project,
    Registry,
    Requirement,
    Store,
    lock_project,
    open_for_publishing,
    sync_project,
)
from composable.packaging.install.deltas import prepare_deltas
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.storage import Folder
from composable.workflows.heldout import measure_heldout
from composable.workflows.train import expert_config, train_expert
from composable.workflows.updates import read_factors
from composable.workflows.workspace import HELDOUT_FILE, WORK

REPEATS = 7
TENSORS = ("body.safetensors", "scout.safetensors")
MANIFEST = """[expert]
name = "{name}"
version = "{version}"
backbone = "tiny-bytes"
{more}
[interface]
name = "tiny-bytes"
requires = "^1"
[body]
kind = "ffn"
[scout]
width = 64
"""


class CountedFolder(Folder):
    """A registry's folder that counts the bytes that are read of its blobs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.n_bytes = 0

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from an offset on."""
        for data in super().stream(path, start):
            self.n_bytes += len(data)
            yield data


def train_generation(
    loaded: LoadedBackbone,
    folder: Path,
    texts: Path,
    heldout: Sequence[Document],
    steps: int,
    seed: int,
    *,
    parent: Path | None = None,
    rank: int | None = None,
) -> dict[str, Any]:
    """Train a generation; return its held-out bits, seconds and bytes."""
    folder.mkdir(parents=True)
    number = 0 if parent is None else 1
    more = "" if parent is None else f'derives-from = "{parent.name}@1.0.0"\n'
    name = folder.name if parent is None else parent.name
    text = MANIFEST.format(name=name, version=f"1.{number}.0", more=more)
    (folder / "expert.toml").write_text(text)
    cfg = expert_config(steps, seed, backbone=loaded.backbone)
    base = None if parent is None else load_expert(loaded, parent)
    record = train_expert(
        loaded,
        folder,
        [texts],
        cfg,
        parent=base,
        update_rank=rank,
        # Generations on the same text read the same outputs of the trunk.
        trunk=texts.parent / "trunk",
        salt=f"updates-{seed}",
    )
    # Measured on text that no generation saw, rather than on what this one held out.
    write_documents(folder / WORK / HELDOUT_FILE, heldout)
    bits = measure_heldout(loaded, folder, cfg, folder.parent / "heldout")
    return {
        "bits": bits.bits_per_token,
        "scout_bits": bits.scout_bits,
        "seconds": record.seconds,
        "bytes": sum((folder / file).stat().st_size for file in TENSORS),
    }


def publish(registry: Registry, folder: Path, loaded: LoadedBackbone, store: Store) -> int:
    """Publish an expert; return the bytes of tensor files or deltas that were sent."""
    packed = pack_expert(folder, interface=loaded.interface)
    with prepare_deltas(registry, folder, packed, store, factors=read_factors(folder)) as prepared:
        registry.publish(folder, interface=loaded.interface, deltas=prepared.deltas)
        sent = {name: delta.file.size for name, delta in prepared.deltas.items()}
        return sum(sent.get(f.name, f.size) for f in packed.files if f.name in TENSORS)


def count_install(root: Path, versions: Sequence[str], name: str, home: Path) -> int:
    """Install one release after the other; return the bytes that the last one downloads."""
    counted = CountedFolder(root)
    store = Store(home / "store")
    project = Project.create(home / "project", "tiny-bytes", {"local": str(root)})
    for version in versions:
        counted.n_bytes = 0
        project = project.add(Requirement.parse(f"{name}@{version}"))
        sync_project(project, lock_project(project), store, source=Registry(counted))
    return counted.n_bytes


def time_rebuild(old: Path, new: Path, factors: Any, home: Path) -> dict[str, Any]:
    """Time rebuilding a file and copying it, in turns; both hash and sync what they write."""
    size = new.stat().st_size
    write_delta(home / "delta", old, new, factors)

    def rebuild() -> Iterator[bytes]:
        return apply_delta(home / "delta", old, size)

    def copy() -> Iterator[bytes]:
        with new.open("rb") as file:
            while data := file.read(CHUNK):
                yield data

    ways: dict[str, Callable[[], Iterator[bytes]]] = {"rebuild": rebuild, "copy": copy}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(REPEATS + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            with Sink(home / way) as sink:
                for data in run():
                    sink.write(data)
            if number:  # the first one warms up
                seconds[way].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["rebuild"], seconds["copy"], strict=True)]
    return {
        **{f"{way}_s": statistics.median(times) for way, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "megabytes": size / 1e6,
    }


def run_seed(
    loaded: LoadedBackbone, name: str, steps: int, ranks: Sequence[int], seed: int, home: Path
) -> dict[str, Any]:
    """Train and publish all generations of one seed."""
    text = shipped_folder(name) / "text"
    documents = read_documents([text / "train.jsonl"])
    heldout = read_documents([text / "heldout.jsonl"])
    halves = {"first": documents[::2], "second": documents[1::2]}
    for half, chosen in halves.items():
        write_documents(home / f"{half}.jsonl", chosen)
    first = home / "experts" / name
    found = train_generation(loaded, first, home / "first.jsonl", heldout, steps, seed)
    rows: dict[str, Any] = {"first generation": found}
    store = Store(home / "publisher")
    variants = {"second, unconstrained": None, **{f"second, rank {r}": r for r in ranks}}
    for variant, rank in variants.items():
        folder = home / "generations" / variant.replace(" ", "-").replace(",", "")
        row = train_generation(
            loaded, folder, home / "second.jsonl", heldout, steps, seed, parent=first, rank=rank
        )
        root = home / "registries" / folder.name
        registry = open_for_publishing(root)
        publish(registry, first, loaded, store)
        row["sent"] = publish(registry, folder, loaded, store)
        place = home / "installs" / folder.name
        row["install"] = count_install(root, ["1.0.0", "1.1.0"], name, place / "newer")
        row["install_alone"] = count_install(root, ["1.1.0"], name, place / "alone")
        factors = read_factors(folder).get(TENSORS[0])
        row["time"] = time_rebuild(first / TENSORS[0], folder / TENSORS[0], factors, place)
        rows[variant] = row
    gains = {"bits": "gain", "scout_bits": "scout_gain"}
    for variant in variants:
        for figure, gain in gains.items():
            rows[variant][gain] = rows["first generation"][figure] - rows[variant][figure]
    for variant in variants:
        for gain in gains.values():
            whole = rows["second, unconstrained"][gain]
            rows[variant][f"{gain}_share"] = rows[variant][gain] / whole
    return rows


def describe(result: dict[str, Any]) -> str:
    """Return the figures as Markdown tables: the mean over seeds, and the least and the largest."""
    lines = [
        "| generation | held-out bits per byte | of the gain | scout bits | of its gain "
        "| sent: bytes | of the whole | installed over the first: bytes | alone: bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    times = ["| generation | MB | rebuild: ms | copy: ms | ratio |", "|---|---|---|---|---|"]
    seeds = list(result["seeds"].values())
    for name in seeds[0]:
        rows = [seed[name] for seed in seeds]

        def show(figure: str, how: str, factor: float = 1, rows: Any = rows) -> str:
            values = [factor * row[figure] for row in rows]
            low, high = (format(end, how) for end in (min(values), max(values)))
            spread = "" if low == high else f" ({low} to {high})"
            return f"{statistics.fmean(values):{how}}{spread}"

        bits = [name, show("bits", ".4f")]
        if "sent" not in rows[0]:
            cells = [*bits, "", show("scout_bits", ".4f"), "", show("bytes", ",.0f"), "", "", ""]
        else:
            shares = [{"sent": row["sent"] / row["bytes"]} for row in rows]
            cells = [
                *bits,
                show("gain_share", ".1%"),
                show("scout_bits", ".4f"),
                show("scout_gain_share", ".1%"),
                show("sent", ",.0f"),
                show("sent", ".2%", rows=shares),
                show("install", ",.0f"),
                show("install_alone", ",.0f"),
            ]
            took = [row["time"] for row in rows]
            low = min(one["ratio_spread"][0] for one in took)
            high = max(one["ratio_spread"][1] for one in took)
            ratio = statistics.fmean(one["ratio"] for one in took)
            times.append(
                f"| {name} | {took[0]['megabytes']:.2f} | {show('rebuild_s', '.1f', 1e3, took)} "
                f"| {show('copy_s', '.1f', 1e3, took)} | {ratio:.1f} ({low:.1f} to {high:.1f}) |"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *times])


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m " + __spec__.name)
    parser.add_argument("--expert", default="python-code", help="whose text is used")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of a generation")
    parser.add_argument("--ranks", type=int, nargs="+", default=[30], help="ranks of the updates")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    loaded = load_backbone("tiny-bytes")
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "expert": arguments.expert,
        "steps": arguments.steps,
        "seeds": {},
    }
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows = run_seed(
                loaded, arguments.expert, arguments.steps, arguments.ranks, seed, Path(folder)
            )
        result["seeds"][str(seed)] = rows
        if arguments.json is not None:  # a long run that is stopped leaves the seeds that are done
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    seeds = "1 seed" if arguments.seeds == 1 else f"{arguments.seeds} seeds"
    print(f"{result['machine']}; {result['date']}; {arguments.expert}, {arguments.steps} steps")
    print(f"{seeds}: mean (least to largest)\n")
    print(describe(result))


if __name__ == "__main__":
    main()
