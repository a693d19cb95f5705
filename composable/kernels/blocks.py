"""Run a function on every block in use, with the weights of the block's own expert.

One primitive, `run_blocks`, carries every kernel of this package: matrix products and whole
feed-forward bodies, forwards and backwards, differ only in the function that is run per block. It
has one implementation per kind of platform, same meaning:

- `loop_blocks` (CPU): a loop over the blocks in use, with a trip count known only at run time. No
  row is multiplied by another expert's weights and blocks that hold nothing cost nothing. One
  expert's weights are sliced once per group, and what a block computes on the way stays in cache.
- `tpu.stream_blocks` (TPU) and `gpu.stream_blocks` (CUDA): kernels that read the weights of each
  expert in use once, the first from memory to the chip, the second through its cache. A TPU has
  `tpu.sum_tiles` besides, for bodies of any size.
- `batch_blocks` (everything else): one large batched product rather than many small ones in a row,
  each waiting for the host to check the loop condition. Blocks are processed in a few large
  chunks, each block with a copy of its expert's weights, and empty chunks are not computed.

`lax.ragged_dot` is none of them: on CPU and GPU, XLA expands it to every row times every expert,
and on TPU it is a kernel for one product, between which the hidden activations leave the chip.

What it does not do: differentiate (its users define their gradients, leg by leg), choose blocks
(`dispatch.py`) or choose the functions (`grouped_matmul.py`, `grouped_swiglu.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from composable.kernels.block_functions import (
    Arrays,
    BlockFunction,
    BlockOutputs,
    TileFunction,
    Tiling,
)
from composable.kernels.dispatch import Dispatch

SumTiles = Callable[[TileFunction, Array, Arrays, Dispatch, tuple[int, ...]], Array]


class Accelerator(Protocol):
    """Kernels of a kind of device: the modules `tpu` and `gpu`."""

    @property
    def sum_tiles(self) -> SumTiles | None:
        """Add up what a function returns for tiles of weights, in one kernel; see `tpu`."""

    def fits_on_chip(self, fn: BlockFunction, rows: Arrays, weights: Arrays, block: int) -> bool:
        """Return whether one kernel can run all that a function does."""

    def stream_blocks(
        self,
        fn: BlockFunction,
        rows: Arrays,
        weights: Arrays,
        dispatch: Dispatch,
        tiling: Tiling | None = None,
    ) -> BlockOutputs:
        """Run a function on every block in use, in one kernel."""


# The same as a block function by kernels of a chip, for weights of any size.
StreamFunction = Callable[[Accelerator, Arrays, Arrays, Dispatch], BlockOutputs]

# A vmapped loop with a traced trip count would run every member to the longest count and select
# after each step; one member after the other does only the work there is. A kernel cannot be
# vmapped over its tables.
_one_by_one: Callable[[Callable[..., BlockOutputs]], Callable[..., BlockOutputs]]
_one_by_one = jax.custom_batching.sequential_vmap

# `batch_blocks` gathers at most about this many bytes of weights at a time, and splits the blocks
# into about this many chunks, so that at most an eighth of the work is wasted.
_GATHERED_BYTES = 1 << 28
_CHUNKS = 8


def run_blocks(
    fn: BlockFunction,
    rows: Arrays,
    weights: Arrays,
    dispatch: Dispatch,
    stream: StreamFunction | None = None,
    shared: Arrays = (),
) -> BlockOutputs:
    """Run `fn` on every block in use, by the implementation for the platform compiled for.

    The platform is the one that the computation is lowered for, not the default backend, so a
    computation placed on the CPU of a machine with a GPU uses the CPU implementation.

    Args:
        fn: Pure function of (rows, weights): the block's slice of each array of `rows`, and its
            expert's slice of each array of `weights`. Returns (rows out, sums): arrays whose
            first axis is the block's rows, and arrays to add up over the blocks of an expert.
        rows: Arrays whose first axis is P.
        weights: Arrays whose first axis is E.
        dispatch: The blocks and the expert of each.
        stream: The same by the kernels of a chip, for weights of any size. By default the whole
            weights of an expert must fit on a TPU, and GPUs use no kernel. Like `fn`, one object
            for all calls.
        shared: Arrays that `fn` takes whole, after the weights, for all blocks; `stream` as well,
            which must then be given.

    Returns:
        Arrays with first axis P, zero in blocks not in use; and arrays with first axis E, zero
        for experts without rows.
    """
    outputs: BlockOutputs = _run_on_platform(fn, rows, weights, dispatch, stream, shared)
    return outputs


def describe_implementation(platform: str) -> str:
    """Return which implementation of `run_blocks` a platform has, and why.

    Args:
        platform: As jax names it: "cpu", "tpu", "cuda"; "gpu", as devices have it, is CUDA.

    Example:
        >>> describe_implementation("cpu")
        'loop_blocks: a loop over the blocks in use, whose number is known when it runs'
    """
    reasons = {
        "cpu": "loop_blocks: a loop over the blocks in use, whose number is known when it runs",
        "tpu": "stream_blocks, sum_tiles: kernels that read each expert in use once",
        "cuda": "stream_blocks: one kernel for each leg, without a copy of weights",
    }
    return reasons.get(platform, "batch_blocks: few large products, since many small ones wait")


# The implementations of all platforms are traced, once for all slots instead of for each.
@functools.partial(jax.jit, static_argnames=("fn", "stream"), inline=True)
def _run_on_platform(
    fn: BlockFunction,
    rows: Arrays,
    weights: Arrays,
    dispatch: Dispatch,
    stream: StreamFunction | None,
    shared: Arrays,
) -> BlockOutputs:
    """Do the work of `run_blocks`."""
    from composable.kernels import gpu, tpu

    def take(shared: Arrays) -> BlockFunction:
        return lambda rows, weights: fn(rows, (*weights, *shared))

    def by_loop(rows: Arrays, weights: Arrays, shared: Arrays, dispatch: Dispatch) -> BlockOutputs:
        return loop_blocks(take(shared), rows, weights, dispatch)

    def by_batch(rows: Arrays, weights: Arrays, shared: Arrays, dispatch: Dispatch) -> BlockOutputs:
        return batch_blocks(take(shared), rows, weights, dispatch)

    def by_kernels(
        chip: Accelerator, rows: Arrays, weights: Arrays, shared: Arrays, dispatch: Dispatch
    ) -> BlockOutputs:
        if stream is None:
            return chip.stream_blocks(fn, rows, weights, dispatch)
        return stream(chip, rows, (*weights, *shared), dispatch)

    outputs: BlockOutputs = lax.platform_dependent(
        rows,
        weights,
        shared,
        dispatch,
        cpu=_one_by_one(by_loop),
        tpu=_one_by_one(functools.partial(by_kernels, tpu)),
        cuda=_one_by_one(functools.partial(by_kernels, gpu)) if stream else by_batch,
        default=by_batch,
    )
    return outputs


def loop_blocks(
    fn: BlockFunction, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    """Run `fn` block after block, in a loop over groups and, inside, over the group's blocks.

    Args:
        fn: See `run_blocks`.
        rows: See `run_blocks`.
        weights: See `run_blocks`.
        dispatch: See `run_blocks`.

    Returns:
        See `run_blocks`.
    """
    block = dispatch.block
    n_rows = dispatch.expert_Y.shape[0] * block
    out_shapes, sum_shapes = _shapes_of_one_block(fn, rows, weights, block)

    def run_group(
        state: tuple[Array, Arrays, Arrays],
    ) -> tuple[Array, Arrays, Arrays]:
        first, outs, sums = state
        expert = dispatch.expert_Y[first]
        end = dispatch.end_block_E[expert]
        own_weights = tuple(lax.dynamic_index_in_dim(w, expert, keepdims=False) for w in weights)

        def run_block(index: Array, state: BlockOutputs) -> BlockOutputs:
            outs, totals = state
            start = index * block
            own_rows = tuple(lax.dynamic_slice_in_dim(row, start, block) for row in rows)
            new_outs, parts = fn(own_rows, own_weights)
            outs = tuple(
                lax.dynamic_update_slice_in_dim(out, new, start, axis=0)
                for out, new in zip(outs, new_outs, strict=True)
            )
            return outs, tuple(total + part for total, part in zip(totals, parts, strict=True))

        totals = tuple(jnp.zeros(s.shape, s.dtype) for s in sum_shapes)
        outs, totals = lax.fori_loop(first, end, run_block, (outs, totals))
        sums = tuple(
            lax.dynamic_update_index_in_dim(all_sums, total, expert, axis=0)
            for all_sums, total in zip(sums, totals, strict=True)
        )
        return end, outs, sums

    outs = tuple(jnp.zeros((n_rows, *s.shape[1:]), s.dtype) for s in out_shapes)
    sums = tuple(jnp.zeros((dispatch.n_experts, *s.shape), s.dtype) for s in sum_shapes)
    _, outs, sums = lax.while_loop(
        lambda state: state[0] < dispatch.n_blocks_used, run_group, (jnp.int32(0), outs, sums)
    )
    return outs, sums


def batch_blocks(
    fn: BlockFunction, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    """Run `fn` on chunks of blocks at a time, each block beside a copy of its expert's weights.

    How many chunks there are to run is known at run time only, so the host checks once for each.

    Args:
        fn: See `run_blocks`.
        rows: See `run_blocks`.
        weights: See `run_blocks`.
        dispatch: See `run_blocks`.

    Returns:
        See `run_blocks`.
    """
    block = dispatch.block
    n_blocks = dispatch.expert_Y.shape[0]
    out_shapes, sum_shapes = _shapes_of_one_block(fn, rows, weights, block)
    bytes_per_block = sum(w[0].size * w.dtype.itemsize for w in weights) + sum(
        s.size * s.dtype.itemsize for s in sum_shapes
    )
    most = max(1, _GATHERED_BYTES // max(1, bytes_per_block))
    chunk = min(most, -(-n_blocks // _CHUNKS))
    n_chunks = -(-n_blocks // chunk)
    n_missing = n_chunks * chunk - n_blocks
    rows = tuple(jnp.pad(row, [(0, n_missing * block), *[(0, 0)] * (row.ndim - 1)]) for row in rows)
    expert_Y = jnp.pad(dispatch.expert_Y, (0, n_missing))

    def run_chunk(index: Array, state: BlockOutputs) -> BlockOutputs:
        outs, sums = state
        first = index * chunk
        start = first * block
        own_rows = tuple(
            lax.dynamic_slice_in_dim(row, start, chunk * block).reshape(
                chunk, block, *row.shape[1:]
            )
            for row in rows
        )
        experts = lax.dynamic_slice_in_dim(expert_Y, first, chunk)
        is_used = first + jnp.arange(chunk) < dispatch.n_blocks_used

        def keep_used(array: Array) -> Array:
            return jnp.where(is_used.reshape(-1, *[1] * (array.ndim - 1)), array, 0)

        new_outs, parts = jax.vmap(fn)(own_rows, tuple(w[experts] for w in weights))
        outs = tuple(
            lax.dynamic_update_slice_in_dim(
                out, keep_used(new).reshape(-1, *out.shape[1:]), start, axis=0
            )
            for out, new in zip(outs, new_outs, strict=True)
        )
        sums = tuple(
            total.at[experts].add(keep_used(part)) for total, part in zip(sums, parts, strict=True)
        )
        return outs, sums

    n_rows = n_chunks * chunk * block
    outs = tuple(jnp.zeros((n_rows, *s.shape[1:]), s.dtype) for s in out_shapes)
    sums = tuple(jnp.zeros((dispatch.n_experts, *s.shape), s.dtype) for s in sum_shapes)
    n_chunks_used = -(-dispatch.n_blocks_used // chunk)
    outs, sums = lax.fori_loop(0, n_chunks_used, run_chunk, (outs, sums))
    return tuple(out[: n_blocks * block] for out in outs), sums


def _shapes_of_one_block(
    fn: BlockFunction, rows: Arrays, weights: Arrays, block: int
) -> tuple[tuple[jax.ShapeDtypeStruct, ...], tuple[jax.ShapeDtypeStruct, ...]]:
    """Return shapes and types of the results of `fn` for one block."""

    def run_first(rows: Arrays, weights: Arrays) -> BlockOutputs:
        return fn(tuple(row[:block] for row in rows), tuple(w[0] for w in weights))

    out_shapes, sum_shapes = jax.eval_shape(run_first, rows, weights)
    return out_shapes, sum_shapes
