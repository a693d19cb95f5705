"""What does a training step cost on TPU pods, by the TPU's own compiler?

    pip install 'libtpu==0.0.42.*'       # the TPU compiler; no TPU is needed
    python -m benchmarks.plans [--cases "1B backbone" ...] [--json FILE]

Each case is a training step of a Llama-shaped backbone, or of an expert on one, with one row of
2,048 tokens a chip and weights split over all chips. Only shapes are made. Memory is XLA's, FLOPs
are counted in the compiled program with every loop as often as it runs, and over those of the
model. A case takes minutes of two cores to compile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax

from composable.cli.group import show_plan
from composable.model.config import BackboneConfig
from composable.parallel.chips import tpu_devices
from composable.training.config import TrainConfig
from composable.workflows.step_plan import StepPlan, plan_backbone, plan_expert

WINDOW: Final = 2048
CLASSES: Final = 256
SCOUT_WIDTH: Final = 64
_shape = partial(
    BackboneConfig,
    vocab_size=32_000,
    context=WINDOW,
    scout_width=SCOUT_WIDTH,
    is_tied=False,
    dtype="BF16",
)
MODELS: Final = {
    # SmolLM2-135M.
    "135M": _shape(
        vocab_size=49_152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        d_head=64,
        d_ff=1536,
        tap=8,
        is_tied=True,
    ),
    "1B": _shape(d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, d_head=64, d_ff=5632, tap=7),
    "7B": _shape(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_head=128, d_ff=11_008, tap=10
    ),
}


TOPOLOGIES: Final = {
    "v5e-16": "v5e:4x4",
    "v5p-64": "v5p:4x4x4",
    "v5p-256": "v5p:4x8x8",
    "v6e-64": "v6e:8x8",
}
BODIES: Final = {"low-rank": ("lora", 16), "FFN": ("ffn", None)}
# Weights of these models are split over as many chips, which leaves each 128 columns or more.
_FSDP: Final = {"135M": 1, "1B": 16, "7B": 16}


def plan_case(model: str, body: str, topology: str, fsdp: int | None = None) -> StepPlan:
    """Compile the step of a backbone ("backbone") or of an expert (a name in `BODIES`)."""
    cfg = MODELS[model]
    n_devices = len(tpu_devices(topology))
    training = TrainConfig(steps=1000, batch_size=n_devices, window=WINDOW, learning_rate=1e-3)
    mesh = {"data": -1, "fsdp": fsdp or _FSDP[model]}
    if body == "backbone":
        return plan_backbone(cfg, CLASSES, training, topology, mesh)
    return plan_expert(cfg, CLASSES, BODIES[body], SCOUT_WIDTH, training, topology, mesh)


def _name_cases() -> dict[str, Callable[[], StepPlan]]:
    """Return all cases by name, the quickest to compile first."""
    cases: dict[str, Callable[[], StepPlan]] = {}
    for model in MODELS:
        for name, topology in TOPOLOGIES.items():
            for body in (*BODIES, "backbone"):
                kind = body if body == "backbone" else f"{body} expert"
                cases[f"{model} {kind}, {name}"] = partial(plan_case, model, body, topology)
    cases["7B backbone, v5p-64, fsdp=64"] = partial(plan_case, "7B", "backbone", "v5p:4x4x4", 64)
    return cases


CASES: Final = _name_cases()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results; kept cases are not compiled again"
    )
    parser.add_argument("--again", action="store_true", help="compile them nevertheless")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    print(*(f"{key} {value}" for key, value in head.items()), sep=" | ", flush=True)
    cases = _read_cases(arguments.json) if arguments.json else {}
    for name in arguments.cases:
        print(f"\n{name}", flush=True)
        if name in cases and not arguments.again:
            print("compiled before", flush=True)
            continue
        plan = CASES[name]()
        show_plan(plan, as_json=False)
        cases[name] = {"environment": head, **plan.to_dict()}
        if arguments.json:
            ordered = {name: cases[name] for name in CASES if name in cases}
            arguments.json.write_text(json.dumps({"cases": ordered}, indent=2) + "\n")


def _read_cases(file: Path) -> dict[str, Any]:
    """Return the cases that an earlier run has compiled."""
    cases: dict[str, Any] = json.loads(file.read_text())["cases"] if file.exists() else {}
    return cases


if __name__ == "__main__":
    main()
