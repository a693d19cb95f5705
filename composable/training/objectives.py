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

from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.model.layers import rms_norm
from composable.model.scout import Scout
from composable.training.data import TappedRows
from composable.training.loop import Objective

# Bits per nat; not by jnp, which would start jax before `start_processes` has run.
_BITS = 1.0 / math.log(2.0)
# Logits that are in memory at once, in numbers: 32 MiB. Smaller parts read the matrix more often.
_LOGITS: Final = 1 << 23
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
    log_prob_MC = scout(feature_MD)
    return -jnp.take_along_axis(log_prob_MC, classes_BT.reshape(-1, 1), axis=-1).mean()


@jax.custom_vjp
def unembedded_loss(x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the mean cross entropy of the logits `x w`, without all logits in memory at once.

    The gradient with respect to a token's logits is `softmax - one_hot`, known as soon as they are.
    So each part of the tokens is multiplied by `w` twice, forward and backward, and its logits are
    then dropped. There is no gradient with respect to `w`, which is frozen.

    Args:
        x_BTD: Output of the last norm.
        w_VD: The matrix that turns it into logits.
        targets_BT: The next token at each position.

    Example:
        >>> x_BTD, w_VD = jnp.zeros((2, 3, 5)), jnp.ones((4, 5))
        >>> round(float(unembedded_loss(x_BTD, w_VD, jnp.zeros((2, 3), int))), 4)  # ln 4
        1.3863
    """
    return _unembedded_loss(x_BTD, w_VD, targets_BT)[0]


def _unembedded_loss(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the loss and its gradient with respect to `x_BTD`."""
    n_tokens, n_positions = targets_BT.size, targets_BT.shape[1]
    wanted = min(n_positions, -(-n_tokens * len(w_VD) // _LOGITS))
    n_parts = next(n for n in range(wanted, n_positions + 1) if n_positions % n == 0)

    def run(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BTD, targets_BT = part
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD).astype(jnp.float32)
        log_total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        is_target_BTV = jnp.arange(len(w_VD)) == targets_BT[..., None]
        nats_BT = log_total_BT - jnp.where(is_target_BTV, logits_BTV, 0.0).sum(-1)
        slope_BTV = jnp.exp(logits_BTV - log_total_BT[..., None]) - is_target_BTV
        return nats_BT, slope_BTV.astype(w_VD.dtype) @ w_VD

    # Parts are of positions, so that the rows stay on the devices that hold them.
    nats, slope = jax.lax.map(run, (_split(x_BTD, n_parts), _split(targets_BT, n_parts)))
    return nats.mean(), jnp.moveaxis(slope, 0, 1).reshape(x_BTD.shape) / n_tokens


def _split(x_BT: jax.Array, n_parts: int) -> jax.Array:
    """Return an array whose first dimension is that of `n_parts` parts of the positions."""
    batch, n_positions, *rest = x_BT.shape
    parts = x_BT.reshape(batch, n_parts, n_positions // n_parts, *rest)
    return jnp.moveaxis(parts, 1, 0)


def _scale_slope(slope_BTD: jax.Array, given: Any) -> tuple[jax.Array, None, None]:
    """Return the gradients with respect to the arguments of `unembedded_loss`."""
    return (given * slope_BTD).astype(slope_BTD.dtype), None, None


unembedded_loss.defvjp(_unembedded_loss, _scale_slope)


def backbone_objective(graph: nnx.GraphDef[Any]) -> Objective:
    """Return the objective of a whole backbone with its own scout.

    Args:
        graph: Structure of the backbone; the trained tree is its parameters, the frozen one the
            rest (the class map).
    """

    def objective(
        params: nnx.State[Any, Any], rest: nnx.State[Any, Any], tokens_BU: jax.Array
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        backbone: Backbone = nnx.merge(graph, params, rest)
        inputs_BT, targets_BT = tokens_BU[:, :-1], tokens_BU[:, 1:]
        x_BTD, _ = backbone.trunk(inputs_BT)
        logits_BTV, _ = backbone.upper(x_BTD, backbone.own_feed_forward)
        loss = next_token_loss(logits_BTV, targets_BT)
        classes_BT = backbone.class_map[...][targets_BT]
        scout = scout_loss(backbone.scout, backbone.features(x_BTD), classes_BT)
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
        x_BTD, _ = backbone.trunk(tokens_BU[:, :-1])
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
    feed_forward = expert.body.feed_forward(backbone)
    h_BTD = x_BTD
    for layer in backbone.cfg.slots:

        def run(h_BTD: jax.Array, layer: int = layer) -> jax.Array:
            return backbone.run_layers((layer,), h_BTD, feed_forward)[0]

        h_BTD = jax.checkpoint(run, policy=_is_kept)(h_BTD)
    h_BTD = rms_norm(h_BTD, backbone.norm[...], backbone.cfg.norm_eps)
    loss = unembedded_loss(h_BTD, backbone.unembedding(), targets_BT)
    classes_BT = backbone.class_map[...][targets_BT]
    scout = scout_loss(expert.scout, backbone.features(x_BTD), classes_BT)
    return loss + scout, {"bits_per_token": loss * _BITS, "scout_bits": scout * _BITS}


def _is_kept(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Return whether a layer's backward pass keeps a result of its forward pass."""
    if primitive is not jax.lax.dot_general_p:
        return False
    (contracted, _), (batched, _) = params["dimension_numbers"]
    length = math.prod(operands[0].shape[axis] for axis in contracted)
    return not batched and length >= _KEPT_LENGTH
