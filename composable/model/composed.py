"""A backbone and a bank as one model, used in mix mode, in safe mode, or one path at a time.

*Mix* is one pass that mixes the outputs of the top k experts in every slot (`mix.py`). *Safe* runs
whole paths, the backbone's and those that the router shortlists, and mixes their output
probabilities by how well each path predicted (`safe.py`). This file holds the steps that both
share. Everything here is a pure function of (parts, tokens, state).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp

from composable.interface import RouterInterface, SwitchingFilter
from composable.model.backbone import Backbone, FeedForwardFn
from composable.model.bank import Bank
from composable.model.body import MATRICES, SlotChanges, SlotMatrices, backbone_slot
from composable.model.chunks import Length, take_last
from composable.model.layers import KVCache, changed_swiglu, swiglu
from composable.model.occupancy import (
    IsDrawn,
    empty_occupancy,
    follow_given,
    writing_weights,
)
from composable.model.output_mixture import OutputMixtureState, mix_outputs
from composable.model.router import (
    NEVER,
    RouterState,
    empty_state,
    evidence,
    evidence_from,
    log_prior,
    scout_log_probs,
    switching_posterior,
    track_record,
)
from composable.parallel import spec_of_entries, split_batch

_T = TypeVar("_T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a composed model.

    Args:
        backbone: The frozen model.
        bank: The installed experts.
        interface: The contract; static.
    """

    backbone: Backbone
    bank: Bank
    interface: RouterInterface = field(metadata={"static": True})


class Caches(NamedTuple):
    """Keys and values of a sequence being decoded, S positions long.

    In safe mode the arrays of `upper` have a leading E: every path keeps its own.
    """

    trunk: tuple[KVCache, ...]
    upper: tuple[KVCache, ...]
    position: jax.Array


class TrunkPass(NamedTuple):
    """Results of the trunk and the scouts."""

    x_BTD: jax.Array  # residual stream after the trunk
    classes_BT: jax.Array  # class of each token
    track_BTE: jax.Array  # track record of each expert, nats
    score_BTE: jax.Array  # log weights of mix mode, prior included
    # Scouts' log-probabilities of the next token's class; None without an output mixture.
    scout_log_prob_EBTC: jax.Array | None
    length: Length = None  # tokens of the text; what follows them is padding


def split_documents(fn: Callable[..., _T], parts: Parts, *rows: Any) -> _T:
    """Return `fn(parts, *rows)`, computed by every device on its own documents.

    Args:
        fn: A function of documents one by one; see `split_batch`.
        parts: The model.
        rows: Tokens and state.
    """
    return split_batch(fn, parts, *rows, specs=specs_of_parts(parts))


def specs_of_parts(parts: Parts) -> Parts:
    """Return how a model is split over the mesh in use: bodies by entry, and nothing else.

    Args:
        parts: The model, or its shapes.

    Returns:
        The same tree with a partition spec in the place of every array.
    """
    bank = parts.bank
    split, whole = spec_of_entries(bank.capacity), jax.P()
    slots = jax.tree.map(lambda _: split if bank.has_full else whole, bank.slots)
    changes = jax.tree.map(lambda _: split, bank.changes)
    specs: Parts = jax.tree.map(lambda _: whole, parts)
    bank = dataclasses.replace(specs.bank, slots=slots, changes=changes)
    return dataclasses.replace(specs, bank=bank)


def track_records(parts: Parts, tokens_BT: jax.Array, state: RouterState) -> jax.Array:
    """Return every expert's track record at every position.

    Args:
        parts: The model.
        tokens_BT: Token ids, continuing from the state.
        state: Router state before the first of them.

    Returns:
        Discounted sums of log-likelihoods, in nats, shape BTE.
    """
    return run_trunk_and_scouts(parts, tokens_BT, state, None)[0].track_BTE


def path(parts: Parts, tokens_BT: jax.Array, slots: Sequence[SlotMatrices]) -> jax.Array:
    """Return logits with one body active at every token, shape BTV float32; no routing.

    Args:
        parts: The model.
        tokens_BT: Token ids of whole sequences.
        slots: Matrices of every slot, as `bank.entry_slots` or `bank.average_slots` return.
    """
    x_BTD, _ = parts.backbone.trunk(tokens_BT)
    feed_forward = fixed_feed_forward(parts, slots)
    return parts.backbone.upper(x_BTD, feed_forward)[0]


