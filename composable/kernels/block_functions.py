"""What runs on a block: the types of its functions, how they are cut, what a kernel gives them.

Nothing here needs Pallas, which takes as long to import as all of this package, and which a process
that only writes text on a CPU never uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
from jax import Array

# Numbers that a TPU keeps together, along the last axis.
LANES: Final = 128

Arrays = tuple[Array, ...]
BlockOutputs = tuple[Arrays, Arrays]
# (rows of one block, weights of its expert) -> (rows out, contributions to per-expert sums).
BlockFunction = Callable[[Arrays, Arrays], BlockOutputs]
# (rows of one expert, a tile of each of its arrays) -> their part of a sum over tiles, float32.
TileFunction = Callable[[Array, Arrays], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Along which axis the arrays of one block are cut; None for an array that is not.

    The axis must be one that no product of the function sums over.

    Attributes:
        rows: One axis per array of rows, without the dimension P: 1 is the width.
        weights: One axis per array of weights, without the dimension E.
        outs: As `rows`, for the rows out.
        sums: As `weights`, for the per-expert sums.
    """

    rows: tuple[int | None, ...] = ()
    weights: tuple[int | None, ...] = ()
    outs: tuple[int | None, ...] = ()
    sums: tuple[int | None, ...] = ()


class KernelOperand:
    """What a kernel gives a function in place of an array, and multiplies itself."""

    def multiply(self, subscripts: str, right: Any) -> Array:
        """Return what `product` does."""
        raise NotImplementedError


def lies_by_columns(array: Array) -> bool:
    """Return whether an array's matrices lie by columns in a TPU's memory.

    XLA chooses what needs less padding: rows, or columns, are filled up to whole lanes. A kernel
    takes arrays by rows, so one that lies by columns is copied first, unless it is transposed.

    Args:
        array: At least two axes.

    Example:
        >>> lies_by_columns(jnp.ones((256, 100))), lies_by_columns(jnp.ones((100, 256)))
        (True, False)
    """
    n_rows, n_columns = array.shape[-2:]
    by_rows = -(-n_columns // LANES) * LANES * n_rows
    by_columns = -(-n_rows // LANES) * LANES * n_columns
    return by_columns < by_rows


def product(subscripts: str, left: Any, right: Any) -> Array:
    """Multiply two arguments of a block function; the sum runs in float32.

    Args:
        subscripts: As of `jnp.einsum`: two axes each, and one that is summed over.
        left: Rows.
        right: Rows or weights.

    Returns:
        The product, or, inside the kernel of a GPU, the tile that a program computes.

    Example:
        >>> product("PD,DF->PF", jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
        [[3.0], [3.0]]
    """
    if isinstance(left, KernelOperand):
        return left.multiply(subscripts, right)
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)
