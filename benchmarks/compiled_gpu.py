"""What do the programs compiled for an NVIDIA GPU compute, read, and keep? No GPU is needed.

    pip install --target .cuda-compiler --no-deps jax-cuda12-pjrt==0.10.2 \\
        nvidia-cuda-nvcc-cu12==12.9.86              # the compiler
    python -m benchmarks.compiled_gpu [--questions work dispatch program mix] [--json FILE]

*Work*: the three legs of a grouped matmul, and a feed-forward body forward and trained (forward and
backward, with weight gradients). FLOPs are those of the tiles that our kernels multiply in a random
routing, padding included, over those of the routed rows. Bytes are those that they read from
memory and write, over the matrices in use and one read or write of each routed row of the leg's or
body's arguments and results; *with hidden* adds to these, for a body, one write and one read of
what is kept between its kernels. Both are counted program by program; the model of the cache is in
`tests/support/gpu_work.py`.

*Dispatch*: how many operations are launched one after the other to make the tables of 8,192 tokens'
choices, by the search that GPUs have and by the one that CPUs have.

*Program*: a body compiled for an H100, by our kernels and by `batch_blocks`, the portable path:
temporary memory, and the largest array of copies of weights, per chunk of blocks. XLA has no count
of FLOPs and bytes for GPUs. *Mix*: the same of mix mode of `tiny-bytes` with three experts on 16
documents of 512 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import composable as cx
from benchmarks.compiled import BANKS, CAPACITY, DOCUMENTS, LENGTH, SHAPES, Shape
from benchmarks.environment import describe_environment
from composable import kernels
from composable.kernels.grouped_matmul import (
    _stream_multiply,
    _stream_multiply_transposed,
    _stream_outer_product,
)
from composable.kernels.grouped_swiglu import (
    _stream_backward,
    _stream_body,
    _stream_body_and_keep,
)
from composable.model import bank as banks
from composable.model import mix as mix_mode
from tests.support import cuda_compiler
from tests.support.compiled import count_launches, shapes_on
from tests.support.gpu_work import Counted

GPU = cuda_compiler.H100
# Bodies, and choices per token.
DISPATCHES = ((16, 4), (64, 2), (128, 4))


def route(shape: Shape, n_experts: int, n_choices: int) -> kernels.Dispatch:
    rng = np.random.default_rng(0)
    expert_MJ = np.argsort(rng.random((shape.M, n_experts)), axis=1)[:, :n_choices]
    block = kernels.default_block(shape.M, n_choices)
    return kernels.make_dispatch(expert_MJ.astype(np.int32), n_experts, block)


def measure_work(shape: Shape, n_experts: int, n_choices: int) -> list[dict[str, Any]]:
    """Count what the kernels of legs and bodies do."""
    D, F, dtype = shape.D, shape.F, shape.dtype
    dispatch, n_routed = route(shape, n_experts, n_choices), shape.M * n_choices
    n_rows = dispatch.choice_P.shape[0]

    def array(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    # Arrays are distinguished by identity.
    x_PD, dy_PD, dy_PF, gate_PF, up_PF = (array(n_rows, n) for n in (D, D, F, F, F))
    bank = w_EDF, _, _ = tuple(array(n_experts, *size) for size in ((D, F), (D, F), (F, D)))

    def forward(chip: Any) -> None:
        _stream_body(chip, (x_PD,), bank, dispatch)

    def train(chip: Any) -> None:
        _stream_body_and_keep(chip, (x_PD,), bank, dispatch)
        _stream_backward(chip, (dy_PD, gate_PF, up_PF, x_PD), bank, dispatch)

    item = np.dtype(dtype).itemsize
    matrix, wide, narrow = n_experts * D * F, n_routed * F * item, n_routed * D * item
    # Function, products, bytes of arguments and results, bytes kept between kernels. A trained body
    # reads its matrices in both passes, and keeps gate and up, and writes its sums in float32;
    # between its kernels are the hidden activations, and in the backward pass also two gradients.
    legs: dict[str, tuple[Callable[[Any], object], int, int, int]] = {
        "forward": (
            lambda chip: _stream_multiply(chip, (x_PD,), (w_EDF,), dispatch),
            *(1, matrix * item + narrow + wide, 0),
        ),
        "input gradient": (
            lambda chip: _stream_multiply_transposed(chip, (dy_PF,), (w_EDF,), dispatch),
            *(1, matrix * item + narrow + wide, 0),
        ),
        "weight gradient": (
            lambda chip: _stream_outer_product(chip, (x_PD, dy_PF), (), dispatch),
            *(1, 4 * matrix + narrow + wide, 0),
        ),
        "body": (forward, 3, 3 * matrix * item + 2 * narrow, 2 * wide),
        "trained": (train, 9, 3 * matrix * (2 * item + 4) + 5 * narrow + 4 * wide, 8 * wide),
    }
    rows = []
    for name, (run, n_products, n_bytes, between) in legs.items():
        counted = Counted(cores=GPU.cores, cache=GPU.cache // 2)
        run(counted)
        moved = counted.read + counted.written
        row = {
            "question": "work",
            "shape": shape.name,
            "experts": n_experts,
            "choices": n_choices,
            "leg": name,
            "kernels": len(counted.kernels),
            "flops": counted.flops / (2 * n_products * n_routed * D * F),
            "bytes": moved / n_bytes,
            "bytes_with_hidden": moved / (n_bytes + between),
        }
        rows.append(row)
    return rows


@contextlib.contextmanager
def portable_path() -> Iterator[None]:
    """Compile for other GPUs, which have no kernels here."""
    choose = jax.lax.platform_dependent

    def without_cuda(*args: Any, cuda: Any = None, **others: Any) -> Any:
        return choose(*args, **others)

    jax.clear_caches()
    with mock.patch.object(jax.lax, "platform_dependent", without_cuda):
        yield
    jax.clear_caches()


def compile_both(
    mesh: jax.sharding.Mesh,
    folder: Path,
    fn: Callable[..., Any],
    arguments: Any,
    bodies: tuple[tuple[int, ...], ...],
) -> dict[str, Any]:
    """Compile by both paths; `bodies` are the shapes of the bank's arrays."""
    row: dict[str, Any] = {}
    options = cuda_compiler.compile_options(folder)
    for name, path in (("kernels", contextlib.nullcontext), ("batch_blocks", portable_path)):
        with path():
            start = time.perf_counter()
            # Another function each time: jit keeps what it traced.
            lowered = jax.jit(lambda *args: fn(*args)).lower(*shapes_on(mesh, arguments))
            compiled = lowered.compile(compiler_options=options)
        text = compiled.as_text()
        row |= {
            f"{name}_temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
            f"{name}_weight_copies_mb": find_copies(text, bodies) / 1e6,
            f"{name}_kernels": text.count('custom_call_target="__gpu$xla.gpu.triton"'),
            f"{name}_compile_s": time.perf_counter() - start,
        }
    return row


