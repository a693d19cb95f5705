"""The device mesh.

Four axes, always present, so that the same program runs everywhere: `data` replicates parameters,
`fsdp` splits them along the model width and gathers them on use, `tensor` splits heads, hidden
units and vocabulary, and `expert` the entries of a composed model's bank. On one device all four
have size 1. The batch is split over all but `tensor`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from composable.errors import TrainingError

AXES: Final = ("data", "fsdp", "tensor", "expert")
# Size of an axis that takes the devices which the others leave.
REST: Final = -1
# Meshes that an error proposes.
_MAX_PROPOSALS: Final = 3


def make_mesh(
    devices: Sequence[Any] | None = None,
    /,
    *,
    data: int = REST,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
) -> Mesh:
    """Return a mesh over all devices; one axis may take what the others leave (-1).

    Args:
        devices: The devices, by default all of this run.
        data: Copies of the parameters.
        fsdp: Devices that share one copy of the parameters.
        tensor: Devices that split one layer's heads and hidden units.
        expert: Devices that share the experts of a composed model.

    Raises:
        TrainingError: If the devices do not divide evenly; it proposes meshes that fit.

    Example:
        >>> mesh = make_mesh()
        >>> mesh.axis_names
        ('data', 'fsdp', 'tensor', 'expert')
    """
    n_devices = jax.device_count() if devices is None else len(devices)
    shape = fit_mesh({"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert}, n_devices)
    kinds = (AxisType.Auto,) * len(AXES)
    if devices is None:
        return jax.make_mesh(shape, AXES, axis_types=kinds)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=kinds)


def parse_mesh(text: str) -> dict[str, int]:
    """Return the sizes of axes that a text gives, such as `data=-1,fsdp=8`.

    Args:
        text: Pairs of axis and size. Axes that are left out have size 1; `data` takes the rest if
            no axis is -1.

    Raises:
        TrainingError: If it cannot be read.

    Example:
        >>> parse_mesh("fsdp=8,tensor=2")
        {'data': -1, 'fsdp': 8, 'tensor': 2, 'expert': 1}
    """
    given: dict[str, int] = {}
    for pair in text.split(","):
        axis, _, size = (part.strip() for part in pair.partition("="))
        if axis not in AXES or axis in given or not size.removeprefix("-").isdecimal():
            raise TrainingError(
                f"{pair.strip()!r} is not one of {', '.join(AXES)}, each once, with a size",
                where="mesh",
                hint="such as --mesh data=4,fsdp=8, with -1 for what the others leave",
            )
        given[axis] = int(size)
    if REST not in given.values():
        given.setdefault("data", REST)
    return {axis: given.get(axis, 1) for axis in AXES}


def fit_mesh(sizes: Mapping[str, int], n_devices: int) -> tuple[int, ...]:
    """Return the size of every axis of a mesh over that many devices.

    Args:
        sizes: Devices along each axis; -1 for at most one of them, which takes the rest.
        n_devices: Number of devices.

    Raises:
        TrainingError: If the sizes do not multiply to the devices; it proposes meshes that fit.

    Example:
        >>> fit_mesh({"data": -1, "fsdp": 4, "tensor": 1}, 8)
        (2, 4, 1, 1)
    """
    wanted = [sizes.get(axis, 1) for axis in AXES]
    fixed = math.prod(size for size in wanted if size != REST)
    if fixed > 0 and wanted.count(REST) == 1 and n_devices % fixed == 0:
        wanted = [n_devices // fixed if size == REST else size for size in wanted]
    if min(wanted) < 1 or math.prod(wanted) != n_devices:
        raise TrainingError(
            f"{_name_mesh(wanted)} does not fit {n_devices} devices",
            where="mesh",
            hint=f"meshes that fit: {'; '.join(_propose_meshes(wanted, n_devices))}",
        )
    return tuple(wanted)


def _propose_meshes(wanted: Sequence[int], n_devices: int) -> list[str]:
    """Return the meshes over that many devices that are closest to the wanted one."""

    def distance(shape: Sequence[int]) -> float:
        pairs = zip(shape, wanted, strict=True)
        return sum(abs(math.log(size / asked)) for size, asked in pairs if asked > 0)

    divisors = [size for size in range(1, n_devices + 1) if n_devices % size == 0]
    shapes = [
        (n_devices // (fsdp * tensor * expert), fsdp, tensor, expert)
        for fsdp, tensor, expert in itertools.product(divisors, repeat=3)
        if n_devices % (fsdp * tensor * expert) == 0
    ]
    best = sorted(shapes, key=distance)[:_MAX_PROPOSALS]
    return [_name_mesh(shape) for shape in best]


def _name_mesh(sizes: Sequence[int]) -> str:
    """Return the sizes as `parse_mesh` reads them, without axes of one device except the first."""
    first, *others = (f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    return ",".join([first, *(text for text in others if not text.endswith("=1"))])
