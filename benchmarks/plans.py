"""What does a training step cost on TPU pods, by the TPU's own compiler?

    pip install 'libtpu==0.0.42.*'       # the TPU compiler; no TPU is needed
    python -m benchmarks.plans [--cases "1B backbone, v5e-16" ...] [--json FILE] [--docs DIR]

Each case is a training step of a Llama-shaped backbone, or of an expert on one, with one row of
2,048 tokens a chip and weights split over all chips; or a composed model in mix mode whose bank is
split over all chips, reading 512 tokens a chip, or writing a token of four documents a chip. Only
shapes are made. Memory is XLA's, FLOPs are counted in the compiled program with every loop as often
as it runs, and over those of the model. A case takes minutes of two cores to compile.

With --docs the tables of `pods.md` are written again from the JSON, and the plan that the guide
shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.demo_seeds import fill
from benchmarks.environment import describe_environment
from composable.cli.group import format_plan, show_plan
from composable.cli.output import format_bytes
from composable.model.backbone import Backbone
from composable.model.bank import empty_bank
from composable.model.composed import Parts, specs_of_parts
from composable.model.config import BackboneConfig
from composable.model.mix import mix_state, trace_mix
from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
from composable.parallel import BATCH_SPEC, make_mesh
from composable.parallel.chips import find_chip, tpu_devices
from composable.parallel.program import Collectives, ProgramCost, measure_program
from composable.training.config import TrainConfig
from composable.workflows.step_plan import (
    StepPlan,
    compile_to_fit,
    count_numbers,
    plan_backbone,
    plan_expert,
)

WINDOW: Final = 2048
CLASSES: Final = 256
# Tokens of a document that a served model reads at a time.
CHUNK: Final = 512
# Of an expert or a fine-tuning, and of a backbone that is trained from nothing.
TOKENS: Final = 100e6
TOKENS_PER_PARAMETER: Final = 20
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
# The case that the guide shows, and its command: of a low-rank expert on SmolLM2-135M.
GUIDE_CASE: Final = "135M low-rank expert, v5e-16"
GUIDE_COMMAND: Final = (
    "composable train logic --backbone runs/smollm2-135m --rows 16 --window 2048 --mesh data=-1 "
    "--plan v5e:4x4"
)
# Weights of these models are split over as many chips, which leaves each 128 columns or more.
_FSDP: Final = {"135M": 1, "1B": 16, "7B": 16}


def plan_case(model: str, body: str, topology: str, fsdp: int | None = None) -> dict[str, Any]:
    """Compile the step of a backbone ("backbone") or of an expert (a name in `BODIES`)."""
    cfg = MODELS[model]
    n_devices = len(tpu_devices(topology))
    training = TrainConfig(steps=1000, batch_size=n_devices, window=WINDOW, learning_rate=1e-3)
    mesh = {"data": -1, "fsdp": fsdp or _FSDP[model]}
    if body == "backbone":
        plan = plan_backbone(cfg, CLASSES, training, topology, mesh)
    else:
        plan = plan_expert(cfg, CLASSES, BODIES[body], SCOUT_WIDTH, training, topology, mesh)
    show_plan(plan, as_json=False)
    return plan.to_dict()


def plan_served(
    model: str, n_experts: int, topology: str, rows: int, n_tokens: int
) -> dict[str, Any]:
    """Compile mix mode with FFN experts, whose bank is split over all chips.

    Args:
        model: Name of the backbone's shape.
        n_experts: Experts that are installed.
        topology: Kind of chip and shape.
        rows: Documents on each chip.
        n_tokens: Tokens of each that the program reads; a single one is one that the model drew.

    Returns:
        Plain data. Products within kernels are in no count of operations.
    """
    cfg, devices, chip = MODELS[model], tpu_devices(topology), find_chip(topology)
    mesh = make_mesh(devices, data=1, expert=-1)
    # As `Model` makes it: a power of two, and as many on every device.
    capacity = -(-(1 << n_experts.bit_length()) // len(devices)) * len(devices)
    classes_V = np.arange(cfg.vocab_size) % CLASSES
    backbone: Any = nnx.eval_shape(lambda: Backbone(cfg, classes_V, CLASSES, rngs=None))
    interface = dataclasses.replace(
        read_interface(find_backbone("tiny-bytes")),
        vocab_size=cfg.vocab_size,
        n_classes=CLASSES,
        d_model=cfg.d_model,
        d_ff=cfg.d_ff,
        tap=cfg.tap,
        slots=tuple(cfg.slots),
        scout_max_width=SCOUT_WIDTH,
        output_bounds=(100.0,) * len(cfg.slots),
    )

    def make(backbone: Backbone) -> Parts:
        return Parts(
            backbone=backbone,
            bank=empty_bank(backbone, interface, capacity),
            interface=interface,
        )

    parts = jax.eval_shape(make, backbone)
    n_rows = rows * len(devices)
    state = jax.eval_shape(lambda parts: mix_state(parts, n_rows, WINDOW), parts)
    tokens_BT = jax.ShapeDtypeStruct(
        (n_rows, n_tokens), jnp.int32, sharding=jax.NamedSharding(mesh, BATCH_SPEC)
    )
    is_drawn = n_tokens == 1

    def run(parts: Parts, tokens_BT: jax.Array, state: Any) -> Any:
        logits_BTV, _, state = trace_mix(parts, tokens_BT, state, is_drawn)
        return logits_BTV[:, -1], state

    def place(spec: jax.P, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    start, start_cpu = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        placed = jax.tree.map(place, specs_of_parts(parts), parts)
        lowered = jax.jit(run, donate_argnums=2).lower(placed, tokens_BT, state)
    cost = measure_program(compile_to_fit(lowered, topology))
    plan = {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "experts": n_experts,
        "entries": capacity,
        "rows": n_rows,
        "tokens": n_tokens,
        "cache": WINDOW,
        "parameters": count_numbers(nnx.state(backbone, nnx.Param))
        + n_experts * len(cfg.slots) * 3 * cfg.d_model * cfg.d_ff,
        "cost": dataclasses.asdict(cost),
        "chip_memory": chip.memory,
        "chip_link": chip.link_bytes,
        "fits": cost.peak <= chip.memory,
        "compile_seconds": round(time.perf_counter() - start, 1),
        "compile_cpu_seconds": round(time.process_time() - start_cpu, 1),
    }
    print(json.dumps(plan, indent=2), flush=True)
    return plan


def _name_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return all cases by name, the quickest to compile first."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for model in MODELS:
        for name, topology in TOPOLOGIES.items():
            for body in (*BODIES, "backbone"):
                kind = body if body == "backbone" else f"{body} expert"
                cases[f"{model} {kind}, {name}"] = partial(plan_case, model, body, topology)
    cases["7B backbone, v5p-64, fsdp=64"] = partial(plan_case, "7B", "backbone", "v5p:4x4x4", 64)
    for name in ("v5p-64", "v6e-64"):
        served = partial(plan_served, "7B", 64, TOPOLOGIES[name])
        cases[f"7B with 64 FFN experts reads, {name}"] = partial(served, rows=1, n_tokens=CHUNK)
        cases[f"7B with 64 FFN experts writes, {name}"] = partial(served, rows=4, n_tokens=1)
    return cases


CASES: Final = _name_cases()


def tables(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the tables of the page, by name."""
    trained = {name: case for name, case in cases.items() if "trained" in case}
    served = {name: case for name, case in cases.items() if "trained" not in case}
    steps = [
        "| | mesh | trained | memory per chip | of it weights and state | FLOPs per token | over "
        "the model's | between chips | a step, at least | share of peak, at most | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in trained.items():
        cost = case["cost"]
        steps.append(
            f"| {name} | {_mesh(case)} | {case['trained'] / 1e6:,.1f} M | "
            f"{cost['peak'] / 1e9:.1f} of {case['chip_memory'] / 1e9:.0f} GB | "
            f"{cost['arguments'] / 1e9:.2f} GB | {case['flops_per_token'] / 1e9:.2f} G | "
            f"{case['recomputation']:.2f} | {_traffic(case)} | {case['least_seconds']:.3f} s | "
            f"{case['share_of_peak']:.0%} | {case['compile_cpu_seconds']:.0f} s |"
        )
    serving = [
        "| | mesh | entries | memory per chip | of it weights and caches | between chips | at full "
        "speed | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in served.items():
        cost = case["cost"]
        seconds = sum(kind["bytes"] for kind in cost["collectives"].values()) / case["chip_link"]
        serving.append(
            f"| {name} | {_mesh(case)} | {case['entries']} | "
            f"{cost['peak'] / 1e9:.1f} of {case['chip_memory'] / 1e9:.0f} GB | "
            f"{cost['arguments'] / 1e9:.1f} GB | {_traffic(case)} | {1e3 * seconds:.2f} ms | "
            f"{case['compile_cpu_seconds']:.0f} s |"
        )
    found = {"plans": steps, "served": serving, "hours": _list_hours(trained)}
    return {name: "".join(f"{line}\n" for line in lines) for name, lines in found.items()}


def guide_text(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the console of the guide: its command, and what that printed."""
    case = cases[GUIDE_CASE]
    cost = dict(case["cost"])
    cost["collectives"] = {name: Collectives(**kind) for name, kind in cost["collectives"].items()}
    fields = {field.name: case[field.name] for field in dataclasses.fields(StepPlan)}
    plan = StepPlan(**fields | {"cost": ProgramCost(**cost)})
    return f"```console\n$ {GUIDE_COMMAND}\n{format_plan(plan)}\n```\n"


def _mesh(case: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis}={n}" for axis, n in case["mesh"].items() if n > 1)


def _traffic(case: Mapping[str, Any]) -> str:
    """Return the bytes that a chip receives, of each kind that matters."""
    found = case["cost"]["collectives"]
    total = sum(kind["bytes"] for kind in found.values())
    large = [
        f"`{name}` {format_bytes(kind['bytes'])}"
        for name, kind in found.items()
        if kind["bytes"] > max(0.02 * total, 5e6)
    ]
    return ", ".join(large) or format_bytes(total)


def _round(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{float(f'{value:.3g}'):,.{2 if value < 10 else 0}f}"


def _list_hours(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return chip-hours by model and topology, of those with a plan for the backbone's step."""
    lines = [
        "| chip-hours, at least | low-rank expert | FFN expert | full fine-tuning | the backbone |",
        "|---|---|---|---|---|",
    ]

    def hours(case: Mapping[str, Any] | None, tokens: float) -> float | None:
        if case is None:
            return None
        steps = tokens / (case["rows"] * case["window"])
        seconds: float = case["least_seconds"]
        return steps * seconds * case["devices"] / 3600

    for name in TOPOLOGIES:
        for model in MODELS:
            whole = cases.get(f"{model} backbone, {name}")
            experts = [cases.get(f"{model} {body} expert, {name}") for body in BODIES]
            if whole is None or not any(experts):
                continue
            pretraining = TOKENS_PER_PARAMETER * whole["parameters"]
            found = [
                *(hours(case, TOKENS) for case in (*experts, whole)),
                hours(whole, pretraining),
            ]
            cells = ["–" if value is None else _round(value) for value in found]
            cells[-1] += f" ({pretraining / 1e9:,.3g} B tokens)"
            lines.append(f"| {model}, {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results; kept cases are not compiled again"
    )
    parser.add_argument(
        "--docs", type=Path, metavar="DIR", help="write the tables of pods.md there"
    )
    parser.add_argument("--again", action="store_true", help="compile them nevertheless")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    head = describe_environment()
    print(*(f"{key} {value}" for key, value in head.items()), sep=" | ", flush=True)
    cases = _read_cases(arguments.json) if arguments.json else {}
    for name in arguments.cases:
        print(f"\n{name}", flush=True)
        if name in cases and not arguments.again:
            print("compiled before", flush=True)
            continue
        cases[name] = {"environment": head, **CASES[name]()}
        if arguments.json:
            ordered = {name: cases[name] for name in CASES if name in cases}
            arguments.json.write_text(json.dumps({"cases": ordered}, indent=2) + "\n")
    if arguments.docs:
        fill(arguments.docs / "pods.md", tables(cases))
        guide = arguments.docs.parent / "guides" / "pods.md"
        if guide.exists() and GUIDE_CASE in cases:
            fill(guide, {"plan": guide_text(cases)})


def _read_cases(file: Path) -> dict[str, Any]:
    """Return the cases that an earlier run has compiled."""
    cases: dict[str, Any] = json.loads(file.read_text())["cases"] if file.exists() else {}
    return cases


if __name__ == "__main__":
    main()
