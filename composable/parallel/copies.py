"""Share out work on whole parameters among the devices that hold copies of them.

A parameter that is split over `fsdp` has a copy in every group of `data`. Left alone, every group
does the same work on all of them. Here every group does it on some, and hands the results round.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from composable.parallel.sharding import is_alone, is_split, spec_of

_T = TypeVar("_T")
# On one device: parameters of one shape that are stacked, at most. The stack is a copy.
_STACK_BYTES: Final = 64 * 10**6


def map_parameters(
    fn: Callable[[jax.Array], jax.Array],
    tree: _T,
    fn_of_all: Callable[[list[jax.Array]], list[jax.Array]] | None = None,
) -> _T:
    """Return `fn` of every parameter of a tree, each computed in one of the groups that hold it.

    Parameters of one shape and placement are stacked, and each group takes as many. Where there is
    one of a kind, every group computes it; without copies on the mesh in use (`jax.set_mesh`) this
    is a plain map. On one device small ones are stacked too, and one loop is compiled for all.

    Args:
        fn: Function of one parameter, whose result has the same shape. It may be run with
            `jax.vmap`.
        tree: Tree of arrays, or of `nnx.Variable` leaves that name their dimensions.
        fn_of_all: Function of all parameters that does the same; called instead on one device.

    Returns:
        The same tree, its arrays placed as before.

    Example:
        >>> map_parameters(jnp.negative, {"scale": nnx.Param(jnp.ones(3), dims="D")})["scale"][...]
        Array([-1., -1., -1.], dtype=float32)
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    values: dict[int, jax.Array] = {}
    for i, leaf in enumerate(leaves):
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        if hasattr(value, "shape"):  # not optax's mark for a parameter that it leaves out
            values[i] = value
            kinds[value.shape, value.dtype, _spec_of(leaf, value)].append(i)
    results: dict[int, jax.Array] = {}
    if fn_of_all and is_alone():
        results |= dict(zip(values, fn_of_all(list(values.values())), strict=True))
        kinds.clear()
    for (*_, spec), places in kinds.items():
        computed = _map_stack(fn, [values[i] for i in places], spec)
        results |= dict(zip(places, computed, strict=True))

    def place(i: int, leaf: Any) -> Any:
        if i not in results:
            return leaf
        return leaf.replace(results[i]) if isinstance(leaf, nnx.Variable) else results[i]

    mapped: _T = jax.tree.unflatten(treedef, [place(i, leaf) for i, leaf in enumerate(leaves)])
    return mapped


def _spec_of(leaf: Any, value: jax.Array) -> PartitionSpec:
    """Return how a parameter is split in the mesh in use."""
    dims = leaf.get_metadata().get("dims") if isinstance(leaf, nnx.Variable) else None
    mesh = jax.sharding.get_abstract_mesh()
    return spec_of(dims, value.shape, mesh) if dims and mesh.axis_names else PartitionSpec()


def _map_stack(
    fn: Callable[[jax.Array], jax.Array], arrays: list[jax.Array], spec: PartitionSpec
) -> list[jax.Array]:
    """Return `fn` of arrays of one shape, all split alike, in rounds of one for each group."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh.axis_names if axis not in spec and is_split(mesh, axis))
    n_groups = math.prod(mesh.shape[axis] for axis in axes)
    if len(arrays) == 1:
        return [fn(arrays[0])]
    if n_groups == 1:
        is_split_at_all = any(is_split(mesh, axis) for axis in mesh.axis_names)
        return [fn(x) for x in arrays] if is_split_at_all else _map_in_loops(fn, arrays)
    n_rounds = -(-len(arrays) // n_groups)
    filled = arrays + arrays[-1:] * (n_rounds * n_groups - len(arrays))
    rounds = jnp.stack(filled).reshape(n_rounds, n_groups, *arrays[0].shape)
    rounds = jax.lax.with_sharding_constraint(rounds, PartitionSpec(None, axes, *spec))

    def run(x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *spec))
        done: jax.Array = jax.lax.with_sharding_constraint(
            jax.vmap(fn)(x), PartitionSpec(axes, *spec)
        )
        return done

    done = jax.lax.map(run, rounds)
    whole = jax.lax.with_sharding_constraint(done, PartitionSpec(None, None, *spec))
    return list(whole.reshape(-1, *arrays[0].shape)[: len(arrays)])


def _map_in_loops(fn: Callable[[jax.Array], jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
    """Return `fn` of arrays of one shape, one after the other."""
    size = max(1, _STACK_BYTES // arrays[0].nbytes)
    if size == 1:
        return [fn(x) for x in arrays]
    results: list[jax.Array] = []
    for start in range(0, len(arrays), size):
        results += jnp.unstack(jax.lax.map(fn, jnp.stack(arrays[start : start + size])))
    return results
