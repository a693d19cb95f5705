"""An expert as plain matrices by name, as methods of merging take them, and back.

A body's matrices are those that act in a slot; a low-rank body is added to the backbone's. A
scout's bias is the last row of its matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import make_expert
from composable.kernels import widen
from composable.merging.low_rank import factor_matrix
from composable.merging.updates import Matrices
from composable.model.body import MATRICES, LowRank, backbone_slot
from composable.model.config import DTYPE_NAMES
from composable.model.model import Pluggable
from composable.model.tensors import from_tensors
from composable.packaging.manifests.manifest import Manifest


def to_matrices(loaded: LoadedBackbone, expert: Pluggable) -> Matrices:
    """Return the matrices of an expert, as they act in a slot, in float32.

    Args:
        loaded: Its backbone.
        expert: The expert.
    """
    body = expert.body
    found: Matrices = {}
    for layer in loaded.interface.slots:
        slot = body.slots[str(layer)]
        for name in MATRICES:
            w_DF = (
                np.asarray(getattr(slot, name)[...], np.float32)
                if body.kind == "ffn"
                else _own(loaded, layer, name) + _product(getattr(slot, name))
            )
            found[f"body.slots.{layer}.{name}"] = w_DF
    scout = expert.scout
    for w, b in (("w_in", "b_in"), ("w_out", "b_out")):
        w_DF, b_F = (np.asarray(getattr(scout, part)[...], np.float32) for part in (w, b))
        found[f"scout.{w}"] = np.concatenate([w_DF, b_F[None]])
    return found


def from_matrices(
    loaded: LoadedBackbone, manifest: Manifest, matrices: Mapping[str, np.ndarray]
) -> Pluggable:
    """Return the expert that has the given matrices, as close as its kind of body can.

    Args:
        loaded: Its backbone.
        manifest: Its manifest: kind, rank and dtype of the body.
        matrices: As `to_matrices` returns them. For a low-rank body the change of the backbone's
            matrix is compressed to the body's rank.
    """
    dtype, tensors = jnp.dtype(DTYPE_NAMES[manifest.body.dtype]), {}
    for layer in loaded.interface.slots:
        for name in MATRICES:
            path = f"body.slots.{layer}.{name}"
            if manifest.body.rank is None:
                tensors[path] = matrices[path].astype(dtype)
            else:
                change_DF = matrices[path] - _own(loaded, layer, name)
                a_DR, b_RF = factor_matrix(change_DF, manifest.body.rank)
                tensors[f"{path}.a"], tensors[f"{path}.b"] = a_DR.astype(dtype), b_RF.astype(dtype)
    for w, b in (("w_in", "b_in"), ("w_out", "b_out")):
        tensors[f"scout.{w}"] = matrices[f"scout.{w}"][:-1]
        tensors[f"scout.{b}"] = matrices[f"scout.{w}"][-1]
    blank = nnx.eval_shape(lambda: make_expert(loaded.backbone, manifest, None))
    expert = from_tensors(blank, tensors)
    return Pluggable(name=manifest.name, body=expert.body, scout=expert.scout, key=1)


def _own(loaded: LoadedBackbone, layer: int, name: str) -> np.ndarray:
    """Return the backbone's own matrix."""
    return np.asarray(widen(backbone_slot(loaded.backbone, layer)[name]), np.float32)


def _product(low_rank: LowRank) -> np.ndarray:
    a_DR, b_RF = (np.asarray(part[...], np.float32) for part in (low_rank.a, low_rank.b))
    product_DF: np.ndarray = a_DR @ b_RF
    return product_DF
