"""Run a function on every device's own rows of the batch, with no device waiting for another.

Left to itself the compiler splits each operation on its own. It gathers the rows of all devices to
sort them by expert, and asks all devices before every branch. Documents do not depend on each
other, so a function of whole documents needs none of that: each device runs it on its own rows.

It splits over the axes of `BATCH_SPEC`, and devices along other axes (`tensor`) repeat each other's
work: kernels of TPUs cannot be split by the compiler. Parameters that are split are gathered first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import jax
from jax.sharding import PartitionSpec

from composable.parallel.sharding import BATCH_SPEC, axes_of_batch, is_split

_T = TypeVar("_T")
_WHOLE: Final = PartitionSpec()
_BATCH_AXES: Final[tuple[str, ...]] = BATCH_SPEC[0]
# The letters at the end of a field's name: `posterior_BE`.
_LETTERS: Final = re.compile(r".*_([A-Z]+)")


def split_batch(fn: Callable[..., _T], shared: Any, *rows: Any, specs: Any = _WHOLE) -> _T:
    """Return `fn(shared, *rows)`, computed by every device on its own rows.

    The devices are those of the mesh in use (`jax.set_mesh`). Without one, with a single device
    along the axes of the batch, or if the batch does not divide by their number, this is a plain
    call.

    Args:
        fn: Function of (shared, *rows). Its results depend on rows of the batch one by one, except
            for sums that it passes through `sum_over_batch`.
        shared: Tree that does not depend on the row, such as parameters.
        rows: Trees of arrays. In a named tuple, the letters at the end of a field's name say which
            dimension is the batch, B; a field without B is whole on every device. An array outside
            of named tuples has the batch first.
        specs: How `shared` is split, as a tree or the first levels of one; by default every device
            gets all of it.

    Returns:
        The result of `fn`, its arrays split like `rows`.

    Example:
        >>> import jax.numpy as jnp
        >>> from composable.parallel import make_mesh
        >>> with jax.set_mesh(make_mesh()):
        ...     split_batch(lambda scale, x_BT: scale * x_BT, 2, jnp.ones((4, 1))).shape
        (4, 1)
    """
    axes = axes_of_batch(jax.tree.leaves(rows[0])[0].shape[0])
    if not axes:
        return fn(shared, *rows)
    results = jax.eval_shape(fn, shared, *rows)
    run = jax.shard_map(
        fn,
        in_specs=(specs, *(_specs_of(tree, axes) for tree in rows)),
        out_specs=_specs_of(results, axes),
        # Loops and kernels would have to declare over which axes each value varies.
        check_vma=False,
    )
    result: _T = run(shared, *rows)
    return result


def split_heads(fn: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Return `fn(*arrays)`, computed by every device on its own rows and heads.

    Kernels of TPUs need it, which the compiler cannot split. A dimension that does not divide is
    whole on every device. Without a mesh in use, or within `split_batch`, this is a plain call.

    Args:
        fn: Function whose result depends on rows and heads one by one.
        arrays: Queries, shape BTNH, and keys and values, shape BTKH.

    Returns:
        The result of `fn`, shape BTNH.

    Example:
        >>> import jax.numpy as jnp
        >>> split_heads(lambda q, k: q + k, jnp.ones((2, 4, 2, 8)), jnp.ones((2, 4, 1, 8))).shape
        (2, 4, 2, 8)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not any(is_split(mesh, axis) for axis in mesh.axis_names):
        return fn(*arrays)
    is_divided = is_split(mesh, "tensor") and all(
        x.shape[2] % mesh.shape["tensor"] == 0 for x in arrays
    )
    rows = axes_of_batch(arrays[0].shape[0]) or None
    spec = PartitionSpec(rows, None, "tensor" if is_divided else None)
    run = jax.shard_map(fn, in_specs=spec, out_specs=spec, check_vma=False)
    result: jax.Array = run(*arrays)
    return result


def sum_over_batch(tree: _T) -> _T:
    """Return a tree of sums over this device's rows as sums over all rows of the batch.

    Args:
        tree: Arrays without a batch dimension. Outside of `split_batch` they are returned as they
            are.

    Example:
        >>> sum_over_batch(3)
        3
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = tuple(axis for axis in _BATCH_AXES if axis in manual)
    total: _T = jax.lax.psum(tree, axes) if axes else tree
    return total


def _specs_of(tree: Any, axes: tuple[str, ...]) -> Any:
    """Return the partition spec of every array of a tree, by the letters of its field's name."""

    def spec_of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        if not fields:
            return PartitionSpec(axes)
        named = _LETTERS.fullmatch(fields[-1])
        if not named or "B" not in named[1]:
            return PartitionSpec()
        # From the right: arrays stacked over experts or layers have more dimensions in front.
        place = leaf.ndim - len(named[1]) + named[1].index("B")
        return PartitionSpec(*[None] * place, axes)

    return jax.tree_util.tree_map_with_path(spec_of, tree)
