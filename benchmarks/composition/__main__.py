"""Do experts that never met work together, and does anything get worse? Beside every known rival.

    python -m benchmarks.composition --preset smoke|ensembles|cpu|gpu [--json FILE] [--docs FOLDER]

Every contributor is a confined process that sees its own text and the backbone (see
`composition_contributor`); every rival is in `composition_methods`. What was done is kept in a run
folder, cell by cell, so a run that was cut short goes on. Bits per byte on held-out documents; the
methods and what came out are in `docs/results/composition.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.composition import methods as methods
from benchmarks.composition.page import write_docs
from benchmarks.composition.questions import (
    adversarial,
    copies,
    generations,
    growth,
    hostile,
    peers,
    unequal,
)
from benchmarks.composition.report import report
from benchmarks.composition.rivals import (
    isolated_methods,
    path_methods,
    plain_methods,
    reference,
    router_ablations,
)
from benchmarks.composition.run import SPLICED, Community, Preset, Run

# What is asked of the first seed's community, beside the methods' quality.
QUESTIONS: Final[tuple[Callable[[Community], None], ...]] = (
    peers,
    hostile,
    reference,
    growth,
    unequal,
    generations,
    adversarial,
    copies,
)

PRESETS: Final[Mapping[str, Preset]] = {
    "smoke": Preset(
        backbone="tiny-bytes",
        domains=("python-code", "set-mm", "legal", "german"),
        novel="spanish",
        seeds=(0,),
        steps=60,
        rows=4,
        documents=8,
        growth=(),
        adversarial=32,
        is_full=False,
    ),
    "cpu": Preset(
        backbone="tiny-bytes",
        domains=(
            *("python-code", "set-mm", "legal", "german"),
            *("french", "rust-code", "proofs", "kernel-docs"),
        ),
        novel="spanish",
        seeds=(0, 1, 2),
        steps=100,
        rows=4,
        documents=8,
        growth=(2, 4, 8, 16, 32),
        adversarial=10_000,
        is_full=True,
    ),
    # The rivals that come nearest to us, and copied scouts, in a fraction of the time; the demo's
    # domains and training.
    "ensembles": Preset(
        backbone="tiny-bytes",
        domains=("python-code", "set-mm", "legal"),
        novel="german",
        seeds=(0,),
        steps=200,
        rows=4,
        documents=8,
        growth=(),
        adversarial=0,
        is_full=False,
        is_short=True,
    ),
    "gpu": Preset(
        backbone="small-bytes",
        domains=(
            *("python-code", "set-mm", "legal", "german", "french"),
            *("polish", "rust-code", "proofs", "kernel-docs", "sql-docs"),
        ),
        novel="spanish",
        seeds=(0, 1, 2),
        steps=240,
        rows=16,
        documents=12,
        growth=(2, 4, 8, 16, 32),
        adversarial=10_000,
        is_full=True,
        has_scouts=True,
        workers=3,
    ),
}


def score_methods(c: Community) -> None:
    """Fill the cells of every method on one seed; on the first, of the router's ablations too."""
    is_short = c.run.preset.is_short
    cells = {**path_methods(c), **(plain_methods(c) if is_short else isolated_methods(c))}
    if c.is_first and not is_short:
        cells |= router_ablations(c)
    c.run.fill(c.seed, cells)
    for name, expert in zip(c.names, c.plugged, strict=True):
        alone = {
            f"alone, {name}": lambda expert=expert: methods.shipped(c.plug([expert]).parts, "mix")
        }
        c.run.fill(c.seed, alone, [name])
    traced = {
        f"{mode} weights": lambda mode=mode: methods.shipped(c.model.parts, mode, is_traced=True)
        for mode in ("mix", "safe")
    }
    c.run.fill(c.seed, traced, [SPLICED])


def score_everything(run: Run) -> None:
    """Fill every cell; with several workers, contributors train while methods are scored."""
    first_seed, *seeds = run.preset.seeds
    first = Community(run, first_seed)
    later: list[Community] = []

    def prepare() -> None:
        later.extend(Community(run, seed) for seed in seeds)

    run.map([partial(score_methods, first), prepare])
    run.map([partial(score_methods, c) for c in later])
    questions = [copies] if run.preset.is_short else QUESTIONS
    run.map([partial(ask, first) for ask in questions])


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
    score_everything(run)
    result = report(run)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.docs:
        write_docs(run, result, arguments.docs)


if __name__ == "__main__":
    main()
