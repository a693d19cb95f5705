"""Safe mode: runs whole paths and mixes their output probabilities by how well each predicted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from composable.model.bank import entry_slots
from composable.model.body import SlotChanges, SlotMatrices
from composable.model.chunks import Length, take_last
from composable.model.composed import (
    Caches,
    Parts,
    TrunkPass,
    empty_caches,
    fixed_feed_forward,
    log_prior_of,
    mix_in_scouts,
    run_trunk_and_scouts,
    split_documents,
    writing_state,
)
from composable.model.guard import Tally, empty_tally, tally_paths
from composable.model.layers import KVCache
from composable.model.occupancy import IsDrawn, empty_occupancy, follow_given
from composable.model.output_mixture import OutputMixtureState, empty_output_mixture
from composable.model.router import NEVER, RouterState, choose
from composable.parallel import any_device, count_entry_shards, sum_over_batch


class SafeState(NamedTuple):
    """State that safe mode carries from one call to the next on the same documents.

    E runs in the order of the experts' keys, so that sums over paths do not depend on bank entries.
    """

    router: RouterState
    tally: Tally
    output_mixture: OutputMixtureState
    posterior_BE: jax.Array  # log weights; their exponentials sum to one over the experts in use
    awake_BE: jax.Array  # paths that predicted the next token
    # Each path's prediction of the next token; None where the caller keeps those of awake paths.
    log_prob_EBV: jax.Array | None
    occupancy_BEO: jax.Array | None = None  # of the posterior's chain
    caches: Caches | None = None


# Log-probabilities of one path, BTV, whether it was finite, BT, and its caches.
PathOutput = tuple[jax.Array, jax.Array, tuple[KVCache, ...]]


def safe_state(parts: Parts, batch: int, cache_length: int | None = None) -> SafeState:
    """Return safe mode's state at the start of a document; arguments as for `mix_state`."""
    n_experts, interface = parts.bank.capacity, parts.interface
    prior_E = log_prior_of(parts)[jnp.argsort(parts.bank.key_E)]
    caches = empty_caches(parts, batch, cache_length)
    if caches is not None:
        upper = jax.tree.map(lambda x: jnp.zeros((n_experts, *x.shape), x.dtype), caches.upper)
        caches = caches._replace(upper=upper)
    return SafeState(
        writing_state(parts, batch, is_decoding=caches is not None),
        empty_tally(n_experts),
        empty_output_mixture(batch, interface.n_classes),
        jnp.broadcast_to(prior_E, (batch, n_experts)),
        jnp.zeros((batch, n_experts), bool).at[:, 0].set(True),
        jnp.zeros((n_experts, batch, interface.vocab_size), jnp.float32),
        None if caches is None else empty_occupancy(batch, n_experts),
        caches,
    )


def safe(parts: Parts, tokens_BT: jax.Array, state: SafeState) -> tuple[jax.Array, SafeState]:
    """Return log-probabilities in safe mode.

    The backbone's path is always awake. The router's best `top_k` experts are awake at each token;
    the posterior of a sleeping expert does not change. With prior p of the backbone and switch rate
    a, a document of n tokens costs at most `log(1/p) - n log(1 - a (1 - p))` nats more than the
    backbone alone, whatever is installed. `RouterInterface.safe_bound` adds the cost of the output
    mixture, if there is one.

    Args:
        parts: The model.
        tokens_BT: Token ids, continuing from the state.
        state: State before the first of them.

    Returns:
        Log-probabilities of the next token, shape BTV float32, and the new state.

    References:
        Freund, Schapire, Singer and Warmuth 1997, "Using and combining predictors that
        specialize" (sleeping experts); Herbster and Warmuth 1998, "Tracking the best expert"
        (fixed share, here towards the prior).
    """
    log_prob_BTV, _, state = trace_safe(parts, tokens_BT, state)
    return log_prob_BTV, state


def trace_safe(
    parts: Parts, tokens_BT: jax.Array, state: SafeState, is_drawn: IsDrawn = False
) -> tuple[jax.Array, jax.Array, SafeState]:
    """Return log-probabilities in safe mode, with the weights that produced them.

    Arguments as for `trace_mix`.

    Returns:
        Log-probabilities, shape BTV float32, weights of the paths, shape BTE, and the new state.
    """
    return split_documents(partial(_trace_safe, is_drawn=is_drawn), parts, tokens_BT, state)


