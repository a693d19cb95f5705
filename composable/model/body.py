"""Bodies: the parameters of an expert that do the work in the slots.

Both kinds start as the backbone's own feed-forward, so an untrained expert changes nothing.
`merged` gives every kind the one form that the bank stacks: the full matrices of each slot.
"""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp
from flax import nnx

from composable.errors import ModelError
from composable.interface import BodyKind
from composable.interface.contract import SLOT_DIMS
from composable.kernels import Matrix, widen
from composable.model.backbone import Backbone, FeedForwardFn, Layer
from composable.model.config import DTYPE_NAMES
from composable.model.initial import draw
from composable.model.layers import changed_swiglu, swiglu
from composable.model.scout import Scout

MATRICES: Final = tuple(SLOT_DIMS)
# Matrix name -> matrix, for one slot.
SlotMatrices = dict[str, Matrix]
# Matrix name -> factors `a` and `b` of a low-rank change, for one slot.
SlotChanges = dict[str, tuple[jax.Array, jax.Array]]


class FullSlot(nnx.Module):
    """The three matrices of a SwiGLU block, replacing the backbone's."""

    def __init__(self, matrices: SlotMatrices) -> None:
        for name, dims in SLOT_DIMS.items():
            matrix = jnp.asarray(widen(matrices[name]), jnp.float32)
            setattr(self, name, nnx.Param(matrix, dims=dims))


class LowRank(nnx.Module):
    """A change `a b` of rank R to one matrix; `b` starts at zero.

    References:
        Hu et al. 2021, arXiv:2106.09685, with the scale folded into `b`.
    """

    def __init__(
        self, shape: tuple[int, ...], dims: str, rank: int, *, rngs: nnx.Rngs | None
    ) -> None:
        rows, columns = shape
        initial = draw(rngs, (rows, rank), rows**-0.5)
        self.a = nnx.Param(initial, dims=dims[0] + "R")
        self.b = nnx.Param(jnp.zeros((rank, columns)), dims="R" + dims[1])


class LowRankSlot(nnx.Module):
    """A low-rank change to each of a slot's three matrices."""

    def __init__(self, matrices: SlotMatrices, rank: int, *, rngs: nnx.Rngs | None) -> None:
        for name, dims in SLOT_DIMS.items():
            setattr(self, name, LowRank(matrices[name].shape, dims, rank, rngs=rngs))


class Body(nnx.Module):
    """The slots of an expert.

    Args:
        backbone: The backbone whose feed-forward blocks it starts from.
        kind: "ffn" replaces them, "lora" changes them by a product of rank `rank`.
        rank: Rank R of a "lora" body; None for "ffn".
        rngs: Source of the initial weights; only "lora" draws any. None where only shapes are
            needed.

    Raises:
        ModelError: For an unknown kind, a rank with "ffn", or no rank with "lora".
    """

    def __init__(
        self, backbone: Backbone, kind: BodyKind, rank: int | None = None, *, rngs: nnx.Rngs | None
    ) -> None:
        if kind not in ("ffn", "lora"):
            raise ModelError(f"{kind!r} is not a body kind (ffn, lora)", where="body.kind")
        if (rank is None) != (kind == "ffn"):
            raise ModelError(f"rank {rank!r} does not go with kind {kind!r}", where="body.rank")
        self.kind, self.rank = kind, rank or 0
        own = {layer: backbone_slot(backbone, layer) for layer in backbone.cfg.slots}
        self.slots = nnx.Dict(
            {
                str(layer): FullSlot(matrices)
                if rank is None
                else LowRankSlot(matrices, rank, rngs=rngs)
                for layer, matrices in own.items()
            }
        )

    def merged(self, backbone: Backbone, layer: int) -> dict[str, jax.Array]:
        """Return the full matrices of one slot, in the dtype that the backbone computes in."""
        slot, own = self.slots[str(layer)], backbone_slot(backbone, layer)
        if self.kind == "ffn":
            return {name: getattr(slot, name)[...].astype(own[name].dtype) for name in MATRICES}
        changes = {name: getattr(slot, name).a[...] @ getattr(slot, name).b[...] for name in own}
        return {name: (widen(own[name]) + changes[name]).astype(own[name].dtype) for name in own}

    def changes(self, backbone: Backbone, layer: int, rank: int) -> SlotChanges:
        """Return the factors of one slot of a low-rank body, in the backbone's dtype.

        Args:
            backbone: The frozen backbone.
            layer: The slot's layer.
            rank: Rank to fill up to, with zeros.
        """
        slot, dtype = self.slots[str(layer)], DTYPE_NAMES[backbone.cfg.dtype]
        more = rank - self.rank

        def pad(low: LowRank) -> tuple[jax.Array, jax.Array]:
            a = jnp.pad(low.a[...], ((0, 0), (0, more)))
            return a.astype(dtype), jnp.pad(low.b[...], ((0, more), (0, 0))).astype(dtype)

        return {name: pad(getattr(slot, name)) for name in MATRICES}

    def feed_forward(self, backbone: Backbone) -> FeedForwardFn:
        """Return the function to run in every slot when this body is active at every token.

        A low-rank body is run as `x w + (x a) b`: the same sum as in `merged`, but the gradient
        with respect to the large product `a b` is never formed, which is a fifth of a step.

        Either kind runs on the tokens of all rows as one matrix. The gradient of a weight sums over
        tokens: over one axis XLA's CPU backend runs that as a fast product of matrices, over two as
        a slow one, which took twice as long for a whole low-rank block.
        """
        return lambda layer, x_BTD: run_slot(
            self.slots[str(layer)], backbone_slot(backbone, layer), x_BTD
        )


class Expert(nnx.Module):
    """A body and its scout: what a contributor trains.

    Args:
        backbone: The frozen backbone.
        kind: Kind of the body.
        rank: Rank of a "lora" body.
        scout_width: Hidden width of the scout.
        rngs: Source of the initial weights; None where only shapes are needed.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        kind: BodyKind,
        scout_width: int,
        rank: int | None = None,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.body = Body(backbone, kind, rank, rngs=rngs)
        n_classes = backbone.scout.b_out[...].shape[0]
        self.scout = Scout(backbone.cfg.d_model, scout_width, n_classes, rngs=rngs)


def run_slot(slot: FullSlot | LowRankSlot, own: SlotMatrices, x_BTD: jax.Array) -> jax.Array:
    """Return what one slot of a body makes of the tokens of all rows.

    Args:
        slot: The body's slot.
        own: The backbone's matrices of the same layer.
        x_BTD: Input of the layer's feed-forward.
    """
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    if isinstance(slot, FullSlot):
        matrices = [getattr(slot, name)[...].astype(own[name].dtype) for name in MATRICES]
        return swiglu(x_MD, *matrices).reshape(x_BTD.shape)

    lows: dict[str, LowRank] = {name: getattr(slot, name) for name in MATRICES}
    changes = {
        name: (low.a[...].astype(x_MD.dtype), low.b[...].astype(x_MD.dtype))
        for name, low in lows.items()
    }
    return changed_swiglu(x_MD, own, changes).reshape(x_BTD.shape)


def backbone_slot(backbone: Backbone, layer: int) -> SlotMatrices:
    """Return the backbone's own matrices of one slot."""
    return layer_slot(backbone.layers[layer])


def layer_slot(layer: Layer) -> SlotMatrices:
    """Return a layer's own matrices, as `backbone_slot` does."""
    return {name: getattr(layer.ffn, name)[...] for name in MATRICES}
