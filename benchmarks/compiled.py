"""What do the programs compiled for TPUs compute, read, and send between devices?

    pip install 'libtpu==0.0.42.*'       # the TPU compiler; no TPU is needed
    python -m benchmarks.compiled [--topologies v5e:2x4 v6e:2x4] [--json FILE]

*Body*: a feed-forward body on every token's own experts, forward, by our kernel and by three calls
of `jax.lax.ragged_dot`.
FLOPs are those that XLA counts in the compiled program, over those of the routed rows; XLA takes a
kernel's from the kernel itself, and `tests/kernels/test_tpu.py` holds ours against its products.
They are for the least favourable routing; *rows* is what the kernel multiplies in a random one,
over the routed rows. Bytes are over the matrices and one read and one write of each routed row.
Ours are those that the kernel copies between memory and chip, counted by running its index maps on
that routing; those of `ragged_dot`, whose hidden activations leave the chip, are XLA's count.

*Mix*: mix mode of `tiny-bytes` with three experts on 16 documents of 512 tokens, on one device and
with the batch split over four. *Step*: the gradient of an expert on four devices. FLOPs and bytes
are those of one device, as XLA counts them; a loop's body counts once where XLA does not know how
often it runs. Operations between devices count as often as they run. *Traffic* are the arrays that
operations outside of loops read from and write to the device's memory, without those on the chip.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import composable as cx
from benchmarks.environment import describe_environment
from composable import kernels
from composable.kernels import tpu
from composable.kernels.grouped_swiglu import _stream_body
from composable.model import bank as banks
from composable.model import mix as mix_mode
from composable.model.body import Expert
from composable.parallel import BATCH_SPEC
from composable.parallel.mesh import AXES
from composable.training.objectives import expert_objective
from tests.support.compiled import collectives_in, count_traffic, shapes_on, tpu_mesh
from tests.support.kernel_transfers import count_rows, count_transfers, total_bytes

DOCUMENTS, LENGTH, CAPACITY = 16, 512, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a body and its batch; the letters are those of `composable.interface.dims`."""

    name: str
    M: int
    D: int
    F: int
    dtype: Any


SHAPES = (
    Shape(name="135M, 8k tokens", M=8192, D=576, F=1536, dtype=jnp.bfloat16),
    Shape(name="135M, 64k tokens", M=65_536, D=576, F=1536, dtype=jnp.bfloat16),
    Shape(name="1B, 8k tokens", M=8192, D=2048, F=8192, dtype=jnp.bfloat16),
)
BANKS = ((8, 1), (8, 2), (64, 1), (64, 2))  # experts, choices per token


def by_ragged_dot(x_PD: Any, gate: Any, up: Any, down: Any, sizes_E: Any) -> Any:
    hidden_PF = jax.nn.silu(jax.lax.ragged_dot(x_PD, gate, sizes_E))
    hidden_PF *= jax.lax.ragged_dot(x_PD, up, sizes_E)
    return jax.lax.ragged_dot(hidden_PF, down, sizes_E)


def measure_body(shape: Shape, n_experts: int, n_choices: int, topology: str) -> dict[str, Any]:
    """Compile a body in two ways for one device."""
    M, D, F = shape.M, shape.D, shape.F
    rng = np.random.default_rng(0)
    expert_MJ = np.argsort(rng.random((M, n_experts)), axis=1)[:, :n_choices].astype(np.int32)
    dispatch = kernels.make_dispatch(expert_MJ, n_experts, kernels.default_block(M, n_choices))
    n_routed, n_rows = M * n_choices, dispatch.choice_P.shape[0]

    def array(*sizes: int) -> jax.Array:
        return jnp.zeros(sizes, shape.dtype)

    bank = (array(n_experts, D, F), array(n_experts, D, F), array(n_experts, F, D))
    item = bank[0].dtype.itemsize
    needed_flops = 6 * n_routed * D * F
    needed_bytes = (3 * n_experts * D * F + 2 * n_routed * D) * item
    call = (_stream_body, tpu, (array(n_rows, D),), bank, dispatch)
    copied = total_bytes(count_transfers(*call))
    mesh = tpu_mesh(topology)
    rows = jax.ShapeDtypeStruct((n_rows, D), shape.dtype)
    sorted_rows = jax.ShapeDtypeStruct((n_routed, D), shape.dtype)
    sizes_E = jax.ShapeDtypeStruct((n_experts,), jnp.int32)

    contenders: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "kernel": (kernels.grouped_swiglu, (rows, *bank, dispatch)),
        "ragged_dot": (by_ragged_dot, (sorted_rows, *bank, sizes_E)),
    }
    row = {
        "question": "body",
        "shape": shape.name,
        "experts": n_experts,
        "choices": n_choices,
        "kernel_rows": count_rows(*call) / n_routed,
        "kernel_bytes": copied / needed_bytes,
    }
    for name, (fn, arguments) in contenders.items():
        compiled, seconds = compile_for(mesh, fn, *shapes_on(mesh, arguments))
        cost = read_cost(compiled)
        row[f"{name}_flops"] = cost["flops"] / needed_flops
        row[f"{name}_temporary_mb"] = cost["temporary_mb"]
        if name == "ragged_dot":
            row["ragged_dot_bytes"] = cost["bytes"] / needed_bytes
        row[f"{name}_compile_s"] = seconds
    return row


