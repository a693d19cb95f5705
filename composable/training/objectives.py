"""Training objectives of backbones and experts; their scouts are trained in the same pass.

Every objective has the form (trained, frozen, batch) -> (loss in nats per token, figures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.model.scout import Scout
from composable.training.data import TappedRows
from composable.training.loop import Objective

# Bits per nat; not by jnp, which would start jax before `start_processes` has run.
_BITS = 1.0 / math.log(2.0)


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
    log_prob_BTC = scout(jax.lax.stop_gradient(feature_BTD))
    return -jnp.take_along_axis(log_prob_BTC, classes_BT[..., None], axis=-1).mean()


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
    logits_BTV, _ = backbone.upper(x_BTD, expert.body.feed_forward(backbone))
    loss = next_token_loss(logits_BTV, targets_BT)
    classes_BT = backbone.class_map[...][targets_BT]
    scout = scout_loss(expert.scout, backbone.features(x_BTD), classes_BT)
    return loss + scout, {"bits_per_token": loss * _BITS, "scout_bits": scout * _BITS}