def _trace_safe(
    parts: Parts, tokens_BT: jax.Array, state: SafeState, is_drawn: IsDrawn
) -> tuple[jax.Array, jax.Array, SafeState]:
    """Do the work of `trace_safe` on the rows of one device."""
    trunk, router, caches = run_trunk_and_scouts(
        parts, tokens_BT, state.router, state.caches, is_drawn
    )
    order_E = jnp.argsort(parts.bank.key_E)
    awake_BTE = shortlist(parts, trunk.track_BTE)[..., order_E]
    log_prob_EBTV, is_finite_EBT, upper = _run_paths(
        parts, trunk.x_BTD, order_E, awake_BTE, state.caches
    )
    # The prediction of token t is the one that each path made one position earlier.
    assert state.log_prob_EBV is not None
    before_EBTV = jnp.concatenate([state.log_prob_EBV[:, :, None], log_prob_EBTV[:, :, :-1]], 2)
    log_prob_EBT = jnp.take_along_axis(before_EBTV, tokens_BT[None, ..., None], axis=-1)[..., 0]
    output_BTV, weight_BTE, after = mix_paths(
        parts,
        trunk,
        state,
        PathOutputs(jnp.arange(len(order_E)), awake_BTE, log_prob_EBTV, is_finite_EBT),
        log_prob_EBT,
        is_drawn,
    )
    if caches is not None:
        caches = caches._replace(upper=upper)
    after = after._replace(router=router, log_prob_EBV=log_prob_EBTV[:, :, -1], caches=caches)
    return output_BTV, weight_BTE, after


class PathOutputs(NamedTuple):
    """Predictions of some paths for the tokens after some positions."""

    # Place of each path in the order of the experts' keys; E for an entry that stands for none.
    path_A: jax.Array
    awake_BTE: jax.Array  # which paths predict, of all, in the order of keys
    log_prob_ABTV: jax.Array
    is_finite_ABT: jax.Array


def mix_paths(
    parts: Parts,
    trunk: TrunkPass,
    state: SafeState,
    outputs: PathOutputs,
    log_prob_EBT: jax.Array,
    is_drawn: IsDrawn = False,
) -> tuple[jax.Array, jax.Array, SafeState]:
    """Mix the predictions of paths by how well each predicted: the last part of `trace_safe`.

    Args:
        parts: The model.
        trunk: Results of the trunk for the tokens.
        state: State before them.
        outputs: Predictions of all paths that are awake at any of the tokens; for the token after
            the text alone, if the interface has no output mixture and only that one is wanted.
        log_prob_EBT: Log-probability of each of the tokens by each path, one position earlier, in
            the order of keys; of any value where a path was asleep.
        is_drawn: Whether the model drew the tokens.

    Returns:
        Log-probabilities, shape BTV or B1V as those of the paths, weights of the paths, shape BTE,
        and the new state, whose router, predictions and caches are those before.
    """
    path_A, awake_BTE, log_prob_ABTV, is_finite_ABT = outputs
    weight_BTE, posterior_BE, occupancy_BEO = _posterior(
        parts, log_prob_EBT, state, awake_BTE, is_drawn, trunk.length
    )
    weight_EBT = jnp.moveaxis(weight_BTE, -1, 0)
    predicted_EBT = weight_EBT
    if log_prob_ABTV.shape[2] < awake_BTE.shape[1]:
        assert parts.interface.output_mixture is None
        predicted_EBT = jnp.moveaxis(take_last(weight_BTE, trunk.length), -1, 0)[..., None]
    log_weight_ABT1 = jnp.take(predicted_EBT, path_A, axis=0, fill_value=NEVER)[..., None]
    log_prob_BTV = jax.nn.logsumexp(log_weight_ABT1 + log_prob_ABTV, axis=0)
    log_prob_BTV, mixture = mix_in_scouts(
        parts, log_prob_BTV, trunk, state.router.started_B, state.output_mixture, is_drawn
    )
    entry_E = jnp.argsort(jnp.argsort(parts.bank.key_E))
    is_finite_EBT = jnp.ones(weight_EBT.shape, bool).at[path_A].set(is_finite_ABT, mode="drop")
    is_finite_BTE = jnp.moveaxis(is_finite_EBT, 0, -1)
    counted = tally_paths(
        empty_tally(parts.bank.capacity), awake_BTE[..., entry_E], is_finite_BTE[..., entry_E]
    )
    tally = jax.tree.map(jnp.add, state.tally, sum_over_batch(counted))
    after = state._replace(
        tally=tally,
        output_mixture=mixture,
        posterior_BE=posterior_BE,
        awake_BE=take_last(awake_BTE, trunk.length),
        occupancy_BEO=occupancy_BEO,
    )
    return log_prob_BTV, jnp.exp(weight_BTE)[..., entry_E], after


def shortlist(parts: Parts, track_BTE: jax.Array) -> jax.Array:
    """Return which paths predict each token, shape BTE: the backbone's and the best experts'."""
    alive_E = parts.bank.alive_E.at[0].set(False)
    score_BTE = jnp.where(alive_E, track_BTE, NEVER)
    choice = choose(score_BTE, parts.bank.key_E, parts.interface.top_k)
    chosen_BTE = jax.nn.one_hot(choice.expert_BTJ, alive_E.shape[0], dtype=bool).any(axis=-2)
    return (chosen_BTE & alive_E).at[..., 0].set(True)


