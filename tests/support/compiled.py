"""Compile for TPUs that are not here, and read what a compiled program does.

`libtpu` holds the TPU compiler and needs no TPU: `pip install libtpu`, in the version that jax
names for its extra `tpu`. `make parity` installs it.
"""

import collections
import dataclasses
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Keeps libtpu from asking the network which TPU this machine belongs to.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    # Two processes may compile at a time: neither has a TPU to lock.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_OPERATION = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
_BITS = {"pred": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collectives:
    """Operations of one kind between devices, as they stand in the program: a loop's count once.

    Attributes:
        count: Number of operations.
        bytes: Bytes of their results on one device.
    """

    count: int
    bytes: int


def tpu_mesh(topology: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("data",)):
    """Return a mesh of TPUs to compile for.

    Args:
        topology: For example "v5e:2x4".
        shape: Devices along each axis; the first of the topology are used.
        axes: Names of the axes.
    """
    os.environ |= {name: value for name, value in _ALONE.items() if name not in os.environ}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    used = np.array(devices[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(used, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def shapes_on(mesh, tree, spec=jax.P()):  # noqa: B008
    """Return a tree's shapes, placed on a mesh: arguments to compile for."""
    sharding = jax.NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def collectives_in(compiled) -> dict[str, Collectives]:
    """Return the operations between devices in a compiled program, by kind."""
    counts, n_bytes = collections.Counter(), collections.Counter()
    for result, kind, _ in _OPERATION.findall(compiled.as_text()):
        counts[kind] += 1
        n_bytes[kind] += sum(_array_bytes(*array) for array in _ARRAY.findall(result))
    return {kind: Collectives(count=counts[kind], bytes=n_bytes[kind]) for kind in sorted(counts)}


def _array_bytes(dtype: str, sizes: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
