"""Which dimension is split over which mesh axis: the only table of sharding decisions.

A parameter's letters come from `nnx.Param(dims=...)`. A dimension that its axis does not divide
stays whole. Where the compiler would choose badly, it is told: activations keep the split of the
batch (`keep_batch_split`), and weights that are split along the model width are gathered where they
are used (`gather_weights`). Left alone, it keeps the weights split and gathers the batch instead.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Final, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from composable.errors import ModelError, TrainingError
from composable.interface import DIMS

_T = TypeVar("_T")
_AXIS_OF: Final[dict[str, str]] = {
    "D": "fsdp",
    "F": "tensor",
    "N": "tensor",
    "K": "tensor",
    "V": "tensor",
    "W": "tensor",
}
# A batch is split over every device that holds a different part of it.
BATCH_SPEC: Final = PartitionSpec(("data", "fsdp", "expert"))


def spec_of(dims: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
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


def keep_batch_split(x: jax.Array) -> jax.Array:
    """Return an array of rows, which the compiler keeps on the devices that the rows are on.

    Args:
        x: Array whose first dimension is the batch. Without a mesh in use (`jax.set_mesh`), or if
            the rows do not divide among its devices, it is returned as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> keep_batch_split(jnp.ones((2, 3))).shape
        (2, 3)
    """
    axes = axes_of_batch(x.shape[0])
    if not axes:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    kept: jax.Array = jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *others))
    return kept


def sum_shards(x: jax.Array, dims: str) -> jax.Array:
    """Return the sum over a first dimension that is split like the batch, placed as a parameter.

    Every device gets the parts that it holds of such a parameter, and no other.

    Args:
        x: Array of sums over the rows of each shard.
        dims: One letter per dimension of the sum.

    Example:
        >>> import jax.numpy as jnp
        >>> sum_shards(jnp.ones((2, 3, 4)), "VD").shape
        (3, 4)
    """
    axes, mesh = axes_of_batch(x.shape[0]), jax.sharding.get_abstract_mesh()
    if axes:
        spec = spec_of(dims, x.shape[1:], mesh)
        left = tuple(axis for axis in axes if axis not in spec)
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(left or None, *spec))
    return x.sum(0)


def count_batch_shards(n_rows: int) -> int:
    """Return over how many devices that many rows are split in the mesh in use.

    Args:
        n_rows: Rows of the batch.

    Example:
        >>> count_batch_shards(8)  # no mesh in use
        1
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes_of_batch(n_rows))


def gather_weights(tree: _T) -> _T:
    """Return weights with the model width whole on every device; gradients come back split.

    Split weights cost memory on one of `fsdp` devices only. A gathered one is dropped after its
    use, and its gradient is summed over the batch straight into the parts that each device holds.

    Args:
        tree: Tree with `nnx.Variable` leaves that name their dimensions. Without a mesh in use, or
            one with `fsdp` of 1, it is returned as it is.

    References:
        Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO, stage 3).

    Example:
        >>> import numpy as np
        >>> gather_weights({"scale": nnx.Param(np.ones(3), dims="D")})["scale"].shape
        (3,)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not is_split(mesh, "fsdp"):
        return tree

    def gather(leaf: Any) -> Any:
        dims = leaf.get_metadata().get("dims") if isinstance(leaf, nnx.Variable) else None
        if not dims:
            return leaf
        spec = spec_of(dims, leaf.get_value().shape, mesh)
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        return leaf if spec == whole else leaf.replace(_gather(leaf.get_value(), spec, whole))

    gathered: _T = jax.tree.map(gather, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return gathered


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, split: PartitionSpec, whole: PartitionSpec) -> jax.Array:
    x = jax.lax.with_sharding_constraint(x, split)
    gathered: jax.Array = jax.lax.with_sharding_constraint(x, whole)
    return gathered


def _gather_forward(
    x: jax.Array, split: PartitionSpec, whole: PartitionSpec
) -> tuple[jax.Array, None]:
    return _gather(x, split, whole), None


def _split_gradient(
    split: PartitionSpec, whole: PartitionSpec, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    # Without this the sum over the batch is whole on every device before it is split.
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _split_gradient)


def axes_of_batch(n_rows: int) -> tuple[str, ...]:
    """Return the axes of the mesh in use to split that many rows over; none to leave them whole.

    Args:
        n_rows: Rows of the batch. If they do not divide among the devices, there are no axes.

    Example:
        >>> axes_of_batch(8)  # no mesh in use
        ()
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_SPEC[0] if is_split(mesh, axis, least=1))
    n_shards = math.prod(mesh.shape[axis] for axis in axes)
    return axes if n_shards > 1 and n_rows % n_shards == 0 else ()


def platform_in_use() -> str | None:
    """Return the platform of the devices of the mesh in use; None without one.

    They may be devices that a program is compiled for and that are not here.

    Example:
        >>> from composable.parallel import make_mesh
        >>> with jax.set_mesh(make_mesh()):
        ...     platform_in_use()
        'cpu'
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def is_alone() -> bool:
    """Return whether there is a mesh in use, and a single device in it.

    Example:
        >>> is_alone()
        False
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size == 1


