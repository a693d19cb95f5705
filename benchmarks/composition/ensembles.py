"""Ensembles: every expert's path is run whole, and their predicted probabilities are mixed.

`all_paths` returns what every target costs every path; most methods are arithmetic on that. With
the scouts' share of the output a mixture needs whole distributions, so those rules run as one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.composition.methods import Slots, costs
from composable.model.backbone import Backbone
from composable.model.bank import entry_slots
from composable.model.body import MATRICES
from composable.model.composed import (
    Parts,
    fixed_feed_forward,
    mix_in_scouts,
    run_trunk_and_scouts,
    writing_state,
)
from composable.model.layers import swiglu
from composable.model.output_mixture import OutputMixtureState, empty_output_mixture
from composable.model.router import (
    NEVER,
    RouterState,
    track_record,
)


@jax.jit
def _all_paths(backbone: Backbone, stack: Slots, tokens_BT: Any, targets_BT: Any) -> jax.Array:
    first = backbone.cfg.tap
    x_BTD, _ = backbone.trunk(tokens_BT)

    def one(index: jax.Array) -> jax.Array:
        def run(layer: int, x_BTD: jax.Array) -> jax.Array:
            return swiglu(x_BTD, *(stack[layer - first][name][index] for name in MATRICES))

        return costs(backbone.upper(x_BTD, run)[0], targets_BT)

    return jnp.moveaxis(jax.lax.map(one, jnp.arange(stack[0]["w_gate"].shape[0])), 0, -1)


def all_paths(backbone: Backbone, stack: Slots) -> Callable[..., Any]:
    """Return the step that runs every path whole: costs of every target, shape BTE."""
    return lambda tokens, targets, _: (_all_paths(backbone, stack, tokens, targets), None)


def ensemble(cost_NTE: np.ndarray, log_weight_NTE: np.ndarray) -> np.ndarray:
    """Return what the targets cost a mixture of the paths' probabilities, shape NT."""
    return -np.logaddexp.reduce(log_weight_NTE - cost_NTE, axis=-1)


def posterior(cost_NTE: np.ndarray, discount: float, prior_E: np.ndarray) -> np.ndarray:
    """Return log weights of paths by what they really predicted before, discounted, NTE."""
    track_NE = np.zeros(cost_NTE.shape[::2])
    found = np.empty(cost_NTE.shape)
    for t in range(cost_NTE.shape[1]):
        score_NE = np.log(prior_E) + track_NE
        found[:, t] = score_NE - np.logaddexp.reduce(score_NE, axis=-1, keepdims=True)
        track_NE = discount * track_NE - cost_NTE[:, t]
    return found


class EnsembleRule(NamedTuple):
    """How BTM's ensemble weighs paths: by what each predicted before, discounted, and a prior."""

    discount: float
    backbone_prior: float | None  # None: the same for all paths


DISCOUNTS: Final = (1.0, 0.98, 0.95, 0.9, 0.85)


def ensemble_rules(backbone_prior: float) -> dict[str, EnsembleRule]:
    """Return the ensembles that are compared, by the end of their names.

    Args:
        backbone_prior: Safe mode's prior weight of the backbone's path.
    """
    return {
        f"{'-prior' if prior else ''} discount {discount}": EnsembleRule(discount, prior)
        for prior in (None, backbone_prior)
        for discount in DISCOUNTS
    }


class EnsembleState(NamedTuple):
    """What an ensemble carries along a document; K rules side by side."""

    router: RouterState
    track_KBE: jax.Array  # discounted log-likelihoods of the paths
    log_prob_EBV: jax.Array  # each path's prediction of the next token
    mixture: OutputMixtureState  # with K before B


def ensembles(parts: Parts, rules: Sequence[EnsembleRule]) -> Callable[..., Any]:
    """Return the step of BTM's ensembles with the scouts' share that safe mode has, shape BTK.

    Every path of the bank runs whole at every token. The scouts' share is the shipped one: the
    same pool, weighed by the same router.

    References:
        Li et al. 2022, arXiv:2208.03306, section 2.3 (ensembling by a posterior over domains).
    """
    # Entries without an expert predict nothing, so they get no weight.
    used_E = np.asarray(parts.bank.alive_E)
    prior_KE = np.stack([ensemble_prior(int(used_E.sum()), rule) for rule in rules])
    log_prior_KE = np.full((len(rules), len(used_E)), NEVER, np.float32)
    log_prior_KE[:, used_E] = np.log(prior_KE)
    discount_K = np.array([rule.discount for rule in rules], np.float32)
    return lambda tokens, targets, state: _ensembles(
        parts, log_prior_KE, discount_K, tokens, targets, state
    )


