"""Low rank: the sum of updates, compressed again by a truncated SVD.

The factors of low-rank bodies one beside the other, `[a_1 | a_2] [b_1; b_2]`, are those of the sum
`a_1 b_1 + a_2 b_2`. Its truncated SVD has the rank of one body again.

References:
    Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    Gargiulo et al. 2025, arXiv:2412.00081 (updates truncated to their largest singular vectors).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from composable.merging.updates import Matrices


def factor_matrix(w_DF: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of a given rank whose product is closest to a matrix in Frobenius norm.

    The square roots of the singular values go to both factors, so that training can go on from them
    at one rate.

    Args:
        w_DF: The matrix.
        rank: Rank of the result, filled up with zeros where the matrix has less.

    Example:
        >>> a_DR, b_RF = factor_matrix(np.ones((3, 2), np.float32), rank=1)
        >>> (a_DR @ b_RF).round(6).tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    # The singular vectors of the shorter side are the eigenvectors of its Gram matrix, which takes
    # a tenth of the time of an SVD. In float64 what is lost is below the rounding of float32.
    is_wide = w_DF.shape[0] <= w_DF.shape[1]
    wide_DF = (w_DF if is_wide else w_DF.T).astype(np.float64)
    square_R, u_DR = np.linalg.eigh(wide_DF @ wide_DF.T)
    kept = min(rank, len(square_R))
    u_DR = u_DR[:, ::-1][:, :kept]
    singular_R = np.sqrt(np.maximum(square_R[::-1][:kept], 0))
    root_R = np.sqrt(np.maximum(singular_R, np.finfo(np.float64).tiny))
    more = rank - kept
    left_DR = np.pad(u_DR * root_R, ((0, 0), (0, more))).astype(np.float32)
    right_RF = np.pad((u_DR.T @ wide_DF) / root_R[:, None], ((0, more), (0, 0))).astype(np.float32)
    return (left_DR, right_RF) if is_wide else (right_RF.T, left_DR.T)


def truncate(update: Mapping[str, np.ndarray], share: float) -> Matrices:
    """Return an update without its smaller singular values.

    Args:
        update: The sum of the updates of all sides.
        share: Share of singular values that every matrix keeps, in (0, 1]; one at least.

    References:
        Gargiulo et al. 2025, arXiv:2412.00081, section 3: updates are close to low rank, and what
        is cut off is where they interfere.

    Example:
        >>> truncate({"w": np.diag([3.0, 1.0])}, share=0.5)["w"].round(6).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    merged = {}
    for name, update_DF in update.items():
        a_DR, b_RF = factor_matrix(update_DF, max(1, round(share * min(update_DF.shape))))
        merged[name] = a_DR @ b_RF
    return merged