def is_split(mesh: Any, axis: str, least: int = 2) -> bool:
    """Return whether the compiler splits arrays over an axis of a mesh, of that many devices.

    Args:
        mesh: The mesh in use.
        axis: Its axis; may be missing.
        least: Devices along it that count as a split.

    Example:
        >>> from composable.parallel import make_mesh
        >>> is_split(make_mesh(fsdp=1), "fsdp", least=1)
        True
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return axis in kinds and kinds[axis] != AxisType.Manual and mesh.shape[axis] >= least


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


def replicate_tree(tree: _T, mesh: Mesh) -> _T:
    """Place a tree that every process holds whole on every device.

    Args:
        tree: Tree of arrays.
        mesh: The device mesh.

    Example:
        >>> import numpy as np
        >>> from composable.parallel import make_mesh
        >>> replicate_tree({"scale": np.ones(3)}, make_mesh())["scale"].sharding.spec
        P()
    """
    whole = NamedSharding(mesh, PartitionSpec())
    placed: _T = jax.tree.map(lambda value: _put(value, whole), tree)
    return placed


def place_rows(rows: Any, mesh: Mesh) -> jax.Array:
    """Split rows that every process holds whole over the devices.

    Args:
        rows: Array whose first dimension is the batch.
        mesh: The device mesh.

    Raises:
        TrainingError: If the rows do not divide among the devices.

    Example:
        >>> import numpy as np
        >>> from composable.parallel import make_mesh
        >>> place_rows(np.zeros((4, 9), np.int32), make_mesh()).shape
        (4, 9)
    """
    require_divisible(len(rows), mesh)
    return _put(rows, NamedSharding(mesh, BATCH_SPEC))


def require_divisible(n_rows: int, mesh: Mesh, n_parts: int = 1) -> None:
    """Refuse rows that do not divide among the devices, or a device's among the parts of a step.

    Args:
        n_rows: Rows of the batch.
        mesh: The device mesh.
        n_parts: Parts that are run one after the other.

    Raises:
        TrainingError: If they do not.

    Example:
        >>> from composable.parallel import make_mesh
        >>> require_divisible(8, make_mesh(), n_parts=4)
    """
    n_shards = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    if n_rows % (n_shards * n_parts):
        parts = f", in {n_parts} parts" if n_parts > 1 else ""
        raise TrainingError(
            f"{n_rows} rows do not divide among {n_shards} devices{parts}",
            where="mesh",
            hint=f"give a multiple of {n_shards * n_parts} rows",
        )


def split_rows(tree: _T, n_parts: int) -> _T:
    """Return a batch as several smaller ones, each with an equal share of every device's rows.

    Args:
        tree: Tree of arrays whose first dimension is the batch.
        n_parts: Number of parts; divides the rows of a device.

    Returns:
        The same tree with the parts in front of each array's dimensions.

    Example:
        >>> import jax.numpy as jnp
        >>> split_rows(jnp.zeros((4, 9)), 2).shape
        (2, 2, 9)
    """

    def split(x: jax.Array) -> jax.Array:
        axes = axes_of_batch(len(x))
        n_shards = count_batch_shards(len(x))
        # Rows stay on their device: its own are cut, not those of all.
        parts = x.reshape(n_shards, n_parts, -1, *x.shape[1:]).swapaxes(0, 1)
        parts = parts.reshape(n_parts, -1, *x.shape[1:])
        if not axes:
            return parts
        others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        kept: jax.Array = jax.lax.with_sharding_constraint(
            parts, PartitionSpec(None, axes, *others)
        )
        return kept

    parts: _T = jax.tree.map(split, tree)
    return parts


def fetch_tree(tree: Any) -> Any:
    """Return a tree whole in the memory of this process, whatever processes hold parts of it.

    Every process calls this.

    Args:
        tree: Tree of arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> fetch_tree({"scale": jnp.ones(2)})["scale"]
        array([1., 1.], dtype=float32)
    """

    def fetch(x: jax.Array) -> Any:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


def place_shapes(tree: Any, shardings: Any) -> Any:
    """Return the shapes of a tree with their placement: arguments to compile for.

    Args:
        tree: Tree of arrays or shapes.
        shardings: The sharding of each.

    Example:
        >>> import jax
        >>> place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        >>> place_shapes({"w": jax.numpy.ones((2, 3))}, {"w": place})["w"].shape
        (2, 3)
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _put(value: Any, sharding: NamedSharding) -> jax.Array:
    """Place a host value that every process holds whole."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Return which part of every batch this process loads: its index, and the number of parts.

    Processes whose devices hold the same rows, such as along `tensor`, load the same part.

    Args:
        mesh: The device mesh.

    Raises:
        TrainingError: If the rows of this process's devices are not next to each other.

    Example:
        >>> from composable.parallel import make_mesh
        >>> batch_share(make_mesh())
        (0, 1)
    """
    n_shards = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    indices = NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((n_shards,))
    held = {index[0].start or 0 for index in indices.values() if index is not None}
    first, n_held = min(held), len(held)
    if held != set(range(first, first + n_held)) or first % n_held or n_shards % n_held:
        raise TrainingError(
            f"the devices of this process hold the parts {sorted(held)} of a batch's {n_shards}",
            where="mesh",
            hint="choose sizes for which each process has one part, or several in a row",
        )
    return first // n_held, n_shards // n_held


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
