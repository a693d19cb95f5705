"""Mix mode: one pass that mixes, in every slot, the outputs of the experts chosen per token."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from composable.kernels import (
    Dispatch,
    changed_swiglu_of_few,
    combine_rows,
    default_block,
    gather_rows,
    grouped_changed_swiglu,
    grouped_swiglu,
    make_dispatch,
    run_in_least_room,
    swiglu_of_few,
)
from composable.model.backbone import FeedForwardFn
from composable.model.bank import Bank
from composable.model.body import MATRICES, SlotChanges, SlotMatrices, backbone_slot
from composable.model.chunks import Length, is_text, take_last
from composable.model.composed import (
    Caches,
    Parts,
    TrunkPass,
    empty_caches,
    mix_in_scouts,
    run_trunk_and_scouts,
    split_documents,
    writing_state,
)
from composable.model.guard import Tally, empty_tally, exceeds, redistribute, tally_rows
from composable.model.occupancy import IsDrawn
from composable.model.output_mixture import OutputMixtureState, empty_output_mixture
from composable.model.router import Choice, RouterState, choose, dense_weights, leave_out
from composable.model.split_bank import plan_routes, run_split
from composable.parallel import count_entry_shards, sum_over_batch

# Rows of a block where few bodies run: a product of as many rows is nearly as fast as a larger one,
# and each body adds half a block of padding.
_FEW_BLOCK: Final = 64


class MixState(NamedTuple):
    """State that mix mode carries from one call to the next on the same documents."""

    router: RouterState
    tally: Tally
    output_mixture: OutputMixtureState
    caches: Caches | None = None


def mix_state(parts: Parts, batch: int, cache_length: int | None = None) -> MixState:
    """Return mix mode's state at the start of a document.

    Args:
        parts: The model.
        batch: Sequences (B).
        cache_length: Positions to make room for when decoding; None keeps no cache.
    """
    router = writing_state(parts, batch, is_decoding=cache_length is not None)
    tally = empty_tally(parts.bank.capacity)
    mixture = empty_output_mixture(batch, parts.interface.n_classes)
    return MixState(router, tally, mixture, empty_caches(parts, batch, cache_length))


def mix(parts: Parts, tokens_BT: jax.Array, state: MixState) -> tuple[jax.Array, MixState]:
    """Return logits in mix mode.

    Args:
        parts: The model.
        tokens_BT: Token ids, continuing from the state.
        state: State before the first of them.

    Returns:
        Logits of the next token at every position, shape BTV float32, and the new state.
    """
    logits_BTV, _, state = trace_mix(parts, tokens_BT, state)
    return logits_BTV, state


def mix_from_tap(
    parts: Parts, tokens_BT: jax.Array, x_BTD: jax.Array, state: MixState
) -> tuple[jax.Array, MixState]:
    """Return logits in mix mode, from the trunk's output for the same tokens.

    The trunk depends on nothing that is installed, so its output serves many models. The bits are
    those of `mix`.

    Args:
        parts: The model.
        tokens_BT: Token ids, continuing from the state.
        x_BTD: The residual stream at the tap, as `Backbone.trunk` returns it.
        state: State before the first of them, without caches.

    Returns:
        As `mix`.
    """

    def run(
        parts: Parts, tokens_BT: jax.Array, x_BTD: jax.Array, state: MixState
    ) -> tuple[jax.Array, MixState]:
        reading, state = read_mix(parts, tokens_BT, state, x_BTD=x_BTD)
        logits_BTV, _, state = predict_mix(parts, reading, state)
        return logits_BTV, state

    return split_documents(run, parts, tokens_BT, x_BTD, state)


def trace_mix(
    parts: Parts, tokens_BT: jax.Array, state: MixState, is_drawn: IsDrawn = False
) -> tuple[jax.Array, jax.Array, MixState]:
    """Return logits in mix mode, with the weights that produced them.

    Args:
        parts: The model.
        tokens_BT: Token ids, continuing from the state.
        state: State before the first of them; it has caches where tokens are drawn.
        is_drawn: Whether the model drew the tokens, which are then no evidence for any expert.

    Returns:
        Logits, shape BTV float32, router weights, shape BTE, and the new state.
    """
    return split_documents(partial(_trace_mix, is_drawn=is_drawn), parts, tokens_BT, state)


def _trace_mix(
    parts: Parts, tokens_BT: jax.Array, state: MixState, is_drawn: IsDrawn
) -> tuple[jax.Array, jax.Array, MixState]:
    """Do the work of `trace_mix` on the rows of one device."""
    reading, state = read_mix(parts, tokens_BT, state, is_drawn)
    return predict_mix(parts, reading, state, is_drawn)


class Bodies(NamedTuple):
    """The bodies of some experts, as arrays of their own.

    With room for changes the first place is that of the backbone's body, which they change; then
    come the changes, then full bodies.
    """

    # Number of the body at each place, as `Bank.number_bodies` has it; `n_bodies` for none.
    number_A: jax.Array
    changes: tuple[tuple[SlotChanges, ...], ...]
    slots: tuple[tuple[SlotMatrices, ...], ...]

    def take_slot(self, index: int) -> Bodies:
        """Return the bodies with one slot alone."""
        changes = tuple((body[index],) for body in self.changes)
        slots = tuple((body[index],) for body in self.slots)
        return Bodies(self.number_A, changes, slots)

    def find_places(self, number_MJ: jax.Array, n_bodies: int) -> jax.Array:
        """Return the places of bodies by their numbers, one past the last for no body."""
        is_here_MJA = (number_MJ[..., None] == self.number_A) & (self.number_A < n_bodies)
        place_MJ = jnp.argmax(is_here_MJA, axis=-1)
        return jnp.where(is_here_MJA.any(axis=-1), place_MJ, len(self.number_A))


class Reading(NamedTuple):
    """Results for some tokens before any body runs."""

    trunk: TrunkPass
    choice: Choice
    position: jax.Array | int  # of the first of them
    started_B: jax.Array  # whether a token precedes them


def read_mix(
    parts: Parts,
    tokens_BT: jax.Array,
    state: MixState,
    is_drawn: IsDrawn = False,
    x_BTD: jax.Array | None = None,
    length: Length = None,
) -> tuple[Reading, MixState]:
    """Run the trunk and the router: the first half of `trace_mix`, with its arguments.

    Args:
        parts: As for `trace_mix`.
        tokens_BT: As for `trace_mix`.
        state: As for `trace_mix`.
        is_drawn: As for `trace_mix`.
        x_BTD: The residual stream at the tap, if it is known, in place of the trunk.
        length: Tokens of the text; those after it are padding, and choose no experts.

    Returns:
        The results, and the state, whose upper caches do not hold the tokens yet.
    """
    trunk, router, caches = run_trunk_and_scouts(
        parts, tokens_BT, state.router, state.caches, is_drawn, x_BTD, length
    )
    position = 0 if state.caches is None else state.caches.position
    choice = choose_experts(parts, trunk.score_BTE)
    if length is not None:
        choice = leave_out(choice, is_text(tokens_BT.shape[1], length), parts.bank.capacity)
    reading = Reading(trunk, choice, position, state.router.started_B)
    return reading, state._replace(router=router, caches=caches)


def predict_mix(
    parts: Parts,
    reading: Reading,
    state: MixState,
    is_drawn: IsDrawn = False,
    bodies: Bodies | None = None,
    *,
    is_next_alone: bool = False,
) -> tuple[jax.Array, jax.Array, MixState]:
    """Run the chosen bodies and predict: the second half of `trace_mix`.

    Args:
        parts: The model.
        reading: What `read_mix` returned.
        state: The state that it returned.
        is_drawn: Whether the model drew the tokens.
        bodies: Those of all experts chosen; without them, bodies are sliced out of the bank.
        is_next_alone: Whether to predict the token after the text alone.

    Returns:
        As `trace_mix`; with one position if it is the next token alone.
    """
    trunk, choice, caches = reading.trunk, reading.choice, state.caches
    feed_forward, zeroed = _mixed_feed_forward(parts, choice, bodies)
    backbone, upper = parts.backbone, None if caches is None else caches.upper

    def keep_next(x_BT: jax.Array) -> jax.Array:
        return take_last(x_BT, trunk.length)[:, None] if is_next_alone else x_BT

    x_BTD, written = backbone.run_layers(
        backbone.cfg.slots, trunk.x_BTD, feed_forward, reading.position, upper
    )
    if caches is not None:
        caches = caches._replace(upper=tuple(written))
    # The scouts' share depends on what was predicted for every token.
    needs_all = parts.interface.output_mixture is not None
    logits_BTV = backbone.predict(x_BTD if needs_all else keep_next(x_BTD))
    logits_BTV, mixture = mix_in_scouts(
        parts, logits_BTV, trunk, reading.started_B, state.output_mixture, is_drawn
    )
    if needs_all:
        logits_BTV = keep_next(logits_BTV)
    counted = tally_rows(empty_tally(parts.bank.capacity), zeroed, choice)
    tally = jax.tree.map(jnp.add, state.tally, sum_over_batch(counted))
    after = MixState(state.router, tally, mixture, caches)
    weight_BTE = keep_next(dense_weights(choice, parts.bank.capacity))
    return logits_BTV, weight_BTE, after


def route(parts: Parts, tokens_BT: jax.Array, state: MixState) -> tuple[jax.Array, MixState]:
    """Return the router weights of mix mode without running the upper layers.

    Arguments as for `mix`.

    Returns:
        Router weights for predicting the next token at every position, shape BTE, and the new
        state.
    """
    return split_documents(_route, parts, tokens_BT, state)


def _route(parts: Parts, tokens_BT: jax.Array, state: MixState) -> tuple[jax.Array, MixState]:
    """Do the work of `route` on the rows of one device."""
    trunk, router, caches = run_trunk_and_scouts(parts, tokens_BT, state.router, state.caches)
    weight_BTE = dense_weights(choose_experts(parts, trunk.score_BTE), parts.bank.capacity)
    return weight_BTE, state._replace(router=router, caches=caches)


def choose_experts(parts: Parts, score_BTE: jax.Array) -> Choice:
    """Return the experts that each token mixes.

    Args:
        parts: The model.
        score_BTE: Log weights, prior included.
    """
    interface = parts.interface
    return choose(score_BTE, parts.bank.key_E, interface.n_mixed, interface.mix.floor)


def _mixed_feed_forward(
    parts: Parts, choice: Choice, bodies: Bodies | None = None
) -> tuple[FeedForwardFn, list[jax.Array]]:
    """Return a feed-forward function that mixes the chosen experts.

    Choices are grouped by expert once, for all slots. In each slot, the weight of a contribution
    that counts as zero goes to the token's other choices, or to the backbone's own block if none
    is left, as if the expert had not been chosen there.

    Returns:
        The function, and a list to which every slot that runs appends which contributions counted
        as zero, shape MJ.
    """
    batch, n_tokens, n_choices = choice.expert_BTJ.shape
    expert_MJ = choice.expert_BTJ.reshape(-1, n_choices)
    weight_MJ = choice.weight_BTJ.reshape(-1, n_choices)
    bank = parts.bank
    n_shards = count_entry_shards(bank.capacity)
    if bodies is None:
        block = default_block(batch * n_tokens, n_choices)
    else:
        block = min(_FEW_BLOCK, batch * n_tokens)
    if bodies is not None:
        place_MJ = bodies.find_places(bank.number_bodies(expert_MJ), bank.n_bodies)
        dispatch = make_dispatch(place_MJ, len(bodies.number_A), block)
    elif n_shards > 1:
        dispatch = make_dispatch(expert_MJ, bank.capacity, block)
        routes = plan_routes(bank, dispatch, n_shards)
    else:
        dispatch = make_dispatch(bank.number_bodies(expert_MJ), bank.n_bodies, block)

    zeroed: list[jax.Array] = []

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        index = parts.interface.slots.index(layer)
        bound = parts.interface.output_bounds[index]
        x_MD = x_BTD.reshape(batch * n_tokens, -1)
        own = backbone_slot(parts.backbone, layer)

        def mix_rows(dispatch: Dispatch, x_MD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            if bodies is not None:
                y_PD = _run_few(own, bodies.take_slot(index), x_MD, dispatch)
            elif n_shards > 1:
                y_PD = run_split(bank, own, index, gather_rows(x_MD, dispatch), dispatch, routes)
            else:
                y_PD = _run_bodies(bank, index, gather_rows(x_MD, dispatch), dispatch)
            number_Y = dispatch.expert_Y if bodies is None else bodies.number_A[dispatch.expert_Y]
            zeroed_P = (jnp.repeat(number_Y, block) != 0) & exceeds(y_PD, bound)
            position_MJ = dispatch.position_MJ
            zeroed_MJ = jnp.take(zeroed_P, position_MJ, mode="fill", fill_value=False)
            kept_MJ, dropped_M = redistribute(weight_MJ, zeroed_MJ)
            # Out-of-bounds rows are not read, not given weight zero: zero times an infinite or NaN
            # output is NaN.
            in_bounds = dataclasses.replace(
                dispatch, position_MJ=jnp.where(zeroed_MJ, len(y_PD), position_MJ)
            )
            y_MD = combine_rows(y_PD, kept_MJ.astype(y_PD.dtype), in_bounds)
            return y_MD, zeroed_MJ, dropped_M

        if bodies is None and n_shards == 1:
            room = batch * n_tokens * 5 // 4
            y_MD, zeroed_MJ, dropped_M = run_in_least_room(mix_rows, dispatch, x_MD, room)
        else:
            y_MD, zeroed_MJ, dropped_M = mix_rows(dispatch, x_MD)
        zeroed.append(zeroed_MJ)

        def fall_back(y_MD: jax.Array) -> jax.Array:
            own_MD = parts.backbone.own_feed_forward(layer, x_MD)
            return jnp.where(dropped_M[:, None], own_MD, y_MD)

        # Conditional, so that the backbone's block costs nothing unless a contribution was zeroed.
        y_MD = jax.lax.cond(dropped_M.any(), fall_back, lambda y_MD: y_MD, y_MD)
        mixed_BTD: jax.Array = y_MD.reshape(x_BTD.shape)
        return mixed_BTD

    return run, zeroed


def _run_bodies(bank: Bank, index: int, x_PD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Run each row through its own body in one slot."""
    slot = bank.slots[index]
    if bank.changes:
        return grouped_changed_swiglu(x_PD, slot, bank.changes[index], dispatch)
    return grouped_swiglu(x_PD, slot["w_gate"], slot["w_up"], slot["w_down"], dispatch)


# Traced once for all slots.
@jax.jit
def _run_few(own: SlotMatrices, bodies: Bodies, x_MD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Run tokens through the bodies that they choose, which are few and have one slot."""
    full = [[slot[name] for name in MATRICES] for (slot,) in bodies.slots]
    changes = [change for (change,) in bodies.changes]
    place_A = jnp.arange(len(bodies.number_A))
    first = 1 + len(changes) if changes else 0
    outputs = []
    if full:
        x_PD = gather_rows(x_MD, dispatch)
        outputs.append(swiglu_of_few(x_PD, full, place_A[first:], dispatch))
    if changes:
        outputs.append(
            changed_swiglu_of_few(x_MD, own, changes, place_A[1:first], len(changes), dispatch)
        )
    y_PD: jax.Array = sum(outputs[1:], outputs[0])  # each is zero at the other's rows
    return y_PD
