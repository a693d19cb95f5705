"""Count what a Pallas kernel copies between memory and chip, by running its index maps.

Pallas copies a block to the chip when the index map names another block than at the step before,
and a result back when it names another one after it. Both follow from the grid, the index maps and
the tables that they read, so the count needs no device.
"""

import contextlib
import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """Copies of one operand or result of one kernel.

    Attributes:
        shape: Shape of the whole array.
        copies: Blocks copied.
        bytes: Bytes copied; what a block has past the end of the array is not.
    """

    shape: tuple[int, ...]
    copies: int
    bytes: int


def count_transfers(fn, *args):
    """Call a function whose kernels are not run, and count their copies.

    Args:
        fn: Function that calls `pl.pallas_call`, outside of jit.
        args: Its arguments: arrays, of which only the kernels' tables need their values.

    Returns:
        For every kernel, in order, one `Transfer` per operand that is not a table, and per result.
    """
    kernels = []

    def fake_call(kernel, *, grid_spec, out_shape, **_):
        def run(*operands):
            n_tables = grid_spec.num_scalar_prefetch
            tables, arrays = operands[:n_tables], operands[n_tables:]
            results = [jnp.zeros(shape.shape, shape.dtype) for shape in out_shape]
            specs = [*grid_spec.in_specs, *grid_spec.out_specs]
            pairs = zip(specs, [*arrays, *results], strict=True)
            kernels.append([_count(grid_spec.grid, spec, array, tables) for spec, array in pairs])
            return results

        return run

    with mock.patch.object(pl, "pallas_call", fake_call):
        fn(*args)
    return kernels


@contextlib.contextmanager
def interpreted_kernels():
    """Run every Pallas kernel inside as ordinary operations; yields a mock that counts them."""
    interpreted = mock.Mock(side_effect=functools.partial(pl.pallas_call, interpret=True))
    with mock.patch.object(pl, "pallas_call", interpreted):
        yield interpreted


def _count(grid, spec, array, tables):
    steps = np.indices(grid).reshape(len(grid), -1)
    places = jax.vmap(lambda *step: spec.index_map(*step, *tables))(*map(jnp.asarray, steps))
    places = np.stack([np.broadcast_to(place, steps.shape[1]) for place in places], axis=1)
    is_new = np.ones(len(places), bool)
    is_new[1:] = (places[1:] != places[:-1]).any(axis=1)
    sizes = [1 if size is None else size for size in spec.block_shape]
    inside = np.minimum(sizes, np.array(array.shape) - places[is_new] * sizes)
    n_bytes = int(inside.prod(axis=1).sum()) * array.dtype.itemsize
    return Transfer(shape=array.shape, copies=int(is_new.sum()), bytes=n_bytes)


def total_bytes(kernels):
    """Return the bytes that kernels copy in all."""
    return sum(transfer.bytes for kernel in kernels for transfer in kernel)


def size_bytes(shape, dtype):
    """Return the bytes of a whole array."""
    return math.prod(shape) * np.dtype(dtype).itemsize
