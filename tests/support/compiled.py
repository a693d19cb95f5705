"""Compile for TPUs that are not here, and read what a compiled program does.

`libtpu` holds the TPU compiler and needs no TPU: `pip install libtpu`, in the version that jax
names for its extra `tpu`. `make parity` installs it.
"""

import math

import jax
import numpy as np

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