def find_copies(text: str, bodies: tuple[tuple[int, ...], ...]) -> int:
    """Return the bytes of the largest array of several matrices that is not one of a bank's.

    Args:
        text: A compiled program.
        bodies: Shapes of the bank's arrays.
    """
    widths = {"bf16": 2, "f32": 4}
    largest = 0
    for _, *matrix in bodies:
        known = {body[0] for body in bodies if list(body[1:]) == matrix}
        sizes = ",".join(map(str, matrix))
        for kind, count in re.findall(rf"\b(bf16|f32)\[(\d+),{sizes}\]", text):
            if int(count) not in known | {1}:
                largest = max(largest, widths[kind] * int(count) * int(np.prod(matrix)))
    return largest


def measure_program(
    shape: Shape, n_experts: int, n_choices: int, mesh: jax.sharding.Mesh, folder: Path
) -> list[dict[str, Any]]:
    """Compile a body, forward and trained."""
    dispatch = route(shape, n_experts, n_choices)
    D, F = shape.D, shape.F
    sizes = ((n_experts, D, F), (n_experts, D, F), (n_experts, F, D))
    bank = tuple(jax.ShapeDtypeStruct(size, shape.dtype) for size in sizes)
    x_PD = jax.ShapeDtypeStruct((dispatch.choice_P.shape[0], D), shape.dtype)

    def forward(x_PD: Any, bank: Any, dispatch: Any) -> Any:
        return kernels.grouped_swiglu(x_PD, *bank, dispatch)

    def train(x_PD: Any, bank: Any, dispatch: Any) -> Any:
        y_PD, pull = jax.vjp(lambda x, w: forward(x, w, dispatch), x_PD, bank)
        return y_PD, pull(y_PD)

    return [
        {
            "question": "program",
            "shape": shape.name,
            "experts": n_experts,
            "choices": n_choices,
            "leg": name,
            **compile_both(mesh, folder, fn, (x_PD, bank, dispatch), sizes),
        }
        for name, fn in (("body", forward), ("trained", train))
    ]