def path_norms(parts: Parts, tokens_BT: jax.Array, slots: Sequence[SlotMatrices]) -> jax.Array:
    """Return the size of one body's outputs when it is active at every token.

    Arguments as for `path`.

    Returns:
        Root mean squares, shape LBT float32, one L per slot; `output_bounds` limits these.
    """
    feed_forward, norms = fixed_feed_forward(parts, slots), []

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        y_BTD = feed_forward(layer, x_BTD)
        norms.append(jnp.sqrt(jnp.mean(jnp.square(y_BTD.astype(jnp.float32)), axis=-1)))
        return y_BTD

    x_BTD, _ = parts.backbone.trunk(tokens_BT)
    parts.backbone.upper(x_BTD, run)
    return jnp.stack(norms)


def run_trunk_and_scouts(
    parts: Parts,
    tokens_BT: jax.Array,
    state: RouterState,
    caches: Caches | None,
    is_drawn: IsDrawn = False,
    x_BTD: jax.Array | None = None,
    length: Length = None,
) -> tuple[TrunkPass, RouterState, Caches | None]:
    """Run the trunk and the scouts.

    Args:
        parts: The model.
        tokens_BT: Token ids, continuing from the state.
        state: Router state before the first of them.
        caches: Caches when decoding, or None.
        is_drawn: Whether the model drew the tokens, which are then no evidence.
        x_BTD: The residual stream at the tap for these tokens, if it is known: then the trunk does
            not run, and there are no caches.
        length: Tokens of the text; those after it are padding.

    Returns:
        Their results, the router state after the last token of the text, and caches with the
        trunk's updated.
    """
    backbone, interface = parts.backbone, parts.interface
    if caches is not None:
        x_BTD, written = backbone.trunk(tokens_BT, caches.position, caches.trunk)
        position = caches.position + (tokens_BT.shape[1] if length is None else length)
        caches = caches._replace(trunk=tuple(written), position=position)
    elif x_BTD is None:
        x_BTD, _ = backbone.trunk(tokens_BT)
    feature_BTD = backbone.features(x_BTD)
    classes_BT = backbone.class_map[...][tokens_BT]
    bank, scout_log_prob_EBTC = parts.bank, None
    if interface.output_mixture:
        scout_log_prob_EBUC = scout_log_probs(bank.scouts, feature_BTD, state, bank.width_E)
        evidence_BTE = evidence_from(scout_log_prob_EBUC, classes_BT, state.started_B)
        scout_log_prob_EBTC = scout_log_prob_EBUC[:, :, 1:]
    elif is_drawn is False:
        evidence_BTE = evidence(bank.scouts, feature_BTD, classes_BT, state, bank.width_E)
    else:
        # Drawn tokens are no evidence, so no scout runs for them.
        evidence_BTE = jax.lax.cond(
            is_drawn,
            lambda: jnp.zeros((*classes_BT.shape, bank.capacity), jnp.float32),
            lambda: evidence(bank.scouts, feature_BTD, classes_BT, state, bank.width_E),
        )
    track_BTE = track_record(evidence_BTE, state.track_BE, interface.discount)
    if is_drawn is not False:
        track_BTE = jnp.where(is_drawn, state.track_BE[:, None], track_BTE)
    occupancy_BEO = state.occupancy_BEO
    if isinstance(interface.mix, SwitchingFilter):
        posterior_BTE, score_BTE, occupancy_BEO = _filter_weights(
            bank, interface.mix, evidence_BTE, state, is_drawn, length
        )
    else:
        posterior_BTE = score_BTE = log_prior_of(parts) + track_BTE
    started_B = jnp.ones_like(state.started_B)
    after = RouterState(
        take_last(track_BTE, length),
        take_last(posterior_BTE, length),
        take_last(feature_BTD, length),
        started_B,
        occupancy_BEO,
    )
    # The first token of a document is no evidence for any expert: use the backbone alone.
    alone_E = jnp.full(bank.capacity, NEVER).at[0].set(0.0)
    first_BE = jnp.where(state.started_B[:, None], score_BTE[:, 0], alone_E)
    score_BTE = score_BTE.at[:, 0].set(first_BE)
    trunk = TrunkPass(x_BTD, classes_BT, track_BTE, score_BTE, scout_log_prob_EBTC, length)
    return trunk, after, caches


