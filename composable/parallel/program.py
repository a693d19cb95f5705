"""What a compiled program costs: memory, products, and operations between devices.

XLA counts the body of a loop once; here it counts as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

COLLECTIVES: Final = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COMPUTATION: Final = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION: Final = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_CALLED: Final = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations)=\{?(%?[\w.-]+(?:, %?[\w.-]+)*)\}?"
)
_TRIPS: Final = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY: Final = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CONTRACTED: Final = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS: Final = re.compile(r"dim_labels=\w+_(\w+)->\w+")


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """Operations of one kind between devices.

    Args:
        count: How often one is run.
        bytes: Bytes of their results on one device.
    """

    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ProgramCost:
    """What one run of a program costs one device.

    Args:
        arguments: Bytes of the arguments, which stay in memory between runs.
        temporary: Bytes beyond arguments and results while it runs.
        peak: Bytes in memory at once, at most.
        flops: Floating-point operations of products of matrices.
        seconds: XLA's estimate of the time; None if it has none.
        collectives: Operations between devices, by kind.
    """

    arguments: int
    temporary: int
    peak: int
    flops: int
    seconds: float | None
    collectives: dict[str, Collectives]


def measure_program(compiled: Any) -> ProgramCost:
    """Return what a compiled program costs.

    Args:
        compiled: What `jax.jit(...).lower(...).compile()` returns.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> compiled = jax.jit(jnp.dot).lower(jnp.ones((4, 8)), jnp.ones((8, 2))).compile()
        >>> measure_program(compiled).flops
        128
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    flops, collectives = count_operations(compiled.as_text())
    seconds = cost.get("optimal_seconds") if cost else None
    return ProgramCost(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=held - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        flops=flops,
        seconds=seconds if seconds and seconds > 0 else None,
        collectives=collectives,
    )


def count_operations(text: str) -> tuple[int, dict[str, Collectives]]:
    """Return the FLOPs of products and the operations between devices of a program.

    Args:
        text: The program, as XLA prints it.
    """
    computations = _split_computations(text)
    runs = _count_runs(computations, text)
    flops, counts, sizes = 0, Counter[str](), Counter[str]()
    for name, instructions in computations.items():
        shapes = {one: result for one, result, _, _ in instructions}
        for _, result, kind, rest in instructions:
            base = kind.removesuffix("-start")
            if kind in ("dot", "convolution"):
                flops += runs[name] * _product_flops(kind, result, rest, shapes)
            elif base in COLLECTIVES:
                counts[base] += runs[name]
                arrays = _ARRAY.findall(result)
                # An asynchronous start returns its operand and its result.
                used = arrays[len(arrays) // 2 :] if kind != base and len(arrays) > 1 else arrays
                sizes[base] += runs[name] * sum(_array_bytes(*array) for array in used)
    found = {
        kind: Collectives(count=counts[kind], bytes=sizes[kind])
        for kind in sorted(counts)
        if counts[kind]
    }
    return flops, found


def _split_computations(text: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """Return the instructions of every computation: name, result, kind, and the rest."""
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    current: list[tuple[str, str, str, str]] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[1], [])
        elif found := _INSTRUCTION.match(line):
            current.append((found[1], found[2], found[3], found[4]))
    return computations


def _count_runs(
    computations: dict[str, list[tuple[str, str, str, str]]], text: str
) -> Counter[str]:
    """Return how often every computation runs in one run of the program."""
    entry = re.search(r"^ENTRY %?([\w.-]+) ", text, re.MULTILINE)
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for _, _, kind, rest in computations.get(name, ()):
            trips = _TRIPS.search(rest) if kind == "while" else None
            for called in _CALLED.findall(rest):
                for callee in called.split(", "):
                    visit(callee.removeprefix("%"), times * (int(trips[1]) if trips else 1))

    if entry:
        visit(entry[1], 1)
    return runs


def _product_flops(kind: str, result: str, rest: str, shapes: dict[str, str]) -> int:
    """Return the multiplications and additions of one product."""
    operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
    sides = [_sizes_of(shapes.get(operand, "")) for operand in operands[:2]]
    if kind == "dot":
        contracted = _CONTRACTED.search(rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2 * math.prod(_sizes_of(result)) * math.prod(sides[0][axis] for axis in axes)
    # XLA for TPUs writes a product as a convolution: all of the kernel but its output features.
    labels = _LABELS.search(rest)
    if not labels or len(sides) < 2:
        return 0
    features = labels[1].index("o")
    kernel = [size for axis, size in enumerate(sides[1]) if axis != features]
    return 2 * math.prod(_sizes_of(result)) * math.prod(kernel)


def _sizes_of(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _array_bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