def measure_mix(topology: str, n_devices: int) -> dict[str, Any]:
    """Compile mix mode of `tiny-bytes` with room for three experts."""
    parts = cx.load("tiny-bytes", experts=[]).parts
    parts = dataclasses.replace(parts, bank=banks.grow(parts.bank, CAPACITY))
    mesh = tpu_mesh(topology, (n_devices, 1, 1, 1), AXES)

    def run(parts: Any, tokens_BT: jax.Array) -> jax.Array:
        return mix_mode.mix(parts, tokens_BT, mix_mode.mix_state(parts, DOCUMENTS))[0]

    tokens_BT = jax.ShapeDtypeStruct((DOCUMENTS, LENGTH), jnp.int32)
    arguments = shapes_on(mesh, parts), shapes_on(mesh, tokens_BT, BATCH_SPEC)
    compiled, seconds = compile_for(mesh, run, *arguments)
    return describe("mix", n_devices, compiled, seconds)


def measure_step(topology: str, n_devices: int) -> dict[str, Any]:
    """Compile the gradient of a low-rank expert of `tiny-bytes`."""
    backbone = cx.load("tiny-bytes", experts=[]).parts.backbone
    expert = Expert(backbone, kind="lora", rank=8, scout_width=64, rngs=nnx.Rngs(0))
    graph, params = nnx.split(expert)
    mesh = tpu_mesh(topology, (n_devices, 1, 1, 1), AXES)
    tokens_BU = jax.ShapeDtypeStruct((DOCUMENTS, LENGTH + 1), jnp.int32)
    step = jax.grad(expert_objective(graph), has_aux=True)
    arguments = shapes_on(mesh, (params, backbone))
    compiled, seconds = compile_for(mesh, step, *arguments, shapes_on(mesh, tokens_BU, BATCH_SPEC))
    return describe("step", n_devices, compiled, seconds)


def compile_for(mesh: Mesh, fn: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return the program for a mesh, and the seconds that compiling took."""
    start = time.perf_counter()
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        compiled = jax.jit(fn).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def read_cost(compiled: Any) -> dict[str, float]:
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "traffic": count_traffic(compiled.as_text()),
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
    }


def describe(question: str, n_devices: int, compiled: Any, seconds: float) -> dict[str, Any]:
    between = {kind: dataclasses.asdict(c) for kind, c in collectives_in(compiled).items()}
    row = {
        "question": question,
        "date": datetime.date.today().isoformat(),
        "devices": n_devices,
        "compile_s": seconds,
        "between": between,
    }
    return row | read_cost(compiled)


def show(row: dict[str, Any]) -> None:
    if row["question"] == "body":
        flops = "  ".join(
            f"{name} {row[f'{name}_flops']:6.2f}" for name in ("kernel", "ragged_dot")
        )
        print(
            f"body  {row['shape']:16} E={row['experts']:<3} J={row['choices']}  FLOPs: {flops}"
            f"  rows: {row['kernel_rows']:.2f}  bytes: kernel {row['kernel_bytes']:.2f}"
            f" ragged_dot {row['ragged_dot_bytes']:.2f}",
            flush=True,
        )
        return
    between = ", ".join(f"{c['count']} {kind}" for kind, c in row["between"].items()) or "none"
    print(
        f"{row['question']:5} {row['devices']} devices  {row['flops'] / 1e9:8.1f} GFLOP"
        f" {row['bytes'] / 1e9:7.2f} GB, traffic {row['traffic'] / 1e9:.2f} GB"
        f"  {row['temporary_mb']:7.1f} MB temporary"
        f"  between devices: {between}   ({row['compile_s']:.0f} s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v6e:2x4"])
    parser.add_argument(
        "--questions", nargs="+", choices=["body", "mix", "step"], default=["body", "mix", "step"]
    )
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    head = describe_environment()
    print(*(f"{key} {value}" for key, value in head.items()), sep=" | ")
    # Rows of other questions stay, with the date of their run.
    report: dict[str, Any] = {"environment": head, "topologies": {}}
    if arguments.json and arguments.json.exists():
        report["topologies"] = json.loads(arguments.json.read_text())["topologies"]
    for topology in arguments.topologies:
        print(topology)
        kept = report["topologies"].get(topology, [])
        rows = [row for row in kept if row["question"] not in arguments.questions]
        report["topologies"][topology] = rows
        for question in arguments.questions:
            if question == "body":
                for shape in (shape for shape in SHAPES if shape.name in arguments.shapes):
                    for bank in BANKS:
                        rows.append(measure_body(shape, *bank, topology))
                        show(rows[-1])
                continue
            for n_devices in (1, 4):
                measure = measure_mix if question == "mix" else measure_step
                rows.append(measure(topology, n_devices))
                show(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
