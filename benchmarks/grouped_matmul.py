"""How fast are grouped matmul and grouped SwiGLU, beside a bound and peers of the same run?

    python -m benchmarks.grouped_matmul                       # all shapes, default block
    python -m benchmarks.grouped_matmul --blocks 16 32 64 128 # which block size is best here?
    python -m benchmarks.grouped_matmul --shapes tiny-2048-4 --rounds 15 --json out.json
    python -m benchmarks.grouped_matmul --dtype bfloat16      # on a GPU or TPU: all targets

*Bound*: one dense product, or one dense feed-forward body, over the M * J rows that are really
routed: the same useful FLOPs without grouping. *Peers*: `jax.lax.ragged_dot` on rows sorted without
padding, a dense einsum of every token with every expert, and, where PyTorch is installed and uses
the same kind of device, its `grouped_mm` on the same sorted rows. On a GPU set
XLA_PYTHON_CLIENT_PREALLOCATE=false, so that PyTorch finds memory.

All contenders take turns, one call each per round, and `share` is the median over the rounds of
bound time / own time within a round, so what else the machine is doing hits both alike. `cpu share`
is the same of the processor time of all threads, which waits in a busy machine's queues do not
enter; on other devices it says nothing. `spread` is the interquartile range of the times.

Unless shapes are named, the steps of a model with eight experts follow (`eight_experts.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import eight_experts
from composable import kernels
from composable.kernels.grouped_matmul import (
    multiply_rows,
    multiply_rows_transposed,
    sum_outer_products,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one question; the letters are those of `composable.interface.dims`."""

    name: str
    M: int
    J: int
    D: int
    F: int
    E: int


