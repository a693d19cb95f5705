"""Compile for TPUs that are not here, and read what a compiled program does.

`libtpu` holds the TPU compiler and needs no TPU: `pip install libtpu`, in the version that jax
names for its extra `tpu`. `make parity` installs it.
"""

import math
import re

import jax
import numpy as np

from composable.kernels.native import MULTIPLY
from composable.parallel import program
from composable.parallel.chips import tpu_devices
from composable.parallel.program import Collectives, count_operations


def tpu_mesh(topology: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("data",)):
    """Return a mesh of TPUs to compile for.

    Args:
        topology: For example "v5e:2x4".
        shape: Devices along each axis; the first of the topology are used.
        axes: Names of the axes.
    """
    used = np.array(tpu_devices(topology)[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(used, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def shapes_on(mesh, tree, spec=jax.P()):  # noqa: B008
    """Return a tree's shapes, placed on a mesh: arguments to compile for."""
    sharding = jax.NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def collectives_in(compiled) -> dict[str, Collectives]:
    """Return the operations between devices in a compiled program, by kind."""
    return count_operations(compiled.as_text())[1]


def multiplied(compiled) -> list[tuple[str, tuple[int, ...]]]:
    """Return type and sizes of the second operand of every product in a program.

    A product is XLA's, of two matrices, or the native kernel's.
    """
    text = compiled.as_text()
    made = dict(re.findall(r"(%[\w.-]+) = (\w+\[[\d,]*\])", text))
    found = [made[name] for name in re.findall(r" dot\(%[\w.-]+, (%[\w.-]+)\)", text)]
    native = rf'custom_call_target="{MULTIPLY}", operand_layout_constraints={{\S+ (\w+\[[\d,]*\])'
    found += re.findall(native, text)
    matches = [re.fullmatch(r"(\w+)\[([\d,]*)\]", array) for array in found]
    return [(m[1], tuple(int(n) for n in m[2].split(",") if n)) for m in matches]


# Operations that move nothing, and the second halves of asynchronous ones.
_FREE = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "conditional"),
    *("copy-done", "slice-done", "async-done", "partition-id", "after-all"),
}
_MEMORY_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^{}]*\})?")


def count_traffic(text):
    """Return the bytes that a compiled program reads from and writes to memory, outside of loops.

    Every operation reads its operands and writes its results once. What XLA keeps on a TPU's chip,
    its memory space 1, is not counted. Of branches, the one that moves least is. A gather reads as
    much as it writes.

    Args:
        text: The program, as XLA prints it.
    """
    computations, entry = program._split_computations(text)

    def size(shape):
        arrays = _MEMORY_ARRAY.findall(shape)
        return sum(program._array_bytes(*array[:2]) for array in arrays if "S(1)" not in array[2])

    def visit(name):
        shapes = {one.name: one.result for one in computations[name]}
        total = 0
        for one in computations[name]:
            if one.kind == "conditional":
                total += min(map(visit, _find_branches(one)))
            elif one.kind == "call":
                total += visit(re.search(r"to_apply=%?([\w.-]+)", one.rest)[1])
            elif one.kind.endswith("-start"):
                # Operands, results, and what tells how far it is; a copy is one read or one write.
                _, *copied = _MEMORY_ARRAY.findall(one.result)
                total += program._array_bytes(*copied[0][:2]) if copied else 0
            elif one.kind not in _FREE and not _is_marker(one):
                operands = set(program._OPERAND.findall(one.rest.partition(")")[0]))
                sizes = [size(shapes.get(operand, "")) for operand in operands]
                if re.search(r'op_name="[^"]*gather"', one.rest):
                    # It reads the rows that it writes, of whatever there is.
                    own = _MEMORY_ARRAY.findall(one.result)
                    most = sum(program._array_bytes(*array[:2]) for array in own)
                    sizes = [min(operand, most) for operand in sizes]
                total += size(one.result) + sum(sizes)
        return total

    return visit(entry)


def _find_branches(one):
    """Return the names of the computations that a conditional chooses from."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
    if listed:
        return re.findall(r"%?([\w.-]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", one.rest)


def _is_marker(one):
    """Return whether an operation is a custom call that runs nothing."""
    target = re.search(r'custom_call_target="([^"]+)"', one.rest)
    return target is not None and not target[1].startswith(("tpu_custom_call", "__"))


def count_launches(text):
    """Return how many operations a program launches one after the other, loops included.

    Args:
        text: The program, as XLA prints it.
    """
    computations, entry = program._split_computations(text)
    runs = program._count_runs(computations, entry)
    inside = set(
        re.findall(r"\b(?:fusion|sort|reduce|scatter)\(.*?(?:calls|to_apply)=%?([\w.-]+)", text)
    )
    return sum(
        runs[name]
        for name, instructions in computations.items()
        if name not in inside
        for one in instructions
        if one.kind not in _FREE and one.kind not in ("call", "compare", "add")
    )