def ensemble_prior(n_paths: int, rule: EnsembleRule) -> np.ndarray:
    """Return the prior weight of every path, the backbone's first."""
    if rule.backbone_prior is None:
        return np.full(n_paths, 1 / n_paths)
    rest = (1 - rule.backbone_prior) / (n_paths - 1)
    return np.array([rule.backbone_prior] + [rest] * (n_paths - 1))


@jax.jit
def _ensembles(
    parts: Parts,
    log_prior_KE: jax.Array,
    discount_K: jax.Array,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    state: EnsembleState | None,
) -> tuple[jax.Array, EnsembleState]:
    n_rules, n_paths = log_prior_KE.shape
    batch = tokens_BT.shape[0]
    if state is None:
        empty = empty_output_mixture(batch, parts.interface.n_classes)
        state = EnsembleState(
            writing_state(parts, batch, is_decoding=False),
            jnp.zeros((n_rules, batch, n_paths)),
            jnp.zeros((n_paths, batch, parts.interface.vocab_size)),
            jax.tree.map(lambda x: jnp.broadcast_to(x, (n_rules, *x.shape)), empty),
        )
    trunk, router, _ = run_trunk_and_scouts(parts, tokens_BT, state.router, None)

    def run_path(index: jax.Array) -> jax.Array:
        feed_forward = fixed_feed_forward(parts, entry_slots(parts.bank, index))
        return jax.nn.log_softmax(parts.backbone.upper(trunk.x_BTD, feed_forward)[0])

    log_prob_EBTV = jax.lax.map(run_path, jnp.arange(n_paths))
    before_EBTV = jnp.concatenate([state.log_prob_EBV[:, :, None], log_prob_EBTV[:, :, :-1]], 2)
    own_EBT = jnp.take_along_axis(before_EBTV, tokens_BT[None, ..., None], axis=-1)[..., 0]
    started_B = state.router.started_B
    was_predicted_BT = jnp.ones(tokens_BT.shape, bool).at[:, 0].set(started_B)
    own_BTE = jnp.moveaxis(jnp.where(was_predicted_BT, own_EBT, 0.0), 0, -1)

    def score(rule: tuple[jax.Array, jax.Array, jax.Array, OutputMixtureState]) -> Any:
        log_prior_E, discount, track_BE, mixture = rule
        track_BTE = track_record(own_BTE, track_BE, discount)
        weight_BTE = jax.nn.log_softmax(log_prior_E + track_BTE)
        weight_EBT1 = jnp.moveaxis(weight_BTE, -1, 0)[..., None]
        mixed_BTV = jax.nn.logsumexp(weight_EBT1 + log_prob_EBTV, axis=0)
        mixed_BTV, mixture = mix_in_scouts(parts, mixed_BTV, trunk, started_B, mixture)
        return costs(mixed_BTV, targets_BT), track_BTE[:, -1], mixture

    rules = (log_prior_KE, discount_K, state.track_KBE, state.mixture)
    nll_KBT, track_KBE, mixture = jax.lax.map(score, rules)
    after = EnsembleState(router, track_KBE, log_prob_EBTV[:, :, -1], mixture)
    return jnp.moveaxis(nll_KBT, 0, -1), after


def demix_updating(cost_NTE: np.ndarray, decay: float = 0.3) -> np.ndarray:
    """Return log weights with DEMix's updating prior, shape NTE.

    The prior over domains is a moving average of posteriors along the document.

    References:
        Gururangan et al. 2022, arXiv:2108.05036, section 5.2 (updating prior; lambda = 0.3).
    """
    n_experts = cost_NTE.shape[-1]
    prior_NE = np.full(cost_NTE.shape[::2], 1 / n_experts)
    track_NE = np.zeros(cost_NTE.shape[::2])
    found = np.empty(cost_NTE.shape)
    for t in range(cost_NTE.shape[1]):
        score_NE = track_NE + np.log(prior_NE)
        found[:, t] = score_NE - np.logaddexp.reduce(score_NE, axis=-1, keepdims=True)
        track_NE = track_NE - cost_NTE[:, t]
        prior_NE = (1 - decay) * prior_NE + decay * np.exp(found[:, t])
    return found
