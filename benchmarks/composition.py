"""Do experts that never met work together, and does anything get worse? Beside every known rival.

    python -m benchmarks.composition --preset smoke|cpu|gpu [--json FILE] [--docs FOLDER]

Every contributor is a confined process that sees its own text and the backbone (see
`composition_contributor`); every rival is in `composition_methods`. What was done is kept in a run
folder, cell by cell, so a run that was cut short goes on. Bits per byte on held-out documents; the
methods and what came out are in `docs/composition.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks import composition_methods as methods
from benchmarks.composition_questions import growth, hostile, neighbours, unequal
from benchmarks.composition_report import report, write_docs
from benchmarks.composition_rivals import (
    CLUSTER_TEMPERATURES,
    cluster_gate,
    isolated_methods,
    router_ablations,
    train_btx,
    train_dense,
)
from benchmarks.composition_run import Community, Preset, Run

PRESETS: Final[Mapping[str, Preset]] = {
    "smoke": Preset(
        backbone="tiny-bytes",
        domains=("python-code", "set-mm", "legal", "german"),
        novel="spanish",
        seeds=(0,),
        steps=60,
        scout_steps=150,
        documents=8,
        growth=(),
        is_full=False,
    ),
    "cpu": Preset(
        backbone="tiny-bytes",
        domains=("python-code", "set-mm", "legal", "german"),
        novel="spanish",
        seeds=(0, 1, 2),
        steps=150,
        scout_steps=300,
        documents=8,
        growth=(2, 4, 8),
        is_full=True,
    ),
}


def score_everything(run: Run, seed: int) -> None:
    """Fill the cells of one seed."""
    c = Community(run, seed)
    backbone, n = run.release.backbone, len(c.names) + 1
    for name, make in isolated_methods(c).items():
        run.cell(seed, name, make)
    run.cell(seed, "paths", lambda: methods.all_paths(backbone, c.stack))
    for temperature in CLUSTER_TEMPERATURES:
        gate = cluster_gate(c, temperature)
        run.cell(
            seed,
            f"c-btm weights {temperature}",
            lambda gate=gate: methods.weights(backbone, gate, n),
        )
    if seed == run.preset.seeds[0]:
        for name, make in router_ablations(c).items():
            run.cell(seed, name, make)
    run.cell(seed, "btx", lambda: train_btx(c)())
    run.cell(seed, "dense", lambda: train_dense(c)())
    for mode in ("mix", "safe"):
        run.cell(
            seed,
            f"{mode} weights",
            lambda m=mode: methods.shipped(c.model.parts, m, is_traced=True),
        )
    if seed == run.preset.seeds[0]:
        neighbours(c)
        hostile(c)
        if run.preset.is_full:
            unequal(c)
            growth(c)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.composition", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the preset's, only these")
    parser.add_argument("--run", type=Path, help="folder to work in and to go on from")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="folder of composition.md and its figures")
    arguments = parser.parse_args()
    folder = arguments.run or Path("runs") / "composition" / arguments.preset
    preset = PRESETS[arguments.preset]
    if arguments.seeds:
        preset = dataclasses.replace(preset, seeds=tuple(arguments.seeds))
    run = Run(arguments.preset, preset, folder)
    for seed in run.preset.seeds:
        score_everything(run, seed)
    result = report(run)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.docs:
        write_docs(run, result, arguments.docs)


if __name__ == "__main__":
    main()
