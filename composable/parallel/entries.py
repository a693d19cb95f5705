"""Entries of a bank split over devices, and rows that travel to the device which has their entry.

A bank that is too large for one device is split along the axis `expert` of the mesh. Everything
here is called inside `split_batch`, where every device has its own rows and its own entries.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

_T = TypeVar("_T")
_AXIS: Final = "expert"


class Traffic(NamedTuple):
    """What this device sends to each device along the axis, and receives; int32, all of shape X.

    Args:
        begin_X: First of the rows that are sent to each.
        size_X: Number of rows that are sent to each.
        place_X: Where they begin in what that device receives.
        received_X: Number of rows that come from each.

    Example:
        >>> nothing_X = jnp.zeros(2, jnp.int32)
        >>> Traffic(nothing_X, nothing_X, nothing_X, nothing_X).size_X.tolist()
        [0, 0]
    """

    begin_X: jax.Array
    size_X: jax.Array
    place_X: jax.Array
    received_X: jax.Array


def spec_of_entries(n_entries: int) -> PartitionSpec:
    """Return how arrays stacked over a bank's entries are split in the mesh in use.

    Args:
        n_entries: Entries of the bank. If they do not divide among the devices along `expert`,
            every device has all.

    Example:
        >>> spec_of_entries(4)  # no mesh in use
        P()
    """
    mesh = jax.sharding.get_abstract_mesh()
    n_devices = dict(mesh.shape).get(_AXIS, 1)
    return PartitionSpec(_AXIS) if n_devices > 1 and n_entries % n_devices == 0 else PartitionSpec()


def keep_entries_split(tree: _T) -> _T:
    """Return arrays stacked over a bank's entries, which the compiler keeps split over devices.

    Args:
        tree: Tree of arrays whose first dimension is E. Without a mesh in use it is returned as it
            is.

    Example:
        >>> keep_entries_split({"w": jnp.ones((2, 3))})["w"].shape
        (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def keep(stack: jax.Array) -> jax.Array:
        kept: jax.Array = lax.with_sharding_constraint(stack, spec_of_entries(stack.shape[0]))
        return kept

    kept: _T = jax.tree.map(keep, tree)
    return kept


def count_entry_shards(n_entries: int) -> int:
    """Return over how many devices a bank's entries are split, here: 1 outside of `split_batch`.

    Args:
        n_entries: Entries of the whole bank.

    Example:
        >>> count_entry_shards(4)
        1
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    is_split = kinds.get(_AXIS) == AxisType.Manual and spec_of_entries(n_entries)
    return int(mesh.shape[_AXIS]) if is_split else 1


def read_entry(stack: jax.Array, index: Any, n_entries: int) -> jax.Array:
    """Return one entry of a stack, or several, from the device that has it.

    Where entries are split, all devices along `expert` ask for the same one at the same time.

    Args:
        stack: Array whose first dimension is E, or this device's part of it.
        index: Index of the entry in the whole bank, or indices.
        n_entries: Entries of the whole bank.

    Example:
        >>> read_entry(jnp.arange(3), 2, n_entries=3).tolist()
        2
    """
    if count_entry_shards(n_entries) == 1:
        return stack[index]
    here = jnp.asarray(index) - lax.axis_index(_AXIS) * stack.shape[0]
    own = jnp.take(stack, here, axis=0, mode="fill", fill_value=0)
    is_own = (here >= 0) & (here < stack.shape[0])
    own = jnp.where(is_own.reshape(is_own.shape + (1,) * (stack.ndim - 1)), own, 0)
    entry: jax.Array = lax.psum(own, _AXIS)
    return entry


def any_device(x: jax.Array) -> jax.Array:
    """Return where a boolean array is true on any of the devices that share a bank.

    Args:
        x: This device's array.

    Example:
        >>> from functools import partial
        >>> from composable.parallel import make_mesh
        >>> run = partial(jax.shard_map, mesh=make_mesh(), in_specs=jax.P(), out_specs=jax.P())
        >>> run(any_device)(jnp.array([True, False])).tolist()
        [True, False]
    """
    is_any: jax.Array = lax.psum(x.astype(jnp.int32), _AXIS) > 0
    return is_any


def gather_tables(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a small array of all devices that share a bank, X first, and the index of this one.

    Args:
        x: This device's array.

    Example:
        >>> from functools import partial
        >>> from composable.parallel import make_mesh
        >>> run = partial(jax.shard_map, mesh=make_mesh(), in_specs=jax.P(), out_specs=jax.P())
        >>> run(lambda x: gather_tables(x)[0], check_vma=False)(jnp.array([3, 4])).tolist()
        [[3, 4]]
    """
    return lax.all_gather(x, _AXIS), lax.axis_index(_AXIS)


def exchange_rows(x: jax.Array, out: jax.Array, traffic: Traffic) -> jax.Array:
    """Send rows to other devices, and return `out` with those that came written into it.

    Args:
        x: Rows of this device.
        out: Where rows from other devices are placed.
        traffic: Which go where.

    Example:
        >>> one_X, none_X = jnp.array([1]), jnp.array([0])
        >>> traffic = Traffic(begin_X=one_X, size_X=one_X, place_X=none_X, received_X=one_X)
        >>> from functools import partial
        >>> from composable.parallel import make_mesh
        >>> run = partial(jax.shard_map, mesh=make_mesh(), in_specs=jax.P(), out_specs=jax.P())
        >>> exchange = run(lambda x: exchange_rows(x, jnp.zeros(2), traffic), check_vma=False)
        >>> exchange(jnp.array([5.0, 6.0])).tolist()
        [6.0, 0.0]
    """
    # XLA for CPUs has no all-to-all of parts of different sizes.
    result: jax.Array = lax.platform_dependent(
        x, out, traffic, cpu=_exchange_equal_parts, default=_exchange_parts
    )
    return result


def _exchange_parts(x: jax.Array, out: jax.Array, traffic: Traffic) -> jax.Array:
    received: jax.Array = lax.ragged_all_to_all(x, out, *traffic, axis_name=_AXIS)
    return received


def _exchange_equal_parts(x: jax.Array, out: jax.Array, traffic: Traffic) -> jax.Array:
    """Do the same with parts as large as all rows of a device."""
    row = jnp.arange(x.shape[0])
    parts = jnp.take(x, traffic.begin_X[:, None] + row, axis=0, mode="clip")
    received, place_X = (
        lax.all_to_all(part, _AXIS, split_axis=0, concat_axis=0, tiled=True)
        for part in (parts, traffic.place_X)
    )
    is_row = row < traffic.received_X[:, None]
    place = jnp.where(is_row, place_X[:, None] + row, out.shape[0])
    return out.at[place].set(received, mode="drop")