def _run_paths(
    parts: Parts,
    x_BTD: jax.Array,
    order_E: jax.Array,
    awake_BTE: jax.Array,
    caches: Caches | None,
) -> PathOutput:
    """Run every path that is needed: log-probabilities EBTV, whether finite EBT, and caches.

    Without caches, a path that no token shortlists is skipped. With caches, the path of every
    installed expert runs, since a later token may need its keys and values.
    """
    bank = parts.bank
    needed_E = awake_BTE.any(axis=(0, 1)) if caches is None else bank.alive_E[order_E]
    if count_entry_shards(bank.capacity) > 1:
        needed_E = any_device(needed_E)  # bodies are read from the device that has them, together
    vocab = parts.interface.vocab_size
    uniform_BTV = jnp.full((*x_BTD.shape[:2], vocab), -jnp.log(vocab), jnp.float32)
    own = () if caches is None else caches.upper
    position = 0 if caches is None else caches.position

    def run_if_needed(entry: tuple[jax.Array, jax.Array, tuple[KVCache, ...]]) -> PathOutput:
        index, needed, cache = entry

        def run(index: jax.Array, cache: tuple[KVCache, ...]) -> PathOutput:
            return run_path(parts, entry_slots(bank, index), x_BTD, position, cache)

        def skip(_: jax.Array, cache: tuple[KVCache, ...]) -> PathOutput:
            return uniform_BTV, jnp.ones(x_BTD.shape[:2], bool), cache

        output: PathOutput = jax.lax.cond(needed, run, skip, index, cache)
        return output

    outputs: PathOutput = jax.lax.map(run_if_needed, (order_E, needed_E, own))
    return outputs


def run_path(
    parts: Parts,
    slots: Sequence[SlotMatrices] | Sequence[SlotChanges],
    x_BTD: jax.Array,
    position: jax.Array | int = 0,
    caches: tuple[KVCache, ...] = (),
) -> PathOutput:
    """Return the predictions of one path.

    Args:
        parts: The model.
        slots: The path's body: full matrices, or low-rank changes of the backbone's.
        x_BTD: Residual stream at the tap.
        position: Position of the first token.
        caches: The path's own, when decoding.

    Returns:
        Log-probabilities BTV; whether the logits were finite, BT: a path counts as the uniform
        distribution where they were not; and the new caches.
    """
    feed_forward = fixed_feed_forward(parts, slots)
    logits_BTV, written = parts.backbone.upper(x_BTD, feed_forward, position, caches or None)
    is_finite_BT1 = jnp.isfinite(logits_BTV).all(axis=-1, keepdims=True)
    log_prob_BTV = jax.nn.log_softmax(jnp.where(is_finite_BT1, logits_BTV, 0.0), axis=-1)
    return log_prob_BTV, is_finite_BT1[..., 0], tuple(written)


def _posterior(
    parts: Parts,
    log_prob_EBT: jax.Array,
    state: SafeState,
    awake_BTE: jax.Array,
    is_drawn: IsDrawn,
    length: Length,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return each path's log weight, BTE, the last log posterior, BE, and the last occupancy."""
    predicted_BTE = jnp.concatenate([state.awake_BE[:, None], awake_BTE[:, :-1]], axis=1)
    seen_BT = jnp.ones(awake_BTE.shape[:2], bool).at[:, 0].set(state.router.started_B)
    prior_E = log_prior_of(parts)[jnp.argsort(parts.bank.key_E)]
    rate = parts.interface.switch_rate

    def step(
        posterior_BE: jax.Array, at: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        log_prob_BE, predicted_BE, awake_BE, seen_B = at
        weight_BE = _normalise(posterior_BE, predicted_BE)
        mixture_B1 = jax.nn.logsumexp(weight_BE + log_prob_BE, axis=-1, keepdims=True)
        updated_BE = jnp.where(predicted_BE, posterior_BE + log_prob_BE - mixture_B1, posterior_BE)
        if rate:
            updated_BE = jnp.logaddexp(updated_BE + jnp.log1p(-rate), jnp.log(rate) + prior_E)
        posterior_BE = jnp.where(seen_B[:, None], updated_BE, posterior_BE)
        return posterior_BE, (_normalise(posterior_BE, awake_BE), posterior_BE)

    per_token = (log_prob_EBT.transpose(2, 1, 0), predicted_BTE, awake_BTE, seen_BT)
    along_T = (per_token[0], *(jnp.moveaxis(x, 1, 0) for x in per_token[1:]))
    posterior_BE, (weight_TBE, posterior_TBE) = jax.lax.scan(step, state.posterior_BE, along_T)
    weight_BTE = jnp.moveaxis(weight_TBE, 0, 1)
    if state.occupancy_BEO is None:
        return weight_BTE, posterior_BE, None
    posterior_BTE, occupancy_BEO = follow_given(
        jnp.moveaxis(posterior_TBE, 0, 1),
        state.posterior_BE,
        prior_E,
        rate,
        state.occupancy_BEO,
        is_drawn,
        length,
    )
    if is_drawn is not False:
        written_BTE = _normalise(posterior_BTE, awake_BTE)
        weight_BTE = jnp.where(is_drawn, written_BTE, weight_BTE)
    return weight_BTE, take_last(posterior_BTE, length), occupancy_BEO


def _normalise(log_weight_BE: jax.Array, mask_BE: jax.Array) -> jax.Array:
    """Return log weights normalised over the entries where the mask is true."""
    return jax.nn.log_softmax(jnp.where(mask_BE, log_weight_BE, NEVER), axis=-1)