def _filter_weights(
    bank: Bank,
    rule: SwitchingFilter,
    evidence_BTE: jax.Array,
    state: RouterState,
    is_drawn: IsDrawn,
    length: Length,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return the filter's log posterior and the log weights to use, both BTE, and the occupancy.

    The weights are the posterior, except for tokens that the model drew. Sums run in the order of
    keys.
    """
    order_E = jnp.argsort(bank.key_E)
    prior_E = log_prior(bank.alive_E, rule.backbone_prior, rule.max_expert_prior)
    before_BE = jnp.where(state.started_B[:, None], state.posterior_BE, prior_E)
    posterior_BTE = switching_posterior(
        evidence_BTE[..., order_E],
        before_BE[..., order_E],
        prior_E[order_E],
        power=rule.power,
        rate=rule.switch_rate,
        margin_E=jnp.full(len(order_E), rule.margin).at[0].set(0.0)[order_E],
    )
    entry_E = jnp.argsort(order_E)
    if state.occupancy_BEO is None:
        posterior_BTE = posterior_BTE[..., entry_E]
        return posterior_BTE, posterior_BTE, None
    posterior_BTE, occupancy_BEO = follow_given(
        posterior_BTE,
        before_BE[..., order_E],
        prior_E[order_E],
        rule.switch_rate,
        state.occupancy_BEO,
        is_drawn,
        length,
    )
    score_BTE = posterior_BTE
    if is_drawn is not False:
        written_BTE = writing_weights(posterior_BTE, prior_E[order_E], rule.power)
        score_BTE = jnp.where(is_drawn, written_BTE, posterior_BTE)
    return posterior_BTE[..., entry_E], score_BTE[..., entry_E], occupancy_BEO


def mix_in_scouts(
    parts: Parts,
    logits_BTV: jax.Array,
    trunk: TrunkPass,
    started_B: jax.Array,
    state: OutputMixtureState,
    is_drawn: IsDrawn = False,
) -> tuple[jax.Array, OutputMixtureState]:
    """Mix the scouts' predictions into the output, if the interface has an output mixture.

    Args:
        parts: The model.
        logits_BTV: Logits or log-probabilities of the model.
        trunk: Results of the trunk and the scouts for the same tokens.
        started_B: Whether a position precedes these tokens.
        state: State of the output mixture before these tokens.
        is_drawn: Whether the model drew these tokens.

    Returns:
        Logits, shape BTV, and the new state; both unchanged without an output mixture.
    """
    settings = parts.interface.output_mixture
    if settings is None or trunk.scout_log_prob_EBTC is None:
        return logits_BTV, state
    order_E = jnp.argsort(parts.bank.key_E)
    weight_BTE = jax.nn.softmax(trunk.score_BTE[..., order_E])[..., jnp.argsort(order_E)]
    return mix_outputs(
        logits_BTV,
        trunk.scout_log_prob_EBTC,
        weight_BTE,
        trunk.classes_BT,
        parts.backbone.class_map[...],
        order_E,
        started_B,
        state,
        is_drawn,
        trunk.length,
        power=settings.power,
        prior=settings.prior,
        rate=settings.rate,
    )


def log_prior_of(parts: Parts) -> jax.Array:
    """Return the log prior weight of every entry of the bank, shape E."""
    return log_prior(parts.bank.alive_E, parts.interface.backbone_prior)


def fixed_feed_forward(
    parts: Parts, slots: Sequence[SlotMatrices] | Sequence[SlotChanges]
) -> FeedForwardFn:
    """Return a feed-forward function that runs one body at every token.

    Args:
        parts: The model.
        slots: For every slot, full matrices or low-rank changes of the backbone's.
    """
    index_of = parts.interface.slots.index

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        slot = slots[index_of(layer)]
        if isinstance(slot["w_gate"], tuple):
            own = backbone_slot(parts.backbone, layer)
            return changed_swiglu(x_BTD, own, cast(SlotChanges, slot))
        matrices = cast(SlotMatrices, slot)
        return swiglu(x_BTD, *(matrices[name] for name in MATRICES))

    return run


def writing_state(parts: Parts, batch: int, is_decoding: bool) -> RouterState:
    """Return the router's state at the start of a document.

    Args:
        parts: The model.
        batch: Sequences (B).
        is_decoding: Whether the model may continue the document, which needs the occupancy.
    """
    state = empty_state(batch, parts.bank.capacity, parts.interface.d_model)
    if is_decoding and isinstance(parts.interface.mix, SwitchingFilter):
        state = state._replace(occupancy_BEO=empty_occupancy(batch, parts.bank.capacity))
    return state


def empty_caches(parts: Parts, batch: int, length: int | None) -> Caches | None:
    """Return empty caches of `length` positions, or None if `length` is None."""
    if length is None:
        return None
    backbone = parts.backbone
    return Caches(
        tuple(backbone.empty_caches(batch, length, range(backbone.cfg.tap))),
        tuple(backbone.empty_caches(batch, length, backbone.cfg.slots)),
        jnp.int32(0),
    )
