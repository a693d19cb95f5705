"""At which peak learning rate, and in how many blocks of Muon, does an expert learn most?

    make smollm2 parity
    .venv-parity/bin/python -m benchmarks.rates --backbone FOLDER --text legal --rates 0.001 0.003
    .venv-parity/bin/python -m benchmarks.rates --backbone FOLDER --text legal --rates 0.001 \\
        --blocks 1

Every rate trains an expert from the same start on the same rows; what they score on held-out text
is compared with the backbone alone. One run has one number of blocks, since a program is compiled
for it. Lines are added to the file of `--json`, so that runs together make a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.compile_memory import schedule_for_memory
from composable.assembly.experts import make_expert, save_expert
from composable.corpora.recipe import shipped_folder
from composable.packaging.manifests.manifest import BodySpec, InterfaceNeed, Manifest
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.version import Version
from composable.progress import TrainingProgress
from composable.training import optimizers
from composable.workflows.heldout import measure_heldout
from composable.workflows.sweep import train_variants
from composable.workflows.train import expert_config
from composable.workflows.workspace import HELDOUT_FILE, WORK


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the held-out bits per token of the backbone alone, and of an expert at every rate."""
    loaded = load_backbone(str(arguments.backbone))
    text = shipped_folder(arguments.text) / "text" / "train.jsonl"
    rank = arguments.rank if arguments.kind == "lora" else None
    cfg = expert_config(
        arguments.steps, rows=arguments.rows, backbone=loaded.backbone, kind=arguments.kind
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "measured"
        folder.mkdir()
        manifest = make_manifest(loaded, arguments.kind, rank)
        (folder / "expert.toml").write_text(manifest.to_toml())
        sweep = {"learning-rate": arguments.rates}
        variants = train_variants(loaded, folder, [text], cfg, sweep, progress=report())
        alone = Path(scratch) / "alone"
        (alone / WORK).mkdir(parents=True)
        for file in ("expert.toml", f"{WORK}/{HELDOUT_FILE}"):
            (alone / file).write_bytes((folder / file).read_bytes())
        save_expert(alone, make_expert(loaded.backbone, manifest), manifest)
        before = measure_heldout(loaded, alone, cfg, folder / WORK / "sweep" / "trunk")
    common = {
        "backbone": loaded.interface.name,
        "text": arguments.text,
        "kind": arguments.kind if rank is None else f"rank {rank}",
        "blocks": 1 if rank else optimizers.count_blocks((loaded.interface.d_model, 10**6)),
        "steps": arguments.steps,
        "alone": round(before.bits_per_token, 3),
        "date": datetime.date.today().isoformat(),
    }
    return [
        {
            **common,
            "rate": variant.record.learning_rate,
            "bits": round(variant.heldout.bits_per_token, 3),
            "seconds": (variant.record.step_seconds or {}).get("body"),
        }
        for variant in variants
    ]


def make_manifest(loaded: LoadedBackbone, kind: Any, rank: int | None) -> Manifest:
    """Return the manifest of the expert that is trained."""
    return Manifest(
        name="measured",
        version=Version("1.0.0"),
        backbone=loaded.interface.name,
        license="Apache-2.0",
        interface=InterfaceNeed(name=loaded.interface.name, requires=Constraint("*")),
        body=BodySpec(kind=kind, rank=rank, dtype="F32"),
        scout_width=64,
    )


def report() -> TrainingProgress:
    """Return a callback that prints what was done of each stage, now and then."""

    def show(stage: str, done: int, total: int, figures: Any) -> None:
        if done % 16 == 0 or done == total:
            print(f"{stage}: {done} of {total} {dict(figures)}", file=sys.stderr)

    return show


def main() -> None:
    """Measure the rates that are asked for, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--text", default="legal", help="one of the shipped texts")
    parser.add_argument("--kind", choices=("ffn", "lora"), default="ffn")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--blocks", type=int, help="blocks of a matrix at most")
    parser.add_argument("--json", type=Path, help="file that gets a line for every rate")
    arguments = parser.parse_args()
    # TensorBoard's writer would load PyTorch, which a contributor's environment does not have.
    sys.modules["torch"] = None  # type: ignore[assignment]
    schedule_for_memory()
    if arguments.blocks:
        optimizers._BLOCKS = arguments.blocks  # type: ignore[misc]
    lines = measure(arguments)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    print("| text | body | blocks | peak rate | held-out bits per token | backbone | body, s |")
    print("|---|---|---|---|---|---|---|")
    for line in sorted(lines, key=lambda line: line["rate"]):
        cells = (line[name] for name in ("text", "kind", "blocks", "rate", "bits", "alone"))
        print(f"| {' | '.join(map(str, cells))} | {line['seconds']} |")


if __name__ == "__main__":
    main()
