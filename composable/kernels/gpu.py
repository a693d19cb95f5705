"""Run a function on every block in use as one GPU kernel, without a copy of any expert's weights.

A GPU runs hundreds of small programs at a time, each with little memory of its own. Here a program
computes one tile of the results: the rows of two blocks of an expert by 128 columns, or a tile of a
per-expert sum. It walks along the axis that a product sums over, a chunk at a time, from the arrays
where they are: no copy is made per block. Programs that start one after the other share an expert,
a range of columns and few blocks, so that what one of them reads from memory the next find in the
cache of the chip (L2), and each matrix in use is read from memory once.

`stream_blocks` takes the pieces of a body that a TPU runs where a whole one does not fit its chip
(`tpu.py`), and reads their products, not their tiling: in a kernel a function is given `Operand`s,
and `product` sums those with `sum_products`. Compiled by Triton (Pallas), for CUDA.

It chooses no function and no platform (`blocks.py` does), and differentiates nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from composable.kernels.block_functions import (
    Arrays,
    BlockFunction,
    BlockOutputs,
    KernelOperand,
    Tiling,
)
from composable.kernels.dispatch import Dispatch, count_up_to

# Where a window on an axis starts, and its size.
Window = tuple[Any, int]

# Columns of a tile at most, and the least that tensor cores multiply along any axis.
_TILE: Final = 128
_LEAST: Final = 16
# Bytes that a row of a chunk has along the axis that is summed over: a line of the cache.
_CHUNK_BYTES: Final = 128
# Tiles of one range of columns that programs compute in turn, before those of the next. About as
# many programs run at a time as a square of this size has tiles; a square reads the least.
_TILES_IN_TURN: Final = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans:
    """Runs of blocks of one expert; one program computes a tile of a run's rows.

    Attributes:
        expert_Z: int32, the expert of a span; E for rows of blocks not in use.
        begin_Z: int32, first row of a span.
        end_Z: int32, one past its last row.
        held_Z: int32, how many of its rows, from the first on, may hold a choice.
        turn_Z: int32, first of the spans that take turns with this one.
        turns_Z: int32, how many those are.
        size: Rows of a span at most, padded to a power of two; static.
    """

    expert_Z: Array
    begin_Z: Array
    end_Z: Array
    held_Z: Array
    turn_Z: Array
    turns_Z: Array
    size: int = dataclasses.field(metadata={"static": True})


def make_spans(dispatch: Dispatch) -> Spans:
    """Return the spans of a dispatch: two blocks each, or more where blocks are small.

    Every block is in one span, also those that are not in use.

    Args:
        dispatch: The blocks and the expert of each.

    Example:
        >>> from composable.kernels import make_dispatch
        >>> expert_MJ = jnp.array([[0]] * 40 + [[1]] * 8)
        >>> spans = make_spans(make_dispatch(expert_MJ, n_experts=2, block=8))
        >>> [a.tolist() for a in (spans.expert_Z, spans.begin_Z, spans.end_Z)]
        [[0, 0, 0, 1, 2], [0, 16, 32, 40, 48], [16, 32, 40, 48, 56]]
    """
    block, n_blocks = dispatch.block, dispatch.expert_Y.shape[0]
    per_span = max(2, _LEAST // block)
    n_groups = min(dispatch.n_experts, n_blocks)
    # As `count_blocks`, and one more: what a routing leaves then holds the blocks not in use.
    n_spans = (n_blocks - n_groups) // per_span + n_groups + 1

    end_E = dispatch.end_block_E
    begin_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
    spans_E = -((begin_E - end_E) // per_span)
    end_span_E = jnp.cumsum(spans_E, dtype=jnp.int32)
    begin_span_E = end_span_E - spans_E

    span_Z = jnp.arange(n_spans, dtype=jnp.int32)
    is_used_Z = span_Z < end_span_E[-1]
    expert_Z = count_up_to(end_span_E, span_Z)
    own_Z = jnp.minimum(expert_Z, dispatch.n_experts - 1)
    place_Z = jnp.where(is_used_Z, span_Z - begin_span_E[own_Z], span_Z - end_span_E[-1])
    first_Z = jnp.where(is_used_Z, begin_E[own_Z], end_E[-1]) + place_Z * per_span
    last_Z = jnp.minimum(first_Z + per_span, jnp.where(is_used_Z, end_E[own_Z], n_blocks))
    held_Z = jnp.minimum(last_Z * block, dispatch.end_row_E[own_Z]) - first_Z * block
    turn_Z = jnp.where(is_used_Z, span_Z - place_Z % _TILES_IN_TURN, span_Z)
    turns_Z = jnp.where(is_used_Z, jnp.minimum(_TILES_IN_TURN, end_span_E[own_Z] - turn_Z), 1)
    return Spans(
        expert_Z=expert_Z,
        begin_Z=first_Z * block,
        end_Z=last_Z * block,
        held_Z=jnp.where(is_used_Z, held_Z, 0),
        turn_Z=turn_Z,
        turns_Z=turns_Z,
        size=pl.next_power_of_2(per_span * block),
    )


def find_span_and_tile(program: Any, n_tiles: int, turn_Z: Any, turns_Z: Any) -> tuple[Any, Any]:
    """Return what a program computes: spans in turn, all at one tile before the next.

    Args:
        program: Number of the program; they start in this order.
        n_tiles: Tiles of columns.
        turn_Z: See `Spans`; an array or a reference to one.
        turns_Z: See `Spans`; an array or a reference to one.

    Returns:
        Span and tile. The programs of spans in turn follow each other, so that a number divided by
        the tiles is one of these spans, if not the one wanted.
    """
    near = lax.div(program, jnp.int32(n_tiles))
    first, n_turns = turn_Z[near], turns_Z[near]
    place = program - first * n_tiles
    return first + lax.rem(place, n_turns), lax.div(place, n_turns)


def find_expert_and_tiles(program: Any, n_down: int, n_across: int) -> tuple[Any, Any, Any]:
    """Return what a program of sums computes: rows of tiles in turn, as spans.

    Args:
        program: Number of the program; they start in this order.
        n_down: Tiles along the first axis of an expert's sum.
        n_across: Tiles along the second.

    Returns:
        Expert, and tile along both axes.
    """
    per_expert = jnp.int32(n_down * n_across)
    place = lax.rem(program, per_expert)
    near = lax.div(place, jnp.int32(n_across))
    first = near - lax.rem(near, jnp.int32(_TILES_IN_TURN))
    n_turns = jnp.minimum(_TILES_IN_TURN, n_down - first)
    place = place - first * n_across
    return lax.div(program, per_expert), first + lax.rem(place, n_turns), lax.div(place, n_turns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand(KernelOperand):
    """An array in the device's memory; a block function reads from it what a program needs.

    Attributes:
        ref: The whole array.
        expert: First index, for weights; none for rows.
        bounds: First index and one past the last, along each axis that is left.
        windows: What the program computes, along both axes of its results.
    """

    ref: Any
    expert: Any | None
    bounds: tuple[tuple[Any, Any], tuple[Any, Any]]
    windows: tuple[Window, Window]

    @property
    def dtype(self) -> Any:
        """Type of the array."""
        return self.ref.dtype

    def astype(self, dtype: Any) -> Array:
        """Read the part that belongs to the results, for elementwise functions."""
        return self.read(self.windows).astype(dtype)

    def multiply(self, subscripts: str, right: Any) -> Array:
        """Return the tile of a product that the program computes."""
        return sum_products(subscripts, self, right)

    def read(self, windows: Sequence[Window]) -> Array:
        """Read a part; zero past the bounds."""
        index = tuple(pl.ds(start, size) for start, size in windows)
        whole = index if self.expert is None else (self.expert, *index)
        return plgpu.load(self.ref.at[whole], **_mask(windows, [end for _, end in self.bounds]))


def sum_products(subscripts: str, left: Operand, right: Operand) -> Array:
    """Multiply two operands inside a kernel, a chunk of the axis that they share at a time.

    Args:
        subscripts: As of `jnp.einsum`: two axes each, and one that is summed over.
        left: Has the first axis of the result.
        right: Has the second.

    Returns:
        The part of the product that the program computes, in float32.
    """
    names, of_result = subscripts.split("->")
    of_left, of_right = names.split(",")
    (shared,) = set(of_left) & set(of_right)
    axes = of_left.index(shared), of_right.index(shared)
    begin, end = left.bounds[axes[0]]
    dtype = jnp.promote_types(left.dtype, right.dtype)
    chunk = max(_LEAST, _CHUNK_BYTES // dtype.itemsize)
    if isinstance(end, int):
        chunk = max(_LEAST, min(chunk, pl.next_power_of_2(end)))
    windows = dict(zip(of_result, left.windows, strict=True))

    def add_chunks(total: Any, start: Any, size: int, n_chunks: Any) -> Any:
        def add_chunk(k: Any, total: Any) -> Any:
            own = {**windows, shared: (start + k * size, size)}
            x, y = (
                operand.read([own[name] for name in letters]).astype(dtype)
                for operand, letters in ((left, of_left), (right, of_right))
            )
            dimensions = (((axes[1],), (axes[0],)), ((), ()))
            return total + lax.dot_general(y, x, dimensions, preferred_element_type=jnp.float32)

        return lax.fori_loop(0, n_chunks, add_chunk, total)

    n_rows, n_columns = (size for _, size in left.windows)
    whole = (end - begin) // chunk
    total = add_chunks(jnp.zeros((n_columns, n_rows), jnp.float32), begin, chunk, whole)
    if not isinstance(end, int) or end % chunk:
        # The rest in the steps that an instruction sums over.
        start = begin + whole * chunk
        total = add_chunks(total, start, _LEAST, pl.cdiv(end - start, _LEAST))
    array: Array = total.T
    return array


# A program has too little memory to keep the rows of an expert and their sums.
sum_tiles: Final = None


def fits_on_chip(fn: BlockFunction, rows: Arrays, weights: Arrays, block: int) -> bool:
    """Return whether one program can run a whole body: never, on a GPU."""
    del fn, rows, weights, block
    return False


def stream_blocks(
    fn: BlockFunction,
    rows: Arrays,
    weights: Arrays,
    dispatch: Dispatch,
    tiling: Tiling | None = None,
) -> BlockOutputs:
    """Run `fn` on every block in use, in one kernel.

    Off a GPU it runs with `interpret=True`, program after program.

    Args:
        fn: See `blocks.run_blocks`. It takes products of its arguments by `product` and
            applies elementwise functions to those and, after `astype`, to its arguments. It returns
            rows out, all of one width, or sums, all of one shape; not both.
        rows: See `blocks.run_blocks`.
        weights: See `blocks.run_blocks`.
        dispatch: See `blocks.run_blocks`.
        tiling: Not used: what can be cut follows from the products.

    Returns:
        See `blocks.run_blocks`.
    """
    del tiling
    own_rows = tuple(row[: dispatch.block] for row in rows)
    own_weights = tuple(w[0] for w in weights)
    outs, sums = jax.eval_shape(fn, own_rows, own_weights)
    assert bool(outs) != bool(sums), "rows out and sums are not one kernel"
    if outs:
        return _stream_rows(fn, rows, weights, dispatch, outs), ()
    return (), _stream_sums(fn, rows, dispatch, sums)


def _stream_rows(
    fn: BlockFunction,
    rows: Arrays,
    weights: Arrays,
    dispatch: Dispatch,
    outs: Sequence[jax.ShapeDtypeStruct],
) -> Arrays:
    """Run a function whose results are rows: a program for each span and tile of columns."""
    (width,) = {out.shape[1] for out in outs}
    spans = make_spans(dispatch)
    tile = choose_tile(width)
    n_tiles = pl.cdiv(width, tile)
    tables = (
        *(spans.expert_Z, spans.begin_Z, spans.end_Z, spans.held_Z),
        *(spans.turn_Z, spans.turns_Z),
    )

    def run_program(*refs: Any) -> None:
        expert_Z, begin_Z, end_Z, held_Z, turn_Z, turns_Z = refs[:6]
        inputs, results = refs[6 : -len(outs)], refs[-len(outs) :]
        span, column = find_span_and_tile(pl.program_id(0), n_tiles, turn_Z, turns_Z)
        expert, begin, end = expert_Z[span], begin_Z[span], end_Z[span]

        def run(n_rows: int, n_columns: int) -> None:
            windows: tuple[Window, Window] = (begin, n_rows), (column * tile, n_columns)
            own_rows = (_rows(ref, begin, end, windows) for ref in inputs[: len(rows)])
            own_weights = (_weights(ref, expert, windows) for ref in inputs[len(rows) :])
            values, _ = fn(tuple(own_rows), tuple(own_weights))  # type: ignore[arg-type]
            for ref, value in zip(results, values, strict=True):
                _write(ref, windows, (end, width), value)
            while n_rows < spans.size:  # rows of padding
                write_zeros(begin + n_rows, n_rows)
                n_rows *= 2

        def write_zeros(first: Any, n_rows: int) -> None:
            windows: tuple[Window, Window] = (first, n_rows), (column * tile, tile)
            for ref in results:
                _write(ref, windows, (end, width), jnp.zeros((n_rows, tile), ref.dtype))

        is_used = expert < dispatch.n_experts
        down = _choose_window(spans.size, held_Z[span], spans.size // _LEAST)
        _run_one(run, down, _choose_window(tile, width - column * tile), is_used)
        pl.when(~is_used)(functools.partial(write_zeros, begin, spans.size))

    call = _kernel(
        run_program,
        fn,
        n_programs=spans.expert_Z.shape[0] * n_tiles,
        results=[jax.ShapeDtypeStruct((len(rows[0]), width), out.dtype) for out in outs],
        n_elements=spans.size * tile,
    )
    return tuple(call(*tables, *rows, *weights))


def _stream_sums(
    fn: BlockFunction,
    rows: Arrays,
    dispatch: Dispatch,
    sums: Sequence[jax.ShapeDtypeStruct],
) -> Arrays:
    """Run a function whose results are sums: a program for each expert and tile of its sum."""
    ((height, width),) = {total.shape for total in sums}
    tiles = choose_tile(height), choose_tile(width)
    n_down, n_across = pl.cdiv(height, tiles[0]), pl.cdiv(width, tiles[1])
    end_block_E = dispatch.end_block_E
    begin_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_block_E[:-1]]) * dispatch.block
    end_E = dispatch.end_row_E

    def run_program(begin_E: Any, end_E: Any, *refs: Any) -> None:
        expert, down, across = find_expert_and_tiles(pl.program_id(0), n_down, n_across)
        starts, begin, end = (down * tiles[0], across * tiles[1]), begin_E[expert], end_E[expert]

        def run(n_rows: int, n_columns: int) -> None:
            windows: tuple[Window, Window] = (starts[0], n_rows), (starts[1], n_columns)
            own_rows = tuple(_rows(ref, begin, end, windows) for ref in refs[: len(rows)])
            _, totals = fn(own_rows, ())  # type: ignore[arg-type]
            for ref, total in zip(refs[len(rows) :], totals, strict=True):
                _write(ref, windows, (height, width), total, expert)

        left = height - starts[0], width - starts[1]
        _run_one(run, _choose_window(tiles[0], left[0]), _choose_window(tiles[1], left[1]))

    call = _kernel(
        run_program,
        fn,
        n_programs=dispatch.n_experts * n_down * n_across,
        results=[
            jax.ShapeDtypeStruct((dispatch.n_experts, *total.shape), total.dtype) for total in sums
        ],
        n_elements=math.prod(tiles),
    )
    return tuple(call(begin_E, end_E, *rows))


def choose_tile(width: int) -> int:
    """Return how many columns a program computes, if not the last.

    Example:
        >>> [choose_tile(width) for width in (1536, 96, 8)]
        [128, 128, 16]
    """
    return max(_LEAST, min(_TILE, pl.next_power_of_2(width)))


def _choose_window(size: int, n_left: Any, most: int = 2) -> list[tuple[int, Any]]:
    """Return the sizes of a window, each with whether it is the one: the least that holds the rest.

    The last window of an axis then has fewer rows or columns that are not there.

    Args:
        size: The largest.
        n_left: Rows or columns from its start on.
        most: The largest, over the least.
    """
    sizes = [size]
    while sizes[-1] // 2 >= max(_LEAST, size // most):
        sizes.append(sizes[-1] // 2)
    is_less = [n_left <= own for own in sizes[1:]]
    found = [
        jnp.logical_and(is_not, jnp.logical_not(is_this))
        for is_not, is_this in itertools.pairwise([True, *is_less])
    ]
    return list(zip(sizes, [*found, is_less[-1] if is_less else True], strict=True))


def _run_one(
    run: Callable[[int, int], None],
    down: list[tuple[int, Any]],
    across: list[tuple[int, Any]],
    condition: Any = True,
) -> None:
    """Run a program at the one size of its window, of those that it is compiled for."""
    for (n_rows, is_down), (n_columns, is_across) in itertools.product(down, across):
        is_it = jnp.logical_and(condition, jnp.logical_and(is_down, is_across))
        pl.when(is_it)(functools.partial(run, n_rows, n_columns))


def _kernel(
    run_program: Callable[..., None],
    fn: BlockFunction,
    *,
    n_programs: int,
    results: Sequence[jax.ShapeDtypeStruct],
    n_elements: int,
) -> Callable[..., Sequence[Array]]:
    """Return a kernel that reads and writes its arrays where they are."""
    return pl.pallas_call(
        run_program,
        grid=(n_programs,),
        out_shape=list(results),
        compiler_params=plgpu.CompilerParams(num_warps=8 if n_elements > 8192 else 4, num_stages=3),
        name=getattr(fn, "__name__", "blocks").lstrip("_"),
    )


def _rows(ref: Any, begin: Any, end: Any, windows: tuple[Window, Window]) -> Operand:
    return Operand(ref=ref, expert=None, bounds=((begin, end), (0, ref.shape[1])), windows=windows)


def _weights(ref: Any, expert: Any, windows: tuple[Window, Window]) -> Operand:
    bounds = (0, ref.shape[1]), (0, ref.shape[2])
    return Operand(ref=ref, expert=expert, bounds=bounds, windows=windows)


def _write(
    ref: Any, windows: Sequence[Window], ends: Sequence[Any], value: Any, expert: Any = None
) -> None:
    """Write a part of a result, up to its bounds."""
    index = tuple(pl.ds(start, size) for start, size in windows)
    whole = index if expert is None else (expert, *index)
    mask = {name: given for name, given in _mask(windows, ends).items() if name == "mask"}
    plgpu.store(ref.at[whole], value, **mask)


def _mask(windows: Sequence[Window], ends: Sequence[Any]) -> dict[str, Any]:
    """Return how to read a part up to its bounds; nothing where all of it is inside."""
    inside = [
        lax.broadcasted_iota(jnp.int32, tuple(size for _, size in windows), axis) < end - start
        for axis, ((start, size), end) in enumerate(zip(windows, ends, strict=True))
        # Windows start at multiples of their size, but those of rows.
        if not isinstance(end, int) or end % size
    ]
    if not inside:
        return {}
    return {"mask": functools.reduce(jnp.logical_and, inside), "other": 0}
