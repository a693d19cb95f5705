"""Statistics of a matrix on text: what a side can publish instead of its text.

For every matrix of an expert: the Gram matrix of its inputs, the diagonal of the Fisher
information and the mean gradient of the loss, each sketched so that all together are a few percent
of the matrix. With them others can weight the matrix when they merge (`fisher.py`, `regmean.py`)
and predict what a change of it does to the loss on that text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from composable.interface.signature import GRADIENT_RANK, GRAM_RANK


@dataclass(frozen=True)
class MatrixStatistics:
    """Sketched statistics of one matrix at an expert's own weights, per token of its text.

    Args:
        gram_DR: Factor of the Gram matrix of inputs, `E[x x^T] ~ gram gram^T + diag(rest)`.
        rest_D: What the factor leaves of the diagonal.
        row_D: The diagonal Fisher information summed over columns.
        column_F: The same summed over rows.
        gradient_DR: Left factor of the mean gradient of the loss, in nats.
        gradient_RF: Its right factor.
    """

    gram_DR: np.ndarray
    rest_D: np.ndarray
    row_D: np.ndarray
    column_F: np.ndarray
    gradient_DR: np.ndarray
    gradient_RF: np.ndarray

    @classmethod
    def of(
        cls,
        gram_DD: np.ndarray,
        gradient_DF: np.ndarray,
        row_D: np.ndarray,
        column_F: np.ndarray,
    ) -> Self:
        """Sketch the statistics of a matrix.

        Args:
            gram_DD: Mean over tokens of `x x^T` of its inputs x.
            gradient_DF: Mean gradient of the loss with respect to it.
            row_D: Mean over tokens of `x_d^2 |g|^2`, with g the gradient of its outputs.
            column_F: Mean over tokens of `g_f^2 |x|^2`.

        Example:
            >>> found = MatrixStatistics.of(np.eye(2), np.ones((2, 3)), np.ones(2), np.ones(3))
            >>> found.gram().round(6).tolist()
            [[1.0, 0.0], [0.0, 1.0]]
        """
        value_D, vector_DD = np.linalg.eigh(gram_DD.astype(np.float64))
        top = np.argsort(value_D)[::-1][:GRAM_RANK]
        gram_DR = vector_DD[:, top] * np.sqrt(np.maximum(value_D[top], 0))
        rest_D = np.maximum(np.diagonal(gram_DD) - (gram_DR**2).sum(axis=1), 0)
        u_DR, singular_R, v_RF = np.linalg.svd(gradient_DF, full_matrices=False)
        kept = singular_R[:GRADIENT_RANK]
        gradient_DR, gradient_RF = u_DR[:, :GRADIENT_RANK] * kept, v_RF[:GRADIENT_RANK]
        return cls(gram_DR, rest_D, row_D, column_F, gradient_DR, gradient_RF)

    def gram(self) -> np.ndarray:
        """Return the Gram matrix of inputs that the sketch stands for, shape DD, float64."""
        gram_DR = self.gram_DR.astype(np.float64)
        gram_DD: np.ndarray = gram_DR @ gram_DR.T + np.diag(self.rest_D.astype(np.float64))
        return gram_DD

    def fisher(self) -> np.ndarray:
        """Return the diagonal Fisher information, shape DF: the product of its two marginals.

        References:
            Shazeer and Stern 2018, arXiv:1804.04235, algorithm 1: of all products of one row and
            one column, this one has the least generalised Kullback-Leibler divergence.
        """
        total = float(self.row_D.sum()) or 1.0
        fisher_DF: np.ndarray = np.outer(self.row_D, self.column_F) / total
        return fisher_DF

    def predict_change(self, change_DF: np.ndarray) -> float:
        """Return the predicted change of the loss, in nats per token, if the matrix changes.

        The Taylor series to second order around the expert's own weights, with the curvature of
        K-FAC whose second factor is diagonal: `<grad, U> + 1/2 sum_f c_f U_f^T E[x x^T] U_f`, where
        `c_f = E[g_f^2]`. Without the weights `c` the second term is RegMean's regression error.

        Args:
            change_DF: What is added to the expert's own matrix.

        References:
            Martens and Grosse 2015, arXiv:1503.05671, section 3 (E[xx^T] and E[gg^T] as factors).

        Example:
            >>> gradient_DF, twice = np.zeros((2, 1)), np.full(1, 2.0)
            >>> found = MatrixStatistics.of(np.eye(2), gradient_DF, np.ones(2), twice)
            >>> round(found.predict_change(np.array([[1.0], [0.0]])), 6)  # 1/2 c |U|^2, c = 2 / 2
            0.5
        """
        return sum(self.predict_terms(change_DF))

    def predict_terms(self, change_DF: np.ndarray) -> tuple[float, float]:
        """Return the two terms of `predict_change`: of first and of second order.

        Args:
            change_DF: What is added to the expert's own matrix.
        """
        first = float(np.sum((self.gradient_DR.T @ change_DF) * self.gradient_RF))
        return first, 0.5 * float(self._input_norms(change_DF) @ self._sensitivity())

    def regression_error(self, change_DF: np.ndarray) -> float:
        """Return the mean square of what a change adds to the matrix's outputs, `E|x U|^2`.

        Args:
            change_DF: What is added to the expert's own matrix.

        References:
            Jin et al. 2023, arXiv:2212.09849, equation 1.

        Example:
            >>> found = MatrixStatistics.of(np.eye(2), np.zeros((2, 1)), np.ones(2), np.ones(1))
            >>> round(found.regression_error(np.array([[3.0], [4.0]])), 6)
            25.0
        """
        return float(self._input_norms(change_DF).sum())

    def _input_norms(self, change_DF: np.ndarray) -> np.ndarray:
        """Return `E[(x U)_f^2]` of every output."""
        seen_RF = self.gram_DR.T @ change_DF
        norm_F: np.ndarray = (seen_RF**2).sum(axis=0) + self.rest_D @ change_DF**2
        return norm_F

    def _sensitivity(self) -> np.ndarray:
        """Return `E[g_f^2]`: the column sums of the Fisher information over the inputs' norm."""
        norm = float((self.gram_DR**2).sum() + self.rest_D.sum()) or 1.0
        sensitivity_F: np.ndarray = self.column_F / norm
        return sensitivity_F


