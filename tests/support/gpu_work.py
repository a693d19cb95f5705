"""Count what the kernels of a GPU multiply, read and write, program by program.

`Counted` takes the place of `composable.kernels.gpu`: it runs no kernel, and counts those that a
body or a leg would start. It asks the block functions for their products, and the module for the
spans and the order of programs, so that it counts what the kernels do.

Reads are those from memory, by a model of the cache: programs start in their order, as many at a
time as there are cores; what several of them read at a time is read once; and what was read stays
in the cache until as many bytes as half of it holds have been read since (an H100's L2 has two
halves, and data that both need is in both).
"""

import collections
import dataclasses
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from composable.kernels import gpu


@dataclasses.dataclass(kw_only=True)
class Counted:
    """Kernels that are counted.

    Attributes:
        cores: Programs that run at a time.
        cache: Bytes that the cache keeps.
        flops: Floating-point operations so far, padding included.
        read: Bytes read from memory.
        written: Bytes written to memory.
        kernels: Names of the functions that were run.
    """

    cores: int
    cache: int
    flops: int = 0
    read: int = 0
    written: int = 0
    kernels: list[str] = dataclasses.field(default_factory=list)
    sum_tiles = gpu.sum_tiles

    def fits_on_chip(self, fn, rows, weights, block):
        return gpu.fits_on_chip(fn, rows, weights, block)

    def stream_blocks(self, fn, rows, weights, dispatch, tiling=None):
        """Count a kernel; returns shapes, which the next kernel can take."""
        self.kernels.append(fn.__name__)
        outs, sums = jax.eval_shape(
            fn,
            tuple(jax.ShapeDtypeStruct((dispatch.block, *r.shape[1:]), r.dtype) for r in rows),
            tuple(jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for w in weights),
        )
        products, elementwise = _look_into(fn, rows, weights)
        if outs:
            results = [
                jax.ShapeDtypeStruct((rows[0].shape[0], *o.shape[1:]), o.dtype) for o in outs
            ]
            self._count_rows(products, elementwise, outs[0].shape[1], dispatch)
        else:
            results = [jax.ShapeDtypeStruct((dispatch.n_experts, *s.shape), s.dtype) for s in sums]
            self._count_sums(products, sums[0].shape, dispatch)
        self.written += sum(math.prod(r.shape) * r.dtype.itemsize for r in results)
        return (tuple(results), ()) if outs else ((), tuple(results))

    def _count_rows(self, products, elementwise, width, dispatch):
        spans, tile = gpu.make_spans(dispatch), gpu.choose_tile(width)
        n_tiles = pl.cdiv(width, tile)
        programs = jnp.arange(len(spans.expert_Z) * n_tiles, dtype=jnp.int32)
        order = gpu.find_span_and_tile(programs, n_tiles, spans.turn_Z, spans.turns_Z)
        tables = spans.expert_Z, spans.begin_Z, spans.end_Z, spans.held_Z
        expert, begin, end, held = map(np.asarray, tables)
        most = spans.size // gpu._LEAST
        reads = []
        for span, column in zip(*(np.asarray(part).tolist() for part in order), strict=True):
            if expert[span] == dispatch.n_experts:
                continue
            window, n_columns = (
                _window(spans.size, held[span], most),
                min(tile, width - column * tile),
            )
            n_rows = min(window, int(end[span] - begin[span]))
            size = window * _window(tile, n_columns)
            own = {(id(a), span, column): n_rows * n_columns * _item(a) for a in elementwise}
            for left, right, depth in products:
                own[id(left), span] = n_rows * depth * _item(left)
                own[id(right), "w", expert[span], column] = depth * n_columns * _item(right)
                self.flops += 2 * size * _pad(depth, left, right)
            reads.append(own)
        self._read(reads)

    def _count_sums(self, products, shape, dispatch):
        begin_E = np.append(0, np.asarray(dispatch.end_block_E)[:-1]) * dispatch.block
        n_rows_E = (np.asarray(dispatch.end_row_E) - begin_E).tolist()
        tiles = tuple(map(gpu.choose_tile, shape))
        grid = tuple(map(pl.cdiv, shape, tiles))
        reads = []
        programs = jnp.arange(dispatch.n_experts * math.prod(grid), dtype=jnp.int32)
        order = (np.asarray(part).tolist() for part in gpu.find_expert_and_tiles(programs, *grid))
        for expert, down, across in zip(*order, strict=True):
            own, n_rows = {}, n_rows_E[expert]
            for left, right, _ in products:
                height = min(tiles[0], shape[0] - down * tiles[0])
                width = min(tiles[1], shape[1] - across * tiles[1])
                own[id(left), "l", expert, down] = n_rows * height * _item(left)
                own[id(right), "r", expert, across] = n_rows * width * _item(right)
                size = _window(tiles[0], height) * _window(tiles[1], width)
                self.flops += 2 * size * _pad(n_rows, left, right)
            reads.append(own)
        self._read(reads)

    def _read(self, reads):
        """Add what is read from memory, for the reads of each program in their order."""
        kept: collections.OrderedDict = collections.OrderedDict()
        n_kept = 0
        for first in range(0, len(reads), self.cores):
            at_a_time = {
                key: n for own in reads[first : first + self.cores] for key, n in own.items()
            }
            for key, n_bytes in at_a_time.items():
                if key in kept:
                    kept.move_to_end(key)
                    continue
                kept[key] = n_bytes
                n_kept += n_bytes
                self.read += n_bytes
                while n_kept > self.cache:
                    n_kept -= kept.popitem(last=False)[1]


def _item(array):
    return array.dtype.itemsize


def _window(size, n_left, most=2):
    """Return the size of the window that is computed."""
    return next(n for n, is_it in gpu._choose_window(size, n_left, most) if is_it)


def _pad(depth, left, right):
    """Return the length of an axis that is summed over, in whole steps."""
    return pl.cdiv(depth, gpu._LEAST) * gpu._LEAST


def _look_into(fn, rows, weights):
    """Return the products of a function, as (left, right, depth), and what it reads besides."""
    products, elementwise = [], []
    tile = jnp.zeros((gpu._LEAST, gpu._LEAST))

    def note_product(subscripts, left, right):
        names, of_result = subscripts.split("->")
        of_left, _ = names.split(",")
        (axis,) = (place for place, name in enumerate(of_left) if name not in of_result)
        products.append((left.ref, right.ref, left.bounds[axis][1]))
        return tile

    def note_read(operand, windows):
        elementwise.append(operand.ref)
        return tile

    windows = ((0, gpu._LEAST), (0, gpu._LEAST))
    with (
        mock.patch.object(gpu, "sum_products", note_product),
        mock.patch.object(gpu.Operand, "read", note_read),
    ):
        fn(
            tuple(gpu._rows(row, 0, row.shape[0], windows) for row in rows),
            tuple(gpu._weights(w, 0, windows) for w in weights),
        )
    return products, elementwise
