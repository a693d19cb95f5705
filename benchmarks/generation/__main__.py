"""Does text that composed experts write stay where its prompt put it, and can it be taken over?

    python -m benchmarks.generation runs/generation --json benchmarks/results/generation.json \
        --docs docs/results

Trains an expert for each of eight domains, composes all of them, and continues held-out prompts:
composed in mix mode and in safe mode, with written text as evidence (as before ADR 15), and by the
prompt's own expert alone, which is the reference. Then conversations whose turns change domain,
documents that turn, and two experts made to take over. Interrupted, the same command resumes:
texts, experts and finished parts are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.generation.attacks import make_attackers, measure_attack
from benchmarks.generation.continuations import Bench, Cell, describe_real, measure_cell
from benchmarks.generation.page import write_page
from benchmarks.generation.switches import measure_leads, measure_turns
from benchmarks.generation.texts import (
    KNOWN,
    PUBLIC,
    UNSEEN,
    Classifier,
    make_domain,
    make_trained,
    merge_expert,
    public_text,
)
from composable.assembly.backbones import load_backbone
from composable.files import atomic

# Temperature and top p.
DRAWS: Final = ((0.7, 1.0), (1.0, 1.0), (1.0, 0.9), (0.0, 1.0))
ATTACKS: Final = (("mix", 3000), ("safe", 64))


def plan_cells(n_prompts: int) -> Iterator[Cell]:
    """Yield all rows of the tables."""
    few = max(1, n_prompts // 3)
    for temperature, top_p in DRAWS:
        # The rule as it was is for comparison only.
        methods = ("mix", "alone", "evidence") if top_p == 1 and temperature else ("mix", "alone")
        for method in methods:
            yield Cell(method=method, temperature=temperature, top_p=top_p, n_prompts=n_prompts)
    for prompt_bytes in (256, 16):
        for method in ("mix", "alone"):
            yield Cell(
                method=method, temperature=0.7, prompt_bytes=prompt_bytes, n_prompts=n_prompts
            )
    yield Cell(method="safe", temperature=0.7, n_prompts=few)
    for method in ("mix", "alone"):
        yield Cell(method=method, temperature=0.7, n_bytes=2048, n_prompts=few)


def make_bench(work: Path, steps: int) -> tuple[Bench, dict[str, Any]]:
    """Return the composed experts with their texts, and a model for each attacker."""
    loaded = load_backbone("tiny-bytes")
    public = public_text(loaded)
    texts, experts = {}, []
    for name in (*UNSEEN, *KNOWN):
        texts[name] = make_domain(name, work)
        data = work / "text" / name / "train.jsonl"
        experts.append(make_trained(loaded, name, [data], work, steps))
    attackers = make_attackers(loaded, public, work, steps)
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
    parser.add_argument("--steps", type=int, default=300, help="training steps of an expert")
    parser.add_argument("--prompts", type=int, default=24, help="prompts per domain")
    parser.add_argument("--only", default="", help="measure only parts whose names contain this")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--docs", type=Path, help="folder of the results page and its figure")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench, attacked = make_bench(arguments.work, arguments.steps)

    parts: dict[str, Callable[[], Any]] = {
        "real": partial(
            describe_real,
            bench,
            Cell(method="real", temperature=0, n_prompts=3 * arguments.prompts),
        )
    }
    cells = list(plan_cells(arguments.prompts))
    parts |= {cell.key: partial(measure_cell, bench, cell) for cell in cells}
    few = max(1, arguments.prompts // 3)
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
    finished = arguments.work / f"finished-{arguments.steps}-{arguments.prompts}.json"
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
        "steps": arguments.steps,
        "prompts": arguments.prompts,
        "domains": [*UNSEEN, *KNOWN, PUBLIC],
        "parts": {name: found[name] for name in parts if name in found},
    }
    if arguments.docs or not arguments.only:
        print(write_page(result, arguments.docs))
    if arguments.json:
        atomic.write_text(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
