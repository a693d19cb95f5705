"""Muon's polynomials of CPUs in a native kernel: half of each symmetric product, no matrix copied.

A program calls it once for all matrices, whatever their shapes, which threads take one by one. XLA
compiles a loop for each shape, and multiplies one pair of matrices at a time with all threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from composable.kernels.native import ORTHOGONALIZE


def native_orthogonalize(
    matrices: Sequence[jax.Array], coefficients_PC: jax.Array, n_blocks: Sequence[int]
) -> list[jax.Array]:
    """Return matrices with the singular vectors of others and singular values near 1.

    Args:
        matrices: The others, of any shapes.
        coefficients_PC: Coefficients of odd polynomials of degree 5, which are composed.
        n_blocks: Number of blocks that each matrix is cut into along its shorter side, which it
            divides; every block is a matrix of its own.

    References:
        Amsel et al. 2025, arXiv:2505.16932, algorithm 1.

    Example:
        >>> matrices = [jnp.ones((2, 3)), jnp.ones((5, 4))]
        >>> orthogonalize = lambda *xs: native_orthogonalize(*xs, n_blocks=[1, 2])
        >>> found = jax.eval_shape(orthogonalize, matrices, jnp.ones((4, 3)))
        >>> [x.shape for x in found]
        [(2, 3), (5, 4)]
    """
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in matrices]
    in_place = {1 + i: i for i in range(len(results))}
    call = jax.ffi.ffi_call(ORTHOGONALIZE, results, input_output_aliases=in_place)
    return list(call(coefficients_PC, *matrices, n_blocks=np.array(n_blocks, np.int64)))
