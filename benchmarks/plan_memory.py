"""Is the memory that a plan names what the program takes? On simulated CPU devices it can be read.

    pip install 'libtpu==0.0.42.*'       # the TPU compiler; no TPU is needed
    python -m benchmarks.plan_memory [--json FILE]

The same training step is compiled for eight TPUs, as a plan does, and for eight simulated CPU
devices, where it also runs. Weights, optimiser state and batch have the same sizes in all three, so
the bytes of these arrays on a device are compared with the plan itself. What is temporary depends
on the compiler: of that, XLA's analysis of the CPU's program is compared with the most memory that
the process held during steps, beyond what it held before its arguments were made.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.environment import describe_environment
from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.model.config import BackboneConfig
from composable.parallel import make_mesh, place_shapes, shardings_of
from composable.parallel.chips import tpu_devices
from composable.parallel.program import measure_program
from composable.training.config import TrainConfig
from composable.training.loop import lower_step
from composable.training.objectives import backbone_objective, expert_objective, float32_masters
from composable.training.optimizers import adamw, muon

DEVICES: Final = 8
TOPOLOGY: Final = "v5e:2x4"
CLASSES: Final = 256
SHAPE: Final = BackboneConfig(
    vocab_size=8192,
    context=256,
    scout_width=64,
    is_tied=False,
    dtype="F32",
    d_model=1024,
    n_layers=3,
    n_heads=16,
    n_kv_heads=16,
    d_head=64,
    d_ff=4096,
    tap=1,
)
TRAINING: Final = TrainConfig(steps=10, batch_size=DEVICES, window=256, learning_rate=1e-3)
# Steps of which the most memory is taken.
STEPS: Final = 2
# Of the analysis: what the allocator and the runtime add, and what is planned for but not touched.
TOLERANCE: Final = 0.15


def make_step(kind: str) -> tuple[Any, Any, Any, Any]:
    """Return objective, optimiser, and shapes of what is trained and what is frozen."""
    classes_V = np.arange(SHAPE.vocab_size) % CLASSES
    backbone: Any = nnx.eval_shape(lambda: Backbone(SHAPE, classes_V, CLASSES, rngs=None))
    if kind == "backbone":
        parts: Any = nnx.split(backbone, nnx.Param, ...)
        graph, params, rest = parts
        return backbone_objective(graph), adamw(TRAINING), float32_masters_of(params), rest
    make = partial(Expert, kind="ffn", rank=None, scout_width=64, rngs=None)
    graph, params = nnx.split(nnx.eval_shape(make, backbone))
    return expert_objective(graph), muon(TRAINING), params, backbone


def float32_masters_of(params: Any) -> Any:
    """Return the shapes of the masters of parameters."""
    return jax.eval_shape(float32_masters, params)


def measure(kind: str) -> dict[str, Any]:
    """Return bytes on one device: the plan's, XLA's for CPU devices, and those really held."""
    objective, optimizer, trained, frozen = make_step(kind)
    batch = jax.ShapeDtypeStruct((TRAINING.batch_size, TRAINING.window + 1), jnp.int32)

    def compile_for(devices: Any) -> tuple[Any, Any]:
        mesh = make_mesh(devices, data=1, fsdp=DEVICES)
        lowered = lower_step(objective, trained, frozen, batch, optimizer=optimizer, mesh=mesh)
        return mesh, lowered.compile()

    plan = measure_program(compile_for(tpu_devices(TOPOLOGY))[1])
    mesh, step = compile_for(jax.devices())
    analysis = measure_program(step)

    trees = (trained, jax.eval_shape(optimizer.init, trained), frozen)
    with jax.set_mesh(mesh):
        placed = [place_shapes(tree, shardings_of(tree, mesh)) for tree in trees]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)

    def make() -> Any:
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01).astype(leaf.dtype), placed)

    fill = jax.jit(make, out_shardings=shardings).lower().compile()
    rows = jax.device_put(
        np.ones(batch.shape, np.int32), jax.tree.leaves(step.input_shardings[0])[-2]
    )
    rate = np.float32(1e-3)
    gc.collect()
    before = read_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far starts again from now
    state = jax.block_until_ready(fill())
    arguments = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves((state, rows))
        for shard in leaf.addressable_shards
    )
    new, opt_state, frozen_arrays = state
    del state
    for _ in range(STEPS):
        new, opt_state, figures = step(new, opt_state, frozen_arrays, rows, rate)
        jax.block_until_ready(figures)
    peak = read_memory("VmHWM") - before
    return {
        "plan": dataclasses.asdict(plan) | {"collectives": None},
        "analysis": dataclasses.asdict(analysis) | {"collectives": None},
        "arguments held": arguments // DEVICES,
        "peak held": peak // DEVICES,
        "arguments, held / planned": round(arguments / DEVICES / plan.arguments, 3),
        "peak, held / analysed": round(peak / DEVICES / analysis.peak, 3),
    }


def read_memory(key: str) -> int:
    """Return bytes of resident memory of this process, now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> int:
    """Measure each kind in a process of its own, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--kind", choices=("backbone", "FFN expert"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measure(arguments.kind)))
        return 0
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    figures: dict[str, Any] = {
        **describe_environment(),
    }
    for kind in ("backbone", "FFN expert"):
        command = [sys.executable, "-m", __spec__.name, "--kind", kind]
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
        figures[kind] = json.loads(done.stdout.splitlines()[-1])
        print(kind, figures[kind], flush=True)
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    ratios = [
        figures[kind][name]
        for kind in ("backbone", "FFN expert")
        for name in ("arguments, held / planned", "peak, held / analysed")
    ]
    return int(any(abs(ratio - 1) > TOLERANCE for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main())
