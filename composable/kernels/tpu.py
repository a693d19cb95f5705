"""Run a function on every block in use as one TPU kernel that reads each expert's weights once.

The kernel is a loop over the blocks of a dispatch, pipelined by Pallas: while one block is
computed, the rows of the next are copied to the chip's memory. A block whose expert is that of the
block before keeps the weights that are there already, so a bank costs one read of the experts in
use, however many rows they have. Blocks that hold nothing are neither read nor computed.

`stream_blocks` serves every function that `blocks.run_blocks` does. Where the weights of one expert
do not fit on the chip, the arrays are cut into tiles along an axis that no product sums over, and
the blocks are run once for each tile.

`sum_tiles` serves functions whose results for tiles of an expert's weights add up, as those of a
feed-forward body do for tiles of its hidden units. It keeps the rows of an expert on the chip, and
their sums, while tiles of the weights come and go, so what lies between two products never leaves
the chip, of however many hidden units.

It chooses no function and no platform (`blocks.py` does), and differentiates nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from composable.kernels.block_functions import (
    LANES,
    Arrays,
    BlockFunction,
    BlockOutputs,
    TileFunction,
    Tiling,
)
from composable.kernels.dispatch import Dispatch, count_blocks, count_up_to

Shapes = tuple[jax.ShapeDtypeStruct, ...]

# Memory for the blocks of a kernel, two of each array so that copies and products overlap. The
# chips from v5e on have 64 MiB or more; the rest is for what a function computes on the way.
_BLOCK_BYTES: Final = 40 << 20
_MEMORY_BYTES: Final = 60 << 20
# Bytes of a column of the chip's registers: 8 rows of float32, 16 of bfloat16.
_SUBLANE_BYTES: Final = 32
# Rows that `sum_tiles` multiplies at a time, at most: as many as the widest matrix unit holds.
_MOST_ROWS: Final = 256


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


def sum_tiles(
    fn: TileFunction, x_PD: Array, weights: Arrays, dispatch: Dispatch, axes: tuple[int, ...]
) -> Array:
    """Run `fn` on each expert's rows and every tile of its weights, and add up what it returns.

    As many rows of an expert as fit on the chip are a *chunk*, and the expert's weights are read
    once for each of its chunks. A chunk is multiplied 256 rows at a time, as matrix units want it,
    and the rows that are left in the least tiles that hold them.

    Off a TPU it runs interpreted, as `stream_blocks` does.

    Args:
        fn: Function of some rows of one expert and a tile of each of its arrays. Returns float32
            of the shape of the rows; zeros for a tile of zeros.
        x_PD: Rows.
        weights: Arrays whose first axis is E.
        dispatch: The expert of each block of rows.
        axes: Along which axis an expert's array is cut, without the dimension E, for each of
            `weights`. Those axes have one size.

    Returns:
        y_PD, in the type of x_PD; zero in blocks not in use. Padding rows of other blocks hold
        what x_PD has there, or what `fn` returns for it.
    """
    block, n_blocks, width = dispatch.block, dispatch.expert_Y.shape[0], x_PD.shape[1]
    own_weights = tuple(jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for w in weights)
    (size,) = {own.shape[axis] for own, axis in zip(own_weights, axes, strict=True)}
    tile, most_blocks, heights = _share_memory(x_PD, own_weights, size, block, n_blocks)
    n_tiles = -(-size // tile)
    n_chunks, tables = _cut_into_chunks(dispatch, most_blocks)

    def spec(own: jax.ShapeDtypeStruct, axis: int) -> pl.BlockSpec:
        sizes = [tile if place == axis else n for place, n in enumerate(own.shape)]

        def place_of(
            chunk: Any, tile_index: Any, expert_C: Any, _: Any, rows_C: Any, *__: Any
        ) -> tuple[Any, ...]:
            # A step without rows asks for the tile that is there, which copies nothing.
            tile_index = jnp.where(rows_C[chunk] > 0, tile_index, n_tiles - 1)
            return (
                expert_C[chunk],
                *(tile_index if place == axis else 0 for place in range(len(sizes))),
            )

        return pl.BlockSpec((None, *sizes), place_of)

    chunk_shape = (most_blocks, block, width)
    run = pl.pallas_call(
        functools.partial(_run_tile, fn, axes, size, heights),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(n_chunks, n_tiles),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                *(spec(own, axis) for own, axis in zip(own_weights, axes, strict=True)),
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[
                pltpu.VMEM(chunk_shape, x_PD.dtype),
                pltpu.VMEM(chunk_shape, jnp.float32),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((n_blocks, block, width), x_PD.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_MEMORY_BYTES
        ),
        cost_estimate=_estimate_cost(
            lambda rows, weights: ((fn(rows[0], weights).astype(x_PD.dtype),), ()),
            (jax.ShapeDtypeStruct((block, width), x_PD.dtype),),
            own_weights,
            n_blocks,
            dispatch.n_experts,
        ),
        name=getattr(fn, "__name__", "tiles").lstrip("_"),
    )
    (y_by_block,) = run(*tables, x_PD.reshape(n_blocks, block, width), *weights)
    y_PD: Array = y_by_block.reshape(n_blocks * block, width)
    return y_PD


def _run_tile(
    fn: TileFunction,
    axes: tuple[int, ...],
    size: int,
    heights: tuple[int, ...],
    expert_C: Any,
    first_C: Any,
    rows_C: Any,
    used: Any,
    x_all: Any,
    *refs: Any,
) -> None:
    """Run the rows of a chunk by one tile of the weights: the body of the kernel.

    Args:
        fn: See `sum_tiles`.
        axes: See `sum_tiles`.
        size: Of those axes.
        heights: How many rows are multiplied at a time; see `share_out`.
        expert_C: Expert of each chunk; only the index maps need it.
        first_C: First block of each chunk.
        rows_C: Rows of each chunk, without padding.
        used: The number of blocks in use.
        x_all: Rows, in the device's memory.
        refs: Tiles of the weights, rows out in the device's memory, a chunk's rows on the chip,
            their sums, and the semaphore of copies.
    """
    del expert_C
    *weight_refs, y_all, x_ref, sum_ref, copied = refs
    chunk, tile_index = pl.program_id(0), pl.program_id(1)
    is_first, is_last = tile_index == 0, tile_index == pl.num_programs(1) - 1
    block, n_rows, first = x_ref.shape[1], rows_C[chunk], first_C[chunk]
    n_own = lax.div(n_rows + block - 1, block)

    def copy_blocks(source: Callable[[Any], Any], target: Callable[[Any], Any], n: Any) -> None:
        def copy(index: Any) -> Any:
            return pltpu.make_async_copy(source(index), target(index), copied)

        lax.fori_loop(0, n, lambda index, _: copy(index).start(), None)
        lax.fori_loop(0, n, lambda index, _: copy(index).wait(), None)

    @pl.when(is_first)
    def _() -> None:
        copy_blocks(lambda index: x_all.at[first + index], lambda index: x_ref.at[index], n_own)

    def multiply(height: int, start: Any, index: Any, state: None) -> None:
        """Multiply some rows of the chunk: several blocks, or a part of one."""
        del state
        start += index * height
        shape = (max(1, height // block), min(height, block), x_ref.shape[2])
        row = 0 if height >= block else pl.multiple_of(lax.rem(start, block), height)
        here = (pl.ds(lax.div(start, block), shape[0]), pl.ds(row, shape[1]))
        tiles = tuple(
            _clear_padding(ref[...], axis, size, tile_index)
            for ref, axis in zip(weight_refs, axes, strict=True)
        )
        part = fn(x_ref[here].reshape(height, shape[2]), tiles).reshape(shape)
        total = jnp.where(is_first, part, part + sum_ref[here])

        @pl.when(is_last)
        def _() -> None:
            x_ref[here] = total.astype(x_ref.dtype)

        @pl.when(~is_last)
        def _() -> None:
            sum_ref[here] = total

    start = jnp.int32(0)
    for height, n in share_out(n_rows, heights):
        lax.fori_loop(0, n, functools.partial(multiply, height, start), None)
        start += n * height

    @pl.when(is_last)
    def _() -> None:
        copy_blocks(lambda index: x_ref.at[index], lambda index: y_all.at[first + index], n_own)

    @pl.when(is_last & (chunk == pl.num_programs(0) - 1))
    def _() -> None:
        x_ref[0] = jnp.zeros_like(x_ref[0])
        n_unused = y_all.shape[0] - used[0]
        copy_blocks(lambda _: x_ref.at[0], lambda index: y_all.at[used[0] + index], n_unused)


def _clear_padding(tile: Any, axis: int, size: int, tile_index: Any) -> Any:
    """Return a tile of an array with zeros where it lies past the array's end."""
    width = tile.shape[axis]
    if size % width == 0:
        return tile
    place = tile_index * width + lax.broadcasted_iota(jnp.int32, tile.shape, axis)
    return jnp.where(place < size, tile, 0)


