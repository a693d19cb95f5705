"""Run a function on every block in use as one TPU kernel that reads each expert's weights once.

The kernel is a loop over the blocks of a dispatch, pipelined by Pallas: while one block is
computed, the rows of the next are copied to the chip's memory. A block whose expert is that of the
block before keeps the weights that are there already, so a bank costs one read of the experts in
use, however many rows they have. Blocks that hold nothing are neither read nor computed.

`stream_blocks` serves every function that `blocks.run_blocks` does. Where the weights of one expert
do not fit on the chip, the arrays are cut into tiles along an axis that no product sums over, and
the blocks are run once for each tile.

It chooses no function and no platform (`blocks.py` does), and differentiates nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from composable.kernels.block_functions import Arrays, BlockFunction, BlockOutputs, Tiling
from composable.kernels.dispatch import Dispatch

Shapes = tuple[jax.ShapeDtypeStruct, ...]

# Memory for the blocks of a kernel, two of each array so that copies and products overlap. The
# chips from v5e on have 64 MiB or more; the rest is for what a function computes on the way.
_BLOCK_BYTES: Final = 40 << 20
_MEMORY_BYTES: Final = 60 << 20
# Tiles are whole lanes of the chip's registers.
_LANES: Final = 128


def fits_on_chip(fn: BlockFunction, rows: Arrays, weights: Arrays, block: int) -> bool:
    """Return whether the kernel can hold all that one block of a function reads and writes.

    Args:
        fn: The function; see `blocks.run_blocks`.
        rows: Arrays whose first axis is P.
        weights: Arrays whose first axis is E.
        block: Rows per block.
    """
    own_rows, own_weights, outs, sums = _shapes_of_one_block(fn, rows, weights, block)
    return 2 * _bytes_of((*own_rows, *own_weights, *outs, *sums)) <= _BLOCK_BYTES


def stream_blocks(
    fn: BlockFunction,
    rows: Arrays,
    weights: Arrays,
    dispatch: Dispatch,
    tiling: Tiling | None = None,
) -> BlockOutputs:
    """Run `fn` on every block in use, in one kernel.

    Off a TPU it runs inside `pltpu.force_tpu_interpret_mode()`, step by step.

    Args:
        fn: See `blocks.run_blocks`. It may use what Pallas can compile for a TPU: products,
            elementwise functions, reductions.
        rows: See `blocks.run_blocks`.
        weights: See `blocks.run_blocks`.
        dispatch: See `blocks.run_blocks`.
        tiling: How to cut what does not fit on the chip; by default nothing is cut.

    Returns:
        See `blocks.run_blocks`.
    """
    block, n_blocks = dispatch.block, dispatch.expert_Y.shape[0]
    own_rows, own_weights, outs, sums = _shapes_of_one_block(fn, rows, weights, block)
    tiling = tiling or Tiling()
    cut = [
        *zip(own_rows, _axes(tiling.rows, own_rows), strict=True),
        *zip(own_weights, _axes(tiling.weights, own_weights), strict=True),
        *zip(outs, _axes(tiling.outs, outs), strict=True),
        *zip(sums, _axes(tiling.sums, sums), strict=True),
    ]
    tile, n_tiles = _choose_tile(cut)

    def spec(shape: jax.ShapeDtypeStruct, axis: int | None, *, is_rows: bool) -> pl.BlockSpec:
        """Return which part of an array belongs to a step of the kernel."""
        sizes = [tile if place == axis else size for place, size in enumerate(shape.shape)]

        def place_of(tile_index: Any, index: Any, expert_Y: Any, used: Any) -> tuple[Any, ...]:
            # A step without a block asks for the one that is there, which copies nothing.
            index = jnp.maximum(jnp.minimum(index, used[0] - 1), 0)
            first = index if is_rows else expert_Y[index]
            return (first, *(tile_index if place == axis else 0 for place in range(len(sizes))))

        return pl.BlockSpec((None, *sizes), place_of)

    def spec_of_out(shape: jax.ShapeDtypeStruct, axis: int | None) -> pl.BlockSpec:
        """Return the same for rows out, of which every block is written."""
        sizes = [tile if place == axis else size for place, size in enumerate(shape.shape)]

        def place_of(tile_index: Any, index: Any, *_: Any) -> tuple[Any, ...]:
            return (index, *(tile_index if place == axis else 0 for place in range(len(sizes))))

        return pl.BlockSpec((None, *sizes), place_of)

    rows_cut = cut[: len(rows)]
    weights_cut = cut[len(rows) :][: len(weights)]
    outs_cut, sums_cut = cut[len(rows) + len(weights) :][: len(outs)], cut[len(cut) - len(sums) :]
    run = pl.pallas_call(
        functools.partial(_run_step, fn, len(rows), len(weights), len(outs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(n_tiles, n_blocks),
            in_specs=[
                *(spec(shape, axis, is_rows=True) for shape, axis in rows_cut),
                *(spec(shape, axis, is_rows=False) for shape, axis in weights_cut),
            ],
            out_specs=[
                *(spec_of_out(shape, axis) for shape, axis in outs_cut),
                *(spec(shape, axis, is_rows=False) for shape, axis in sums_cut),
            ],
        ),
        out_shape=[
            *(jax.ShapeDtypeStruct((n_blocks, *out.shape), out.dtype) for out in outs),
            *(jax.ShapeDtypeStruct((dispatch.n_experts, *s.shape), s.dtype) for s in sums),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_MEMORY_BYTES
        ),
        cost_estimate=_estimate_cost(fn, own_rows, own_weights, n_blocks, dispatch.n_experts),
        name=getattr(fn, "__name__", "blocks").lstrip("_"),
    )
    n_used = dispatch.n_blocks_used
    by_block = (row.reshape(n_blocks, block, *row.shape[1:]) for row in rows)
    results = run(dispatch.expert_Y, n_used[None], *by_block, *weights)
    begin_block_E = jnp.concatenate([jnp.zeros(1, jnp.int32), dispatch.end_block_E[:-1]])
    has_rows_E = dispatch.end_block_E > begin_block_E
    return (
        tuple(out.reshape(n_blocks * block, *out.shape[2:]) for out in results[: len(outs)]),
        # No step wrote the sums of an expert without rows.
        tuple(
            jnp.where(has_rows_E.reshape(-1, *[1] * (total.ndim - 1)), total, 0)
            for total in results[len(outs) :]
        ),
    )


def _run_step(
    fn: BlockFunction, n_rows: int, n_weights: int, n_outs: int, expert: Any, used: Any, *refs: Any
) -> None:
    """Run one block: the body of the kernel."""
    index = pl.program_id(1)
    inputs, results = refs[: n_rows + n_weights], refs[n_rows + n_weights :]
    out_refs, sum_refs = results[:n_outs], results[n_outs:]
    is_used = index < used[0]

    @pl.when(is_used)
    def _() -> None:
        values = tuple(ref[...] for ref in inputs)
        outs, parts = fn(values[:n_rows], values[n_rows:])
        for ref, out in zip(out_refs, outs, strict=True):
            ref[...] = out
        # The blocks of an expert follow each other, and their sum stays on the chip.
        is_first = (index == 0) | (expert[jnp.maximum(index - 1, 0)] != expert[index])
        for ref, part in zip(sum_refs, parts, strict=True):
            pl.when(is_first)(functools.partial(ref.__setitem__, ..., part))
            pl.when(~is_first)(functools.partial(_add, ref, part))

    @pl.when(~is_used)
    def _() -> None:
        for ref in out_refs:
            ref[...] = jnp.zeros_like(ref)


def _add(ref: Any, part: Any) -> None:
    ref[...] += part


def _axes(axes: tuple[int | None, ...], shapes: Shapes) -> tuple[int | None, ...]:
    """Return one axis per array; none is cut without a tiling."""
    return axes or (None,) * len(shapes)


def _choose_tile(cut: Sequence[tuple[jax.ShapeDtypeStruct, int | None]]) -> tuple[int, int]:
    """Return the widest tile with which all blocks fit on the chip, and the number of tiles."""
    sizes = {shape.shape[axis] for shape, axis in cut if axis is not None}
    if not sizes:
        return 0, 1
    (size,) = sizes
    whole = sum(_bytes_of((shape,)) for shape, axis in cut if axis is None)
    per_column = sum(_bytes_of((shape,)) // size for shape, axis in cut if axis is not None)
    most = (_BLOCK_BYTES // 2 - whole) // per_column
    if size <= most:
        return size, 1
    # Tiles of one width, as few as fit: the last is not left with a remainder of a few columns.
    n_tiles = -(-size // max(_LANES, most))
    tile = -(-size // (n_tiles * _LANES)) * _LANES
    return tile, -(-size // tile)


def _estimate_cost(
    fn: BlockFunction, rows: Shapes, weights: Shapes, n_blocks: int, n_experts: int
) -> pl.CostEstimate:
    """Return what the kernel costs if all blocks are in use, for the compiler's schedule."""
    one = pl.estimate_cost(fn, rows, weights)
    outs, sums = jax.eval_shape(fn, rows, weights)
    n_groups = min(n_blocks, n_experts)
    n_bytes = n_blocks * _bytes_of((*rows, *outs)) + n_groups * _bytes_of((*weights, *sums))
    return pl.CostEstimate(
        flops=n_blocks * one.flops,
        transcendentals=n_blocks * one.transcendentals,
        bytes_accessed=n_bytes,
    )


def _bytes_of(shapes: Sequence[jax.ShapeDtypeStruct]) -> int:
    return sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes)


def _shapes_of_one_block(
    fn: BlockFunction, rows: Arrays, weights: Arrays, block: int
) -> tuple[Shapes, Shapes, Shapes, Shapes]:
    """Return shapes and types of the inputs and results of `fn` for one block."""
    own_rows = tuple(jax.ShapeDtypeStruct((block, *row.shape[1:]), row.dtype) for row in rows)
    own_weights = tuple(jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for w in weights)
    outs, sums = jax.eval_shape(fn, own_rows, own_weights)
    return own_rows, own_weights, outs, sums
