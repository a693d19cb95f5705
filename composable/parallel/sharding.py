"""Which dimension is split over which mesh axis: the only table of sharding decisions.

A parameter's letters come from `nnx.Param(dims=...)`; the compiler propagates the rest from the
parameters and the batch. A dimension that its axis does not divide stays whole.
"""

from __future__ import annotations

from typing import Any, Final

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from composable.errors import ModelError
from composable.interface import DIMS

_AXIS_OF: Final[dict[str, str]] = {
    "D": "fsdp",
    "F": "tensor",
    "N": "tensor",
    "K": "tensor",
    "V": "tensor",
    "W": "tensor",
}
# A batch is split over every device that holds a different part of it.
BATCH_SPEC: Final = PartitionSpec(("data", "fsdp"))


def spec_of(dims: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return the partition spec of an array with these dimension letters.

    Args:
        dims: One letter per dimension.
        shape: The array's shape; a size that the axis does not divide is not split.
        mesh: The device mesh.

    Raises:
        ModelError: For letters that do not fit the shape or are not in the key.

    Example:
        >>> from composable.parallel import make_mesh
        >>> spec_of("DF", (64, 256), make_mesh())
        P('fsdp', 'tensor')
    """
    if len(dims) != len(shape) or not set(dims) <= DIMS.keys():
        raise ModelError(f"dimension letters {dims!r} do not name the shape {shape}")
    axes = [_AXIS_OF.get(letter) for letter in dims]
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of every array of a tree: parameters by their letters, others replicated.

    Args:
        tree: Module, state, or any tree that holds `nnx.Variable` leaves; shapes are enough.
        mesh: The device mesh.

    Returns:
        The same tree, with a sharding in the place of every array.

    Example:
        >>> import numpy as np
        >>> from composable.parallel import make_mesh
        >>> shardings_of({"scale": np.ones(3)}, make_mesh())["scale"].spec
        P()
    """

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        dims, value = leaf.get_metadata().get("dims"), leaf.get_value()
        if not hasattr(value, "shape"):  # optax's mark for a parameter that it leaves out
            return leaf
        spec = spec_of(dims, value.shape, mesh) if dims else PartitionSpec()
        return leaf.replace(NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def shard_tree(tree: Any, mesh: Mesh) -> Any:
    """Place a tree that every process holds whole, as `shardings_of` says.

    Args:
        tree: Module, state, or any tree that holds `nnx.Variable` leaves.
        mesh: The device mesh.

    Returns:
        The same tree, its arrays on the mesh.

    Example:
        >>> import numpy as np
        >>> from composable.parallel import make_mesh
        >>> shard_tree({"scale": np.ones(3)}, make_mesh())["scale"].sharding.spec
        P()
    """
    return jax.tree.map(_put, tree, shardings_of(tree, mesh))


def _put(value: Any, sharding: NamedSharding) -> jax.Array:
    """Place a host value that every process holds whole."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_batch(local: Any, mesh: Mesh) -> Any:
    """Make the global batch from this process's rows.

    Args:
        local: The rows that this process loaded: an array, or a tree of arrays of as many rows.
        mesh: The device mesh.

    Returns:
        The same tree of arrays whose first dimension is the sum over processes, split by
        `BATCH_SPEC`.

    Example:
        >>> import numpy as np
        >>> from composable.parallel import make_mesh
        >>> place_batch(np.zeros((4, 9), np.int32), make_mesh()).shape
        (4, 9)
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)