def sum_terms(
    statistics: Mapping[str, MatrixStatistics],
    own: Mapping[str, np.ndarray],
    merged: Mapping[str, np.ndarray],
) -> float:
    """Return the sum of the sizes of all terms of the predicted change, in nats per token.

    Terms of opposite signs nearly cancel in the predicted change, but what the series leaves out
    is as large as terms are, not as their sum is.

    Args:
        statistics: Of the side, by matrix.
        own: The side's matrices.
        merged: The matrices that would replace them.

    Example:
        >>> found = MatrixStatistics.of(np.eye(1), -np.ones((1, 1)), np.ones(1), np.ones(1))
        >>> own, merged = {"w": np.zeros((1, 1))}, {"w": np.ones((1, 1))}
        >>> round(predict_changes({"w": found}, own, merged)["w"], 6)  # -1 + 1/2
        -0.5
        >>> round(sum_terms({"w": found}, own, merged), 6)
        1.5
    """
    return sum(
        abs(term)
        for name, found in statistics.items()
        for term in found.predict_terms(merged[name] - own[name])
    )


def predict_changes(
    statistics: Mapping[str, MatrixStatistics],
    own: Mapping[str, np.ndarray],
    merged: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Return the predicted change of a side's loss by matrix, in nats per token.

    Args:
        statistics: Of the side, by matrix.
        own: The side's matrices.
        merged: The matrices that would replace them.

    Example:
        >>> found = MatrixStatistics.of(np.eye(2), np.zeros((2, 1)), np.ones(2), np.ones(1))
        >>> predict_changes({"w": found}, {"w": np.ones((2, 1))}, {"w": np.ones((2, 1))})
        {'w': 0.0}
    """
    return {
        name: found.predict_change(merged[name] - own[name]) for name, found in statistics.items()
    }
