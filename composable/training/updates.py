"""Low-rank updates: a new generation of an expert that is its parent plus products of factors.

Training runs as for a low-rank body, on a backbone whose slots have the parent's matrices. So the
parent is frozen, there is optimiser state for the factors only, and at the first step the update is
the parent. The scout, which is small, is trained in full.

Afterwards factors are rounded to a few bits, and the new tensors are *defined* as the parent's plus
their products, see `composable.files.delta.add_product`. The change of a scout's matrix is rounded
alike: it is the product of itself and an identity, which takes next to no room in a delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from composable.files.delta import Factors, add_product
from composable.model.backbone import Backbone
from composable.model.body import MATRICES, Body

# Significant bits of every number of a factor: more take more bytes and gained nothing.
FACTOR_BITS: Final = 2
# The same for the change of a scout, whose loss is more sensitive: two bits lost most of its gain.
SCOUT_BITS: Final = 5


def place_parent(backbone: Backbone, parent: Body) -> Backbone:
    """Return a backbone with the matrices of a full body in its slots.

    Args:
        backbone: The backbone; left unchanged.
        parent: The body, of kind "ffn".
    """
    graph, state = nnx.split(backbone)
    placed: Backbone = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    for layer in placed.cfg.slots:
        matrices = parent.merged(backbone, layer)
        for name in MATRICES:
            getattr(placed.layers[layer].ffn, name).set_value(jnp.asarray(matrices[name]))
    return placed


def find_factors(tensors: Mapping[str, np.ndarray]) -> Factors:
    """Return the factors of a trained low-rank body, rounded.

    Args:
        tensors: Its tensors, by name.

    Example:
        >>> low = {"w_in.a": np.ones((4, 2)), "w_in.b": np.ones((2, 3))}
        >>> [factor.shape for factor in find_factors(low)["w_in"]]
        [(4, 2), (2, 3)]
    """
    names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    return {
        name: (
            round_factor(tensors[f"{name}.a"], FACTOR_BITS),
            round_factor(tensors[f"{name}.b"], FACTOR_BITS),
        )
        for name in names
    }


def find_changes(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> Factors:
    """Return the changes of a scout's matrices as factors: the rounded change and an identity.

    Args:
        before: The tensors of the parent.
        after: The trained ones; those that are not matrices get no factors.

    Example:
        >>> before = {"w_in": np.zeros((2, 3), np.float32)}
        >>> a_DR, b_RF = find_changes(before, {"w_in": np.ones((2, 3), np.float32)})["w_in"]
        >>> a_DR.tolist(), b_RF.tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    """
    factors = {}
    for name, new in after.items():
        if new.ndim == 2:
            change = round_factor(new - before[name], SCOUT_BITS)
            identity = np.eye(min(new.shape), dtype=ml_dtypes.bfloat16)
            is_wide = new.shape[0] <= new.shape[1]
            factors[name] = (identity, change) if is_wide else (change, identity)
    return factors


def round_factor(array: np.ndarray, n_bits: int) -> np.ndarray:
    """Return a factor in bfloat16, every number rounded to some significant bits.

    Its numbers then have few different bytes, which is what compresses in a delta.

    Args:
        array: The factor.
        n_bits: How many, at most the 8 of bfloat16.

    Example:
        >>> round_factor(np.array([0.9, 1.1, 1.3, -5.0]), 2).tolist()
        [1.0, 1.0, 1.5, -4.0]
    """
    mantissa, exponent = np.frexp(array.astype(np.float32))
    whole = np.rint(np.ldexp(mantissa, n_bits))
    return np.asarray(np.ldexp(whole, exponent - n_bits), ml_dtypes.bfloat16)


def add_factors(tensors: Mapping[str, np.ndarray], factors: Factors) -> dict[str, np.ndarray]:
    """Return tensors plus the products of their factors; those without factors as they are."""
    return {
        name: add_product(array, *factors[name]) if name in factors else array
        for name, array in tensors.items()
    }
