"""What a compiled program costs: memory, products, and operations between devices.

XLA counts the body of a loop once; here it counts as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

COLLECTIVES: Final = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_COMPUTATION: Final = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION: Final = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED: Final = re.compile(r"\b(?:body|calls|to_apply)=\{?%?([\w.-]+)")
_BRANCHES: Final = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BRANCH: Final = re.compile(r"\b(?:true|false)_computation=%?([\w.-]+)")
_CONDITION: Final = re.compile(r"\bcondition=%?([\w.-]+)")
_KNOWN_TRIPS: Final = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_BODY: Final = re.compile(r"\bbody=%?([\w.-]+)")
_ELEMENT: Final = re.compile(r"\), index=(\d+)\b")
_OPERAND: Final = re.compile(r"%([\w.-]+)")
_CONSTANT: Final = re.compile(r"^(\d+)\)")
_CHANNEL: Final = re.compile(r"\bchannel_id=(\d+)")
# As jax's own lowering numbers it.
_MANUAL_CHANNEL: Final = "1"
_ARRAY: Final = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CONTRACTED: Final = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
_WINDOW: Final = re.compile(r"\b(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_-]+)")
_LABELS: Final = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")


# Operations of a kernel, by its name in the program and the shapes of its operands.
KernelCount = Callable[[str, Sequence[Sequence[int]]], int]
# `max` or `min`.
ChooseBranch = Callable[..., str]


class _Instruction(NamedTuple):
    """One line of a program."""

    name: str
    result: str
    kind: str
    rest: str

    @property
    def constant(self) -> str:
        """What follows the name of a constant; empty for anything else."""
        return self.rest if self.kind == "constant" else ""


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
        flops: Floating-point operations of products of matrices; of those within kernels, as many
            as `measure_program` was told to count.
        collectives: Operations between devices, by kind.
    """

    arguments: int
    temporary: int
    peak: int
    flops: int
    collectives: dict[str, Collectives]


def measure_program(compiled: Any, count_kernel: KernelCount | None = None) -> ProgramCost:
    """Return what a compiled program costs.

    Args:
        compiled: What `jax.jit(...).lower(...).compile()` returns.
        count_kernel: Counts the operations within a kernel, which XLA knows nothing of; without it
            they are left out.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> compiled = jax.jit(jnp.dot).lower(jnp.ones((4, 8)), jnp.ones((8, 2))).compile()
        >>> measure_program(compiled).flops
        128
    """
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    flops, collectives = count_operations(compiled.as_text(), count_kernel)
    return ProgramCost(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=held - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        flops=flops,
        collectives=collectives,
    )


def count_operations(
    text: str, count_kernel: KernelCount | None = None, *, choose: ChooseBranch = max
) -> tuple[int, dict[str, Collectives]]:
    """Return the FLOPs of products and the operations between devices of a program.

    Args:
        text: The program, as XLA prints it.
        count_kernel: As of `measure_program`.
        choose: Which branch of a condition is counted, by its cost: by default the greatest.
    """
    return _count_from(*_split_computations(text), count_kernel, choose)


def _count_from(
    computations: Mapping[str, Sequence[_Instruction]],
    entry: str,
    count_kernel: KernelCount | None = None,
    choose: ChooseBranch = max,
) -> tuple[int, dict[str, Collectives]]:
    """Return FLOPs and operations between devices of one run of a computation."""
    runs = _count_runs(computations, entry, count_kernel, choose)
    flops = 0
    # Parts of an asynchronous operation share its channel. So do all operations that a function
    # within `jax.shard_map` asks for itself.
    between: dict[tuple[str, str], tuple[int, int]] = {}
    for name, instructions in computations.items():
        shapes = {one.name: one.result for one in instructions}
        for one in instructions:
            kind = one.kind.removesuffix("-start")
            if kind in ("dot", "convolution"):
                flops += runs[name] * _product_flops(one, shapes)
            elif kind == "custom-call" and count_kernel:
                operands = _OPERAND.findall(one.rest.partition(")")[0])
                operand_sizes = [_sizes_of(shapes.get(operand, "")) for operand in operands]
                flops += runs[name] * count_kernel(one.name, operand_sizes)
            elif kind in COLLECTIVES and runs[name]:
                channel = _CHANNEL.search(one.rest)
                own = channel[1] if channel else _MANUAL_CHANNEL
                key = kind, f"{name}.{one.name}" if own == _MANUAL_CHANNEL else own
                between[key] = runs[name], _exchanged_bytes(one, shapes)
    counts, sizes = Counter[str](), Counter[str]()
    for (kind, _), (times, size) in between.items():
        counts[kind] += times
        sizes[kind] += times * size
    found = {kind: Collectives(count=counts[kind], bytes=sizes[kind]) for kind in sorted(counts)}
    return flops, found


def _split_computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Return the instructions of every computation, and the name of the first one."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(*found.groups()))
    return computations, entry


