"""Training objectives of backbones and experts; their scouts are trained in the same pass.

Every objective has the form (trained, frozen, batch) -> (loss in nats per token, figures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from composable.kernels import is_on_one_device, native_scout_loss, takes_native
from composable.model.backbone import Backbone
from composable.model.body import Body, Expert
from composable.model.causal_attention import ATTENTION
from composable.model.layers import GATED
from composable.model.scout import Scout
from composable.parallel import (
    count_batch_shards,
    gather_weights,
    keep_batch_split,
    platform_in_use,
)
from composable.training.class_loss import class_loss
from composable.training.data import TappedRows
from composable.training.layer_loop import (
    final_loss,
    needs_loop,
    run_layer_loop,
    run_trunk_loop,
    use_weights,
)
from composable.training.loop import Objective

# Bits per nat; not by jnp, which would start jax before `start_processes` has run.
_BITS = 1.0 / math.log(2.0)
# A product over at least this many numbers is kept for the backward pass of an expert. Products
# over a rank and all elementwise results are computed again, which takes little time.
_KEPT_LENGTH: Final = 48


def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the mean cross entropy in nats per token.

    Args:
        logits_BTV: Logits.
        targets_BT: The next token at each position.

    Example:
        >>> round(float(next_token_loss(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), int))), 4)  # ln 4
        1.3863
    """
    nats_BT: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return nats_BT.mean()


def scout_loss(scout: Scout, feature_BTD: jax.Array, classes_BT: jax.Array) -> jax.Array:
    """Return the mean negative log-probability of the next token's class, in nats.

    No gradient reaches the features: training a scout never changes the trunk.

    Args:
        scout: The scout.
        feature_BTD: Features of the trunk.
        classes_BT: Class of the token after each position.
    """
    # All rows as one matrix, as in `Body.feed_forward`.
    feature_MD = jax.lax.stop_gradient(feature_BTD).reshape(-1, feature_BTD.shape[-1])
    if jax.default_backend() != "cpu" or count_batch_shards(len(feature_BTD)) > 1:
        # Parts are for a CPU's caches, and devices would sum their gradients once for each.
        log_prob_MC = scout(feature_MD)
        return -jnp.take_along_axis(log_prob_MC, classes_BT.reshape(-1, 1), axis=-1).mean()
    weights = (scout.w_in, scout.b_in, scout.w_out, scout.b_out)
    if takes_native(platform_in_use(), jnp.float32, scout.width) and is_on_one_device():
        return native_scout_loss(feature_MD, *(x[...] for x in weights), classes_BT.ravel())
    hidden_BTW = scout.hidden(feature_MD).reshape(*classes_BT.shape, -1)
    # The bias as the weights of a unit that is always on.
    hidden_BTW = jnp.concatenate([hidden_BTW, jnp.ones_like(hidden_BTW[..., :1])], axis=-1)
    w_WC = jnp.concatenate([scout.w_out[...], scout.b_out[...][None]])
    return class_loss(hidden_BTW, w_WC.astype(jnp.float32), classes_BT)


def float32_masters(params: Any) -> Any:
    """Return parameters in float32, as they are trained whatever the dtype of activations is.

    A step of the optimiser is smaller than bfloat16 can add to a weight.

    Args:
        params: Tree of parameters.

    Example:
        >>> float32_masters({"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype
        dtype('float32')
    """
    return jax.tree.map(lambda param: param.astype(jnp.float32), params)


