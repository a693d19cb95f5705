"""Large models: their layers as one loop, whose weights are gathered and activations made on use.

A loop compiles one layer instead of all, holds the gathered weights of one, and keeps of each the
residual stream before it and the result of its attention. Everything else is computed again for the
gradient: a third of the forward pass's work at most. Nothing changes in how weights are stored:
they are stacked within the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from composable.model.backbone import Backbone
from composable.model.body import FullSlot, LowRankSlot, layer_slot, run_slot
from composable.model.causal_attention import ATTENTION
from composable.model.config import DTYPE_NAMES, BackboneConfig
from composable.model.layers import place_tokens, rms_norm
from composable.parallel import count_batch_shards, gather_weights, keep_batch_split
from composable.training.unembedding import unembedded_loss

_T = TypeVar("_T")
# Bytes of weights and of activations for the gradient that a device holds at once, beyond which
# the layers run in a loop. Less fits any device, and is faster without.
_MOST_BYTES: Final = 4 << 30


def needs_loop(cfg: BackboneConfig, layers: Sequence[int], n_rows: int, n_positions: int) -> bool:
    """Return whether a step is too large to hold all that trained layers keep for the gradient.

    Args:
        cfg: The model.
        layers: Indices of the layers that a gradient goes through.
        n_rows: Rows of the batch over all devices.
        n_positions: Positions of a row.
    """
    n_tokens = n_rows // count_batch_shards(n_rows) * n_positions
    # Of a token: what norms, attention and feed-forward read, and a row of attention's scores.
    kept = 8 * cfg.d_model + 4 * cfg.d_ff + cfg.n_heads * n_positions
    attention = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + cfg.n_kv_heads)
    weights = attention + 3 * cfg.d_model * cfg.d_ff
    width = jnp.dtype(DTYPE_NAMES[cfg.dtype]).itemsize
    return len(layers) * (n_tokens * kept + weights) * width > _MOST_BYTES


def use_weights(backbone: Backbone) -> Backbone:
    """Return a model whose weights are as a device multiplies with them.

    They are gathered from the devices that share them, and have the dtype of activations, whatever
    that of the masters is. Scouts always compute in float32.

    Args:
        backbone: The model.
    """
    used = cast_weights(backbone, backbone.cfg)
    used.scout = backbone.scout
    return gather_weights(used)


def cast_weights(tree: _T, cfg: BackboneConfig) -> _T:
    """Return weights in the dtype of the model's activations; whole numbers stay as they are.

    Args:
        tree: Tree of weights.
        cfg: The model.
    """

    def cast(x: jax.Array) -> jax.Array:
        is_weight = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(DTYPE_NAMES[cfg.dtype]) if is_weight else x

    tree = jax.tree.map(cast, tree)
    return tree


def run_trunk_loop(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    """Return the residual stream at the tap, shape BTD, as `Backbone.trunk` does.

    Args:
        backbone: The model; its weights may have a wider dtype than its activations.
        tokens_BT: Token ids.
    """
    w_VD = cast(jax.Array, gather_weights(backbone.embed)[...])  # none is quantized in training
    # Cast after the look-up: a frequent token's gradient is a sum over many positions.
    x_BTD = keep_batch_split(cast_weights(w_VD[tokens_BT], backbone.cfg))
    x_BTD = run_layer_loop(backbone, range(backbone.cfg.tap), x_BTD)
    isolated_BTD: jax.Array = jax.lax.optimization_barrier(x_BTD)
    return isolated_BTD


def final_loss(
    backbone: Backbone, h_BTD: jax.Array, targets_BT: jax.Array, *, is_trained: bool = False
) -> jax.Array:
    """Return the loss of the last layer's output, in nats per token.

    Args:
        backbone: The model.
        h_BTD: Residual stream after the last layer.
        targets_BT: The next token at each position.
        is_trained: Whether the backbone is trained.
    """
    cfg = backbone.cfg
    norm, w = backbone.norm, backbone.embed if cfg.is_tied else backbone.unembed
    norm, w = gather_weights(cast_weights((norm, w), cfg))
    h_BTD = rms_norm(h_BTD, norm[...], cfg.norm_eps)
    w_VD = cast(jax.Array, w[...])
    return unembedded_loss(h_BTD, w_VD, targets_BT, is_trained=is_trained)


def run_layer_loop(
    backbone: Backbone,
    layers: Sequence[int],
    x_BTD: jax.Array,
    slots: Sequence[FullSlot | LowRankSlot] | None = None,
) -> jax.Array:
    """Run some layers of a backbone, with a body's slots in the place of their feed-forward.

    Args:
        backbone: The model; its weights may have a wider dtype than its activations.
        layers: Indices of the layers.
        x_BTD: Residual stream.
        slots: The slot of each layer; by default the backbone's own feed-forward blocks run.

    Returns:
        The residual stream, shape BTD.
    """
    modules = [
        nnx.List([backbone.layers[layer], *([] if slots is None else [slots[i]])])
        for i, layer in enumerate(layers)
    ]
    if not modules:
        return x_BTD
    graph = nnx.graphdef(modules[0])
    states = [cast_weights(nnx.state(module), backbone.cfg) for module in modules]
    stacked = jax.tree.map(lambda *weights: jnp.stack(weights), *states)

    positions = place_tokens(backbone.cfg, x_BTD.shape[1])

    def run(x_BTD: jax.Array, state: Any) -> tuple[jax.Array, None]:
        layer, *slot = nnx.merge(graph, gather_weights(state))

        def feed_forward(x_BTD: jax.Array) -> jax.Array:
            return run_slot(slot[0], layer_slot(layer), x_BTD) if slot else layer.ffn(x_BTD)

        x_BTD, _ = layer(keep_batch_split(x_BTD), feed_forward, positions)
        return keep_batch_split(x_BTD), None

    policy = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    run_again = jax.checkpoint(run, policy=policy, prevent_cse=False)
    x_BTD, _ = jax.lax.scan(run_again, x_BTD, stacked)
    return x_BTD