def _count_runs(
    computations: Mapping[str, Sequence[_Instruction]],
    entry: str,
    count_kernel: KernelCount | None = None,
    choose: ChooseBranch = max,
) -> Counter[str]:
    """Return how often every computation runs in one run of the program."""
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for one in computations.get(name, ()):
            trips = _count_trips(one, computations) if one.kind == "while" else 1
            for callee in _CALLED.findall(one.rest):
                visit(callee, times * trips)
            if branches := _find_branches(one):
                visit(choose(branches, key=weigh), times)

    def weigh(branch: str) -> tuple[int, int]:
        flops, collectives = _count_from(computations, branch, count_kernel, choose)
        return flops, sum(found.bytes for found in collectives.values())

    visit(entry, 1)
    return runs


def _find_branches(one: _Instruction) -> list[str]:
    """Return the computations of which a condition runs one."""
    listed = _BRANCHES.search(one.rest)
    return _OPERAND.findall(listed[1]) if listed else _BRANCH.findall(one.rest)


def _count_trips(loop: _Instruction, computations: Mapping[str, Sequence[_Instruction]]) -> int:
    """Return how often a loop runs; 1 where that depends on data.

    A loop of a known length counts from 0 up to a constant.
    """
    if known := _KNOWN_TRIPS.search(loop.rest):
        return int(known[1])
    condition, body = _CONDITION.search(loop.rest), _BODY.search(loop.rest)
    if condition is None or body is None or not (lines := computations.get(condition[1])):
        return 1
    constants = [int(found[1]) for one in lines if (found := _CONSTANT.match(one.constant))]
    counters = [found[1] for one in lines if (found := _ELEMENT.search(one.rest))]
    if len(constants) != 1 or len(counters) != 1 or lines[-1].kind != "compare":
        return 1
    return -(-constants[0] // _find_step(computations.get(body[1], ()), int(counters[0])))


def _find_step(body: Sequence[_Instruction], index: int) -> int:
    """Return what the body of a loop adds to one element of its state; 1 if that is unclear."""
    by_name = {one.name: one for one in body}
    operands = _OPERAND.findall(body[-1].rest.partition(")")[0]) if body else []
    step, current = 0, operands[index] if index < len(operands) else ""
    while (one := by_name.get(current)) and one.kind == "add":
        for operand in _OPERAND.findall(one.rest.partition(")")[0]):
            found = by_name.get(operand)
            if found and (constant := _CONSTANT.match(found.constant)):
                step += int(constant[1])
            else:
                current = operand
    return max(step, 1)


def _product_flops(one: _Instruction, shapes: Mapping[str, str]) -> int:
    """Return the multiplications and additions of one product."""
    operands = _OPERAND.findall(one.rest.partition(")")[0])
    left, right = (_sizes_of(shapes.get(operand, "")) for operand in operands[:2])
    result = _sizes_of(one.result)
    if one.kind == "dot":
        contracted = _CONTRACTED.search(one.rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2 * math.prod(result) * math.prod(left[axis] for axis in axes)
    # XLA for TPUs writes products as convolutions, with dimensions of a batch as a window.
    labels = _LABELS.search(one.rest)
    if labels is None:
        return 0
    window = {key: value.split("x") for key, value in _WINDOW.findall(one.rest)}
    pairs = 1
    for i, axis in enumerate(sorted(label for label in labels[2] if label.isdigit())):
        pairs *= _count_pairs(
            left[labels[1].index(axis)],
            right[labels[2].index(axis)],
            result[labels[3].index(axis)],
            {key: value[i] for key, value in window.items()},
        )
    outer = result[labels[3].index("b")] * result[labels[3].index("f")]
    return 2 * outer * right[labels[2].index("i")] * pairs


def _count_pairs(n_left: int, n_kernel: int, n_result: int, window: Mapping[str, str]) -> int:
    """Return how many positions of a result and a kernel meet one of the input, on one axis."""
    stride, left_step, kernel_step = (
        int(window.get(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    low = int(window.get("pad", "0_0").split("_")[0])
    last = (n_left - 1) * left_step
    return sum(
        0 <= (at := i * stride + k * kernel_step - low) <= last and at % left_step == 0
        for i in range(n_result)
        for k in range(n_kernel)
    )


def _exchanged_bytes(one: _Instruction, shapes: Mapping[str, str]) -> int:
    """Return the bytes that a device receives in an operation, at most in one of uneven parts.

    There, either what is sent or what is received has room for the most uneven case.
    """
    received = _result_bytes(one)
    if one.kind != "ragged-all-to-all":
        return received
    sent = _ARRAY.search(shapes.get(_OPERAND.findall(one.rest)[0], ""))
    return min(received, _array_bytes(*sent.groups())) if sent else received


def _result_bytes(one: _Instruction) -> int:
    """Return the bytes that an operation between devices results in on one of them."""
    arrays = _ARRAY.findall(one.result)
    if one.kind.endswith("-start") and len(arrays) > 1:
        # It has its operands in its result, too, and scalars that say how far it is.
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    return sum(_array_bytes(*array) for array in arrays)


def _sizes_of(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _array_bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