def share_out(n_rows: Any, heights: Sequence[int]) -> list[tuple[int, Any]]:
    """Return how many tiles of each height the rows of a chunk are multiplied in.

    As many of the greatest as the rows fill, and for the rest the least that hold it. They end
    before the next multiple of the greatest.

    Args:
        n_rows: Rows of a chunk.
        heights: In falling order, each twice the next.

    Example:
        >>> [(height, int(n)) for height, n in share_out(600, (256, 128, 64, 32, 16))]
        [(256, 2), (128, 1), (64, 0), (32, 0), (16, 0)]
    """
    shares, left = [], n_rows
    for height, smaller in zip(heights, (*heights[1:], 0), strict=True):
        is_filled = height == heights[0] and smaller > 0
        n = lax.div(left if is_filled else left + height - 1 - smaller, height)
        shares.append((height, n))
        left = jnp.maximum(left - n * height, 0)
    return shares


def _share_memory(
    x_PD: Array, weights: Shapes, size: int, block: int, n_blocks: int
) -> tuple[int, int, tuple[int, ...]]:
    """Return the width of a tile of the weights, the blocks of a chunk, and heights of its tiles.

    Two tiles of each array take a third of the memory at most, so that copies and products
    overlap. The more rows the rest holds, the fewer times are weights read. Heights are a block,
    and twice or half as many rows again and again, as long as they are whole registers.
    """
    per_column = 2 * sum(_bytes_of((own,)) // size for own in weights)
    most = _BLOCK_BYTES // 3 // per_column
    tile = size if size <= most else max(LANES, most // LANES * LANES)
    item = x_PD.dtype.itemsize
    least = _SUBLANE_BYTES // item
    rows = -(-block // least) * least
    per_block = rows * x_PD.shape[1] * (item + jnp.dtype(jnp.float32).itemsize)
    most_blocks = max(1, (_BLOCK_BYTES - tile * per_column) // per_block)
    heights = [block]
    if block % least == 0:
        while 2 * heights[0] <= min(_MOST_ROWS, most_blocks * block):
            heights.insert(0, 2 * heights[0])
        while heights[-1] % (2 * least) == 0:
            heights.append(heights[-1] // 2)
    # Whole tiles, since the last rows of a chunk may be multiplied in a tile that they do not fill.
    per_tile = heights[0] // block
    most_blocks = min(most_blocks // per_tile, -(-n_blocks // per_tile)) * per_tile
    return tile, most_blocks, tuple(heights)


def _cut_into_chunks(dispatch: Dispatch, most_blocks: int) -> tuple[int, Arrays]:
    """Return how many chunks of so many blocks there may be, and the tables of `_run_tile`."""
    end_E, n_blocks = dispatch.end_block_E, dispatch.expert_Y.shape[0]
    begin_E = jnp.concatenate([jnp.zeros(1, end_E.dtype), end_E[:-1]])
    chunks_E = -((begin_E - end_E) // most_blocks)
    end_chunk_E = jnp.cumsum(chunks_E, dtype=jnp.int32)
    n_chunks = count_blocks(n_blocks, dispatch.n_experts, most_blocks)
    place_C = jnp.arange(n_chunks, dtype=jnp.int32)
    # Chunks not in use have the last expert in use, whose weights are there already, and no rows.
    chunk_C = jnp.clip(place_C, 0, jnp.maximum(end_chunk_E[-1] - 1, 0))
    expert_C = jnp.minimum(count_up_to(end_chunk_E, chunk_C), dispatch.n_experts - 1)
    first_C = begin_E[expert_C] + (chunk_C - (end_chunk_E - chunks_E)[expert_C]) * most_blocks
    block = dispatch.block
    rows_C = jnp.clip(dispatch.end_row_E[expert_C] - first_C * block, 0, most_blocks * block)
    rows_C = jnp.where(place_C < end_chunk_E[-1], rows_C, 0)
    return n_chunks, (expert_C, first_C, rows_C, end_E[-1:])


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
    n_tiles = -(-size // max(LANES, most))
    tile = -(-size // (n_tiles * LANES)) * LANES
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
