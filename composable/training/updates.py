"""Low-rank updates: a new generation of an expert that is its parent plus products of factors.

Training runs as for a low-rank body, on a backbone whose slots have the parent's matrices. So the
parent is frozen, there is optimiser state for the factors only, and at the first step the update
is the parent. Afterwards the factors are rounded to bfloat16, and the new tensors are *defined* as
the parent's plus their products, see `composable.files.delta.add_product`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from composable.files.delta import Factors, add_product
from composable.model.backbone import Backbone
from composable.model.body import MATRICES, Body


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
    """Return the factors of a trained low-rank body, in bfloat16.

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
            tensors[f"{name}.a"].astype(ml_dtypes.bfloat16),
            tensors[f"{name}.b"].astype(ml_dtypes.bfloat16),
        )
        for name in names
    }


def add_factors(tensors: Mapping[str, np.ndarray], factors: Factors) -> dict[str, np.ndarray]:
    """Return tensors plus the products of their factors; those without factors as they are."""
    return {
        name: add_product(array, *factors[name]) if name in factors else array
        for name, array in tensors.items()
    }
