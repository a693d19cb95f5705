"""Count what a Pallas kernel copies between memory and chip, without a device.

Pallas copies a block to the chip when the index map names another block than at the step before,
and a result back when it names another one after it. Both follow from the grid, the index maps and
the tables that they read. What a kernel copies itself, `tpu.sum_tiles` its rows, follows from its
tables of chunks; `counted_copies` counts those of a kernel that is interpreted.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from composable.kernels import tpu


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a kernel that was not run: its body, grid, tables, operands and results."""

    kernel: functools.partial
    grid_spec: pltpu.PrefetchScalarGridSpec
    tables: tuple[jax.Array, ...]
    operands: tuple[jax.Array, ...]
    results: tuple[jax.Array, ...]


def count_transfers(fn, *args):
    """Call a function whose kernels are not run, and count their copies.

    Args:
        fn: Function that calls `pl.pallas_call`, outside of jit.
        args: Its arguments: arrays, of which only the kernels' tables need their values.

    Returns:
        For every kernel, in order, one `Transfer` per operand that is not a table, and per result.
    """

    def count(spec, array, call, *, is_result):
        if spec.memory_space == pl.ANY:
            return _count_own(array, call.tables, is_result=is_result)
        return _count(call.grid_spec.grid, spec, array, call.tables)

    def count_all(call):
        specs = call.grid_spec
        read = zip(specs.in_specs, call.operands, strict=True)
        written = zip(specs.out_specs, call.results, strict=True)
        return [
            *(count(spec, array, call, is_result=False) for spec, array in read),
            *(count(spec, array, call, is_result=True) for spec, array in written),
        ]

    return [count_all(call) for call in _record_calls(fn, *args)]


def count_rows(fn, *args):
    """Return how many rows the one kernel of a function multiplies, which is `tpu.sum_tiles`."""
    (call,) = _record_calls(fn, *args)
    *_, heights = call.kernel.args
    _, _, rows_C, _ = call.tables
    return sum(
        int(n) * height for rows in np.asarray(rows_C) for height, n in tpu.share_out(rows, heights)
    )


def _record_calls(fn, *args):
    """Call a function whose kernels are not run, and return the calls."""
    calls = []

    def fake_call(kernel, *, grid_spec, out_shape, **_):
        def run(*operands):
            n_tables = grid_spec.num_scalar_prefetch
            results = tuple(jnp.zeros(shape.shape, shape.dtype) for shape in out_shape)
            calls.append(
                Call(
                    kernel=kernel,
                    grid_spec=grid_spec,
                    tables=operands[:n_tables],
                    operands=operands[n_tables:],
                    results=results,
                )
            )
            return results

        return run

    with mock.patch.object(pl, "pallas_call", fake_call):
        fn(*args)
    return calls


@contextlib.contextmanager
def counted_copies():
    """Count, by shape, the copies that interpreted kernels start themselves; yields the counter."""
    counts, real_copy = collections.Counter(), pltpu.make_async_copy

    def make_counted_copy(source, target, semaphore):
        copy = real_copy(source, target, semaphore)

        def start():
            copy.start()
            jax.debug.callback(lambda: counts.update([tuple(source.shape)]))

        return mock.Mock(start=start, wait=copy.wait)

    with mock.patch.object(pltpu, "make_async_copy", make_counted_copy):
        yield counts
        jax.effects_barrier()


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


def _count_own(array, tables, *, is_result):
    """Count what `tpu.sum_tiles` copies itself: blocks of chunks, and zeros to the other blocks."""
    _, _, rows_C, used = map(np.asarray, tables)
    n_blocks, block, _ = array.shape
    copies = int((-(-rows_C // block)).sum())
    if is_result:
        copies += n_blocks - int(used[0])
    return Transfer(shape=array.shape, copies=copies, bytes=copies * array[0].nbytes)


def total_bytes(kernels):
    """Return the bytes that kernels copy in all."""
    return sum(transfer.bytes for kernel in kernels for transfer in kernel)


def size_bytes(shape, dtype):
    """Return the bytes of a whole array."""
    return math.prod(shape) * np.dtype(dtype).itemsize
