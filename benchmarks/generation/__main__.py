"""Does text that composed experts write stay where its prompt put it, and can it be taken over?

    python -m benchmarks.generation runs/generation --json benchmarks/results/generation.json \
        --docs docs/results

Trains an expert for each of eight domains, composes all of them, and continues held-out prompts:
composed in mix mode and in safe mode, with written text as evidence (as before ADR 15), and by the
prompt's own expert alone, which is the reference. Then conversations whose turns change domain,
documents that turn, and two experts made to take over. Interrupted, the same command resumes:
texts, experts and finished parts are kept.

On a pretrained backbone, with the two experts that ship for it (`make smollm2` imports it):

    python -m benchmarks.generation runs/generation-smollm2 --backbone runs/smollm2-135m \
        --json benchmarks/results/generation_smollm2.json --docs docs/results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.generation.attacks import make_attackers, measure_attack
from benchmarks.generation.continuations import (
    Bench,
    Cell,
    describe_real,
    measure_cell,
    measure_recognition,
)
from benchmarks.generation.page import write_page
from benchmarks.generation.switches import measure_leads, measure_turns
from benchmarks.generation.texts import (
    KNOWN,
    PUBLIC,
    TINY,
    UNSEEN,
    Classifier,
    make_domain,
    make_trained,
    merge_expert,
    public_text,
)
from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.files import atomic
from composable.model.model import Model
from composable.workflows.train import expert_config

# Temperature and top p.
DRAWS: Final = ((0.7, 1.0), (1.0, 1.0), (1.0, 0.9), (0.0, 1.0))
ATTACKS: Final = (("mix", 3000), ("safe", 64))


# By backbone: its domains, and the steps and rows per step that its experts are trained with.
DOMAINS: Final = {TINY: (*UNSEEN, *KNOWN), "smollm2-135m": ("german", "set-mm")}
TRAINING: Final = {TINY: (300, 4), "smollm2-135m": (64, 2)}


def plan_cells(n_prompts: int) -> Iterator[Cell]:
    """Yield all rows of the tables for `tiny-bytes`."""
    few = max(1, n_prompts // 3)
    for temperature, top_p in DRAWS:
        # The rule as it was is for comparison only.
        methods = ("mix", "alone", "evidence") if top_p == 1 and temperature else ("mix", "alone")
        for method in methods:
            yield Cell(method=method, temperature=temperature, top_p=top_p, n_prompts=n_prompts)
    for n_given in (256, 16):
        for method in ("mix", "alone"):
            yield Cell(method=method, temperature=0.7, prompt_tokens=n_given, n_prompts=n_prompts)
    # Texts of safe mode stay within the context.
    for method in ("safe", "alone"):
        yield Cell(method=method, temperature=0.7, n_tokens=448, n_prompts=few)
    for method in ("mix", "alone"):
        yield Cell(method=method, temperature=0.7, n_tokens=2048, n_prompts=few)


def plan_subword_cells(n_prompts: int) -> Iterator[Cell]:
    """Yield all rows of the tables for a backbone whose tokens are subwords."""
    for temperature, methods in (
        (0.7, ("mix", "alone", "evidence")),
        (1.0, ("mix", "alone", "evidence")),
        (0.0, ("mix", "alone")),
    ):
        for method in methods:
            yield Cell(
                method=method,
                temperature=temperature,
                prompt_tokens=16,
                n_tokens=192,
                n_prompts=n_prompts,
            )


def make_bench(loaded: LoadedBackbone, work: Path, steps: int) -> tuple[Bench, dict[str, Model]]:
    """Return the composed experts with their texts, and a model for each attacker."""
    public, name_of_backbone = public_text(loaded), loaded.interface.name
    config = expert_config(
        steps=steps, rows=TRAINING[name_of_backbone][1], backbone=loaded.backbone
    )
    texts, experts = {}, []
    for name in DOMAINS[name_of_backbone]:
        texts[name] = make_domain(name, work)
        data = work / "text" / name / "train.jsonl"
        experts.append(make_trained(loaded, name, [data], work, config))
    is_tiny = name_of_backbone == TINY
    attackers = make_attackers(loaded, public, work, config) if is_tiny else {}
    alone = {expert.name: merge_expert(loaded, expert) for expert in experts}
    alone[PUBLIC] = merge_expert(loaded, None)
    texts[PUBLIC] = public
    bench = Bench(
        model=loaded.plug(experts), alone=alone, texts=texts, classifier=Classifier(texts)
    )
    attacked = {name: loaded.plug([*experts, expert]) for name, expert in attackers.items()}
    return bench, attacked


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for texts, experts and finished parts")
    parser.add_argument(
        "--backbone", default=TINY, help=f"one of {', '.join(DOMAINS)}, or a folder"
    )
    parser.add_argument("--steps", type=int, help="training steps of an expert")
    parser.add_argument("--prompts", type=int, default=24, help="prompts per domain")
    parser.add_argument("--only", default="", help="measure only parts whose names contain this")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--docs", type=Path, help="folder of the results page and its figure")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    loaded = load_backbone(arguments.backbone)
    name_of_backbone = loaded.interface.name
    is_tiny = name_of_backbone == TINY
    steps = arguments.steps or TRAINING[name_of_backbone][0]
    bench, attacked = make_bench(loaded, arguments.work, steps)

    cells = list((plan_cells if is_tiny else plan_subword_cells)(arguments.prompts))
    real = dataclasses.replace(cells[0], method="real", n_prompts=3 * arguments.prompts)
    parts: dict[str, Callable[[], Any]] = {"real": partial(describe_real, bench, real)}
    parts |= {cell.key: partial(measure_cell, bench, cell) for cell in cells}
    few = max(1, arguments.prompts // 3)
    parts["recognition"] = partial(measure_recognition, bench, arguments.prompts)
    if is_tiny:
        parts["turns"] = partial(measure_turns, bench, few)
        parts["leads"] = partial(measure_leads, bench, few)
    for name, model in attacked.items():
        for mode, n_samples in ATTACKS:
            parts[f"{name} {mode}"] = partial(
                measure_attack,
                model,
                model.names.index(name),
                bench.texts[PUBLIC],
                n_samples=n_samples,
                mode=mode,
            )
    finished = arguments.work / f"finished-{steps}-{arguments.prompts}.json"
    found: dict[str, Any] = json.loads(finished.read_text()) if finished.exists() else {}
    for name, measure in parts.items():
        if name in found or arguments.only not in name:
            continue
        start = time.perf_counter()
        found[name] = measure()
        atomic.write_text(finished, json.dumps(found, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "backbone": name_of_backbone,
        "steps": steps,
        "prompts": arguments.prompts,
        "domains": [*DOMAINS[name_of_backbone], PUBLIC],
        "parts": {name: found[name] for name in parts if name in found},
    }
    if arguments.docs or not arguments.only:
        print(write_page(result, arguments.docs))
    if arguments.json:
        atomic.write_text(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