def backbone_objective(graph: nnx.GraphDef[Any]) -> Objective:
    """Return the objective of a whole backbone with its own scout.

    Args:
        graph: Structure of the backbone; the trained tree is its parameters, as float32 or in the
            dtype of its config, the frozen one the rest (the class map).
    """

    def objective(
        params: nnx.State[Any, Any], rest: nnx.State[Any, Any], tokens_BU: jax.Array
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        backbone: Backbone = nnx.merge(graph, params, rest)
        inputs_BT, targets_BT = tokens_BU[:, :-1], tokens_BU[:, 1:]
        if needs_loop(backbone.cfg, range(backbone.cfg.n_layers), *inputs_BT.shape):
            x_BTD = run_trunk_loop(backbone, inputs_BT)
            h_BTD = run_layer_loop(backbone, backbone.cfg.slots, x_BTD)
            loss = final_loss(backbone, h_BTD, targets_BT, is_trained=True)
        else:
            backbone = use_weights(backbone)
            x_BTD, _ = backbone.trunk(inputs_BT)
            logits_BTV, _ = backbone.upper(x_BTD, backbone.own_feed_forward)
            loss = next_token_loss(logits_BTV, targets_BT)
        classes_BT = backbone.class_map[...][targets_BT]
        scout = scout_loss(gather_weights(backbone.scout), backbone.features(x_BTD), classes_BT)
        return loss + scout, {"bits_per_token": loss * _BITS, "scout_bits": scout * _BITS}

    return objective


# One objective for experts of one structure, so that what is compiled for it is used again.
@lru_cache(maxsize=8)
def expert_objective(graph: nnx.GraphDef[Any]) -> Objective:
    """Return the objective of an expert: its body always on, the backbone frozen.

    Args:
        graph: Structure of an `Expert`; the trained tree is its parameters, the frozen one the
            backbone.
    """

    def objective(
        params: nnx.State[Any, Any], backbone: Backbone, tokens_BU: jax.Array
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        inputs_BT = tokens_BU[:, :-1]
        if needs_loop(backbone.cfg, backbone.cfg.slots, *inputs_BT.shape):
            x_BTD = run_trunk_loop(backbone, inputs_BT)
        else:
            x_BTD, _ = use_weights(backbone).trunk(inputs_BT)
        return _expert_loss(nnx.merge(graph, params), backbone, x_BTD, tokens_BU[:, 1:])

    return objective


@lru_cache(maxsize=8)
def tapped_objective(graph: nnx.GraphDef[Any]) -> Objective:
    """Return the objective of an expert on rows whose trunk was run before.

    Args:
        graph: As for `expert_objective`.
    """

    def objective(
        params: nnx.State[Any, Any], backbone: Backbone, rows: TappedRows
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        expert = nnx.merge(graph, params)
        return _expert_loss(expert, backbone, rows.x_BTD, rows.tokens_BU[:, 1:])

    return objective


def _expert_loss(
    expert: Expert, backbone: Backbone, x_BTD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Return the loss of body and scout above the tap, and figures."""
    cfg = backbone.cfg
    if needs_loop(cfg, cfg.slots, *targets_BT.shape):
        slots = [expert.body.slots[str(layer)] for layer in cfg.slots]
        h_BTD = run_layer_loop(backbone, cfg.slots, x_BTD, slots)
    else:
        h_BTD = _run_slots(expert.body, use_weights(backbone), x_BTD)
    loss = final_loss(backbone, h_BTD, targets_BT)
    classes_BT = backbone.class_map[...][targets_BT]
    scout = scout_loss(gather_weights(expert.scout), backbone.features(x_BTD), classes_BT)
    return loss + scout, {"bits_per_token": loss * _BITS, "scout_bits": scout * _BITS}


def _run_slots(body: Body, backbone: Backbone, x_BTD: jax.Array) -> jax.Array:
    """Return the residual stream after all slots; some of each layer's results are kept."""
    feed_forward = gather_weights(body).feed_forward(backbone)
    for layer in backbone.cfg.slots:

        def run(x_BTD: jax.Array, layer: int = layer) -> jax.Array:
            return backbone.run_layers((layer,), x_BTD, feed_forward)[0]

        x_BTD = keep_batch_split(jax.checkpoint(run, policy=_is_kept)(x_BTD))
    return x_BTD


def _is_kept(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Return whether a layer's backward pass keeps a result of its forward pass."""
    if params.get("name") in (ATTENTION, GATED):
        return True
    if primitive is not jax.lax.dot_general_p:
        return False
    (contracted, _), (batched, _) = params["dimension_numbers"]
    length = math.prod(operands[0].shape[axis] for axis in contracted)
    return not batched and length >= _KEPT_LENGTH