SHAPES = (
    Shape(name="tiny-2048-4", M=2048, J=2, D=192, F=480, E=4),
    Shape(name="tiny-2048-16", M=2048, J=2, D=192, F=480, E=16),
    Shape(name="tiny-8192-4", M=8192, J=2, D=192, F=480, E=4),
    Shape(name="tiny-8192-16", M=8192, J=2, D=192, F=480, E=16),
    Shape(name="small-2048-4", M=2048, J=2, D=576, F=1536, E=4),
    Shape(name="small-2048-16", M=2048, J=2, D=576, F=1536, E=16),
    Shape(name="decode-1-16", M=1, J=2, D=192, F=480, E=16),
    Shape(name="decode-32-16", M=32, J=2, D=192, F=480, E=16),
)
# Shares of the dense bound that accelerators should reach; the last is a whole layer, forward and
# backward.
TARGETS = {
    "forward": 0.85,
    "input gradient": 0.85,
    "weight gradient": 0.85,
    "swiglu, trained": 0.5,
}
# For accelerators; a CPU takes minutes over them.
LARGE_SHAPES = (
    Shape(name="large-8192-8", M=8192, J=2, D=2048, F=8192, E=8),
    Shape(name="large-8192-64", M=8192, J=2, D=2048, F=8192, E=64),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do one leg; the first of a leg is its bound."""

    leg: str
    name: str
    run: Callable[[], object]


def swiglu(x_PD: Array, w_gate_DF: Array, w_up_DF: Array, w_down_FD: Array) -> Array:
    return (jax.nn.silu(x_PD @ w_gate_DF) * (x_PD @ w_up_DF)) @ w_down_FD


def torch_contenders(rows_D: Array, bank: Sequence[Array], sizes_E: Array) -> list[Contender]:
    """Return PyTorch's grouped products; none where it is missing or cannot run them."""
    try:
        import torch
    except ImportError:
        return []
    device = {"gpu": "cuda", "cpu": "cpu"}.get(jax.default_backend())
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        return []
    dtype = getattr(torch, rows_D.dtype.name)

    def convert(array: Array) -> torch.Tensor:
        host = np.array(array, np.float32)
        return torch.from_numpy(host).to(device=device, dtype=dtype)

    grouped_mm = torch.nn.functional.grouped_mm
    x, gate, up, down = map(convert, (rows_D, *bank))
    ends = torch.from_numpy(np.cumsum(np.asarray(sizes_E), dtype=np.int32)).to(device)

    def run(fn: Callable[[], object]) -> Callable[[], object]:
        def run_and_wait() -> object:
            with torch.no_grad():
                result = fn()
            if device == "cuda":
                torch.cuda.synchronize()
            return result is None

        return run_and_wait

    def body() -> torch.Tensor:
        hidden = torch.nn.functional.silu(grouped_mm(x, gate, offs=ends))
        return grouped_mm(hidden * grouped_mm(x, up, offs=ends), down, offs=ends)

    try:
        body()
    except RuntimeError as error:
        print(f"torch grouped_mm does not run here in {rows_D.dtype}: {error}")
        return []
    product = run(lambda: grouped_mm(x, gate, offs=ends))
    return [
        Contender(leg="forward", name="torch grouped_mm", run=product),
        Contender(leg="swiglu", name="torch 3 grouped_mm", run=run(body)),
    ]


def contenders_of(
    shape: Shape, blocks: Sequence[int], dtype: str, *, with_peers: bool
) -> list[Contender]:
    """Build the arrays of a shape and everything that runs on them."""
    rng = np.random.default_rng(0)

    def normal(*sizes: int) -> Array:
        return jnp.asarray(rng.normal(size=sizes) / sizes[-2] ** 0.5, dtype)

    n_rows = shape.M * shape.J
    x_MD, weights_MJ = normal(shape.M, shape.D), normal(shape.M, shape.J)
    scores_ME = rng.normal(size=(shape.M, shape.E))
    expert_MJ = jnp.asarray(np.argsort(scores_ME, axis=1)[:, : shape.J], jnp.int32)
    sizes_E = jnp.bincount(expert_MJ.reshape(-1), length=shape.E)
    # Rows without padding, for the bound and for `ragged_dot`.
    rows_D, rows_F = normal(n_rows, shape.D), normal(n_rows, shape.F)
    bank = (
        normal(shape.E, shape.D, shape.F),
        normal(shape.E, shape.D, shape.F),
        normal(shape.E, shape.F, shape.D),
    )
    one = tuple(w[0] for w in bank)

    def bind(leg: str, name: str, fn: Callable[..., object], *arrays: object) -> Contender:
        jitted = jax.jit(fn)
        return Contender(leg=leg, name=name, run=lambda: jitted(*arrays))

    def train(fn: Callable[..., Array]) -> Callable[..., object]:
        """Value and all gradients, for a cotangent equal to the rows."""

        def run(x_PD: Array, *weights: Array) -> object:
            y_PD, pull = jax.vjp(fn, x_PD, *weights)
            return y_PD, pull(x_PD)

        return run

    def train_below(fn: Callable[..., Array]) -> Callable[..., object]:
        """Value and input gradient: the weights are frozen."""

        def run(x_PD: Array, *weights: Array) -> object:
            y_PD, pull = jax.vjp(lambda x_PD: fn(x_PD, *weights), x_PD)
            return y_PD, pull(x_PD)

        return run

    found = [
        bind("forward", "dense bound", jnp.matmul, rows_D, one[0]),
        bind("input gradient", "dense bound", lambda dy, w: dy @ w.T, rows_F, one[0]),
        bind("weight gradient", "dense bound", lambda x, dy: x.T @ dy, rows_D, rows_F),
        bind("swiglu", "dense bound", swiglu, rows_D, *one),
        bind("swiglu, frozen", "dense bound", train_below(swiglu), rows_D, *one),
        bind("swiglu, trained", "dense bound", train(swiglu), rows_D, *one),
    ]
    for block in blocks:
        label = f"block {block}"
        dispatch = kernels.make_dispatch(expert_MJ, shape.E, block)
        x_PD = kernels.gather_rows(x_MD, dispatch)
        dy_PF = kernels.grouped_matmul(x_PD, bank[1], dispatch)

        def grouped(x_PD: Array, *weights: Array, dispatch: kernels.Dispatch = dispatch) -> Array:
            return kernels.grouped_swiglu(x_PD, *weights, dispatch)

        def by_matmuls(
            x_PD: Array, *weights: Array, dispatch: kernels.Dispatch = dispatch
        ) -> Array:
            gate_PF = kernels.grouped_matmul(x_PD, weights[0], dispatch)
            up_PF = kernels.grouped_matmul(x_PD, weights[1], dispatch)
            return kernels.grouped_matmul(jax.nn.silu(gate_PF) * up_PF, weights[2], dispatch)

        def make(expert_MJ: Array, block: int = block) -> kernels.Dispatch:
            return kernels.make_dispatch(expert_MJ, shape.E, block)

        found += [
            bind("forward", label, multiply_rows, x_PD, bank[0], dispatch),
            bind("input gradient", label, multiply_rows_transposed, dy_PF, bank[0], dispatch),
            bind("weight gradient", label, sum_outer_products, x_PD, dy_PF, dispatch),
            bind("swiglu", f"fused, {label}", grouped, x_PD, *bank),
            bind("swiglu", f"3 matmuls, {label}", by_matmuls, x_PD, *bank),
            bind("swiglu, frozen", f"fused, {label}", train_below(grouped), x_PD, *bank),
            bind("swiglu, frozen", f"3 matmuls, {label}", train_below(by_matmuls), x_PD, *bank),
            bind("swiglu, trained", f"fused, {label}", train(grouped), x_PD, *bank),
            bind("swiglu, trained", f"3 matmuls, {label}", train(by_matmuls), x_PD, *bank),
            bind("make_dispatch", label, make, expert_MJ),
            bind("gather_rows", label, kernels.gather_rows, x_MD, dispatch),
            bind("combine_rows", label, kernels.combine_rows, x_PD, weights_MJ, dispatch),
        ]
    if with_peers:
        ragged = jax.lax.ragged_dot
        found += [
            bind("forward", "ragged_dot", ragged, rows_D, bank[0], sizes_E),
            bind(
                "forward",
                "every expert",
                lambda x_MD, w_EDF: jnp.einsum("md,edf->mef", x_MD, w_EDF),
                x_MD,
                bank[0],
            ),
            *torch_contenders(rows_D, bank, sizes_E),
        ]
    legs = list(dict.fromkeys(contender.leg for contender in found))
    return sorted(found, key=lambda contender: legs.index(contender.leg))


def measure(contenders: Sequence[Contender], rounds: int) -> list[dict[str, object]]:
    """Let the contenders take turns and compare each with its leg's bound, round by round."""
    for contender in contenders:
        jax.block_until_ready(contender.run())
    seconds: list[list[float]] = [[] for _ in contenders]
    cpu_seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for index, contender in enumerate(contenders):
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(contender.run())
            seconds[index].append(time.perf_counter() - start)
            cpu_seconds[index].append(time.process_time() - cpu_start)
    bound_index = {c.leg: index for index, c in enumerate(contenders) if c.name == "dense bound"}

    def share_of_bound(samples: list[list[float]], index: int) -> float | None:
        bound = bound_index.get(contenders[index].leg)
        if bound is None:
            return None
        pairs = zip(samples[bound], samples[index], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)

    rows: list[dict[str, object]] = []
    for index, contender in enumerate(contenders):
        own = seconds[index]
        low, _, high = statistics.quantiles(own, n=4)
        rows.append(
            {
                "leg": contender.leg,
                "contender": contender.name,
                "median_ms": 1e3 * statistics.median(own),
                "spread_ms": 1e3 * (high - low),
                "least_ms": 1e3 * min(own),
                "share_of_bound": share_of_bound(seconds, index),
                "cpu_median_ms": 1e3 * statistics.median(cpu_seconds[index]),
                "cpu_share_of_bound": share_of_bound(cpu_seconds, index),
            }
        )
    return rows


def compare_with_targets(rows: Sequence[dict[str, object]]) -> list[str]:
    """Return a line for each leg with a target: its share of the bound, by the best block size."""
    lines = []
    for leg, target in TARGETS.items():
        shares = [
            row["share_of_bound"]
            for row in rows
            if row["leg"] == leg and "block" in str(row["contender"])
        ]
        best = max(share for share in shares if isinstance(share, float))
        verdict = "met" if best >= target else "not met"
        lines.append(f"target {target} of the bound, {leg}: {best:.2f}, {verdict}")
    return lines


def environment() -> dict[str, object]:
    """Device and versions, and how busy the machine is."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def main() -> None:
    every_shape = {shape.name: shape for shape in (*SHAPES, *LARGE_SHAPES)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", choices=every_shape, help="default: all that suit the device"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--blocks", nargs="+", type=int, help="default: default_block of the shape")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-peers", action="store_true", help="leave out the slow peers")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()

    report: dict[str, Any] = {"environment": environment(), "rounds": args.rounds}
    print(*(f"{key} {value}" for key, value in environment().items()), sep=" | ")
    results: dict[str, object] = {}
    suitable = SHAPES if jax.default_backend() == "cpu" else (*SHAPES, *LARGE_SHAPES)
    for name in args.shapes or [shape.name for shape in suitable]:
        shape = every_shape[name]
        blocks = args.blocks or [kernels.default_block(shape.M, shape.J)]
        rows = measure(
            contenders_of(shape, blocks, args.dtype, with_peers=not args.no_peers),
            rounds=args.rounds,
        )
        results[shape.name] = {"sizes": dataclasses.asdict(shape), "rows": rows}
        sizes = " ".join(f"{letter}={getattr(shape, letter)}" for letter in "MJDFE")
        print(f"\n{shape.name}: {sizes} {args.dtype}")
        print(f"{'leg':16} {'contender':22} {'ms':>9} {'spread':>8} {'share':>6} {'cpu share':>10}")
        for row in rows:
            shares = [row["share_of_bound"], row["cpu_share_of_bound"]]
            wall, cpu = ("" if share is None else f"{share:.2f}" for share in shares)
            print(
                f"{row['leg']:16} {row['contender']:22} {row['median_ms']:9.3f}"
                f" {row['spread_ms']:8.3f} {wall:>6} {cpu:>10}",
                flush=True,
            )
        if jax.default_backend() != "cpu":
            print(*compare_with_targets(rows), sep="\n")
    if not args.shapes:
        print("\na step with eight experts, over the backbone's own")
        report["steps"] = eight_experts.measure(eight_experts.choose_case(), args.rounds)
        for row in report["steps"]:
            eight_experts.show(row)
    if args.json:
        report["shapes"] = results
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
