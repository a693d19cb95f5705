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
    "1B": _shape(d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, d_head=64, d_ff=5632, tap=7),
    "7B": _shape(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_head=128, d_ff=11_008, tap=10
    ),
}


def plan_case(model: str, body: str, topology: str, data: int = 1) -> StepPlan:
    """Compile a backbone ("backbone"), or an expert ("ffn", or a rank of a low-rank one)."""
    cfg = MODELS[model]
    n_devices = len(tpu_devices(topology))
    training = TrainConfig(steps=1000, batch_size=n_devices, window=WINDOW, learning_rate=1e-3)
    mesh = {"data": data, "fsdp": n_devices // data, "tensor": 1}
    if body == "backbone":
        return plan_backbone(cfg, CLASSES, training, topology, mesh)
    kind: Any = ("ffn", None) if body == "ffn" else ("lora", int(body))
    return plan_expert(cfg, CLASSES, kind, SCOUT_WIDTH, training, topology, mesh)


CASES: Final[dict[str, Callable[[], StepPlan]]] = {
    "1B backbone": partial(plan_case, "1B", "backbone", "v5e:4x4"),
    "1B low-rank expert": partial(plan_case, "1B", "16", "v5e:4x4"),
    "1B FFN expert": partial(plan_case, "1B", "ffn", "v5e:4x4"),
    "7B backbone": partial(plan_case, "7B", "backbone", "v5p:4x4x4"),
    "7B backbone, data=4": partial(plan_case, "7B", "backbone", "v5p:4x4x4", data=4),
    "7B low-rank expert": partial(plan_case, "7B", "16", "v5p:4x4x4"),
    "7B FFN expert": partial(plan_case, "7B", "ffn", "v5p:4x4x4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    print(*(f"{key} {value}" for key, value in head.items()), sep=" | ", flush=True)
    report: dict[str, Any] = {"environment": head, "cases": {}}
    for name in arguments.cases:
        print(f"\n{name}", flush=True)
        plan = CASES[name]()
        show_plan(plan, as_json=False)
        report["cases"][name] = plan.to_dict()
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