def measure_dispatch(
    n_tokens: int, n_experts: int, n_choices: int, mesh: jax.sharding.Mesh, folder: Path
) -> dict[str, Any]:
    """Compile the making of a dispatch, with either search."""
    choose = jax.lax.platform_dependent

    def as_on_cpu(*args: Any, cpu: Any, **_: Any) -> Any:
        return choose(*args, default=cpu)

    expert_MJ = jax.ShapeDtypeStruct((n_tokens, n_choices), jnp.int32)
    block = kernels.default_block(n_tokens, n_choices)
    row = {"question": "dispatch", "experts": n_experts, "choices": n_choices}
    for name, chosen in (("compared", choose), ("halved", as_on_cpu)):
        with mock.patch.object(jax.lax, "platform_dependent", chosen):
            lowered = jax.jit(lambda e: kernels.make_dispatch(e, n_experts, block)).lower(
                shapes_on(mesh, expert_MJ)
            )
        compiled = lowered.compile(compiler_options=cuda_compiler.compile_options(folder))
        row[f"{name}_launches"] = count_launches(compiled.as_text())
    return row


def measure_mix(mesh: jax.sharding.Mesh, folder: Path) -> dict[str, Any]:
    """Compile mix mode of `tiny-bytes` with room for three experts."""
    parts = cx.load("tiny-bytes", experts=[]).parts
    parts = dataclasses.replace(parts, bank=banks.grow(parts.bank, CAPACITY))
    D, F = parts.backbone.cfg.d_model, parts.backbone.cfg.d_ff

    def run(parts: Any, tokens_BT: jax.Array) -> jax.Array:
        return mix_mode.mix(parts, tokens_BT, mix_mode.mix_state(parts, DOCUMENTS))[0]

    tokens_BT = jax.ShapeDtypeStruct((DOCUMENTS, LENGTH), jnp.int32)
    sizes = tuple((n, *size) for n in (CAPACITY, CAPACITY + 1) for size in ((D, F), (F, D)))
    return {"question": "mix", **compile_both(mesh, folder, run, (parts, tokens_BT), sizes)}


def show(row: dict[str, Any]) -> None:
    bank = f"E={row['experts']:<3} J={row['choices']} {row['leg']:15}" if "leg" in row else ""
    if row["question"] == "work":
        figures = (
            f"FLOPs {row['flops']:5.2f}  bytes {row['bytes']:5.2f}"
            f"  with hidden {row['bytes_with_hidden']:5.2f}  kernels {row['kernels']}"
        )
    elif row["question"] == "dispatch":
        bank = f"E={row['experts']:<3} J={row['choices']}"
        figures = (
            f"launched: {row['compared_launches']} comparing all,"
            f" {row['halved_launches']} by halves"
        )
    else:
        figures = "   ".join(
            f"{name}: {row[f'{name}_temporary_mb']:.0f} MB temporary,"
            f" copies {row[f'{name}_weight_copies_mb']:.0f} MB, {row[f'{name}_kernels']} kernels"
            for name in ("kernels", "batch_blocks")
        )
    print(f"{row['question']:8}{row.get('shape', ''):16} {bank} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    questions = ["work", "dispatch", "program", "mix"]
    parser.add_argument("--questions", nargs="+", choices=questions, default=questions)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=[names[0], names[2]])
    every_bank = {f"{experts}:{choices}": (experts, choices) for experts, choices in BANKS}
    parser.add_argument(
        "--banks", nargs="+", choices=every_bank, default=[*every_bank], help="experts : choices"
    )
    parser.add_argument(
        "--compiler", type=Path, default=cuda_compiler.FOLDER, metavar="DIR", help="the two wheels"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    head = {
        **describe_environment(),
        "compiled for": GPU.name,
    }
    print(*(f"{key} {value}" for key, value in head.items()), sep=" | ")
    needs_compiler = set(arguments.questions) != {"work"}
    if needs_compiler and (missing := cuda_compiler.find_missing(arguments.compiler)):
        parser.error(missing)
    mesh = cuda_compiler.gpu_mesh(GPU, arguments.compiler) if needs_compiler else None
    rows: list[dict[str, Any]] = []

    def add(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        for row in found:
            show(row)

    for shape in (shape for shape in SHAPES if shape.name in arguments.shapes):
        for bank in map(every_bank.__getitem__, arguments.banks):
            if "work" in arguments.questions:
                add(measure_work(shape, *bank))
            if "program" in arguments.questions:
                assert mesh is not None
                add(measure_program(shape, *bank, mesh, arguments.compiler))
    if "dispatch" in arguments.questions:
        assert mesh is not None
        for n_experts, n_choices in DISPATCHES:
            add([measure_dispatch(SHAPES[0].M, n_experts, n_choices, mesh, arguments.compiler)])
    if "mix" in arguments.questions:
        assert mesh is not None
        add([measure_mix(mesh, arguments.compiler)])
    if arguments.json:
        # Rows of other questions stay, with the date of their run.
        kept = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
        asked = arguments.questions
        rows = [row for row in kept if row["question"] not in asked] + [
            {**row, "date": head["date"]} for row in rows
        ]
        report = {"environment": head, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
