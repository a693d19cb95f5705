"""A bank split over devices: blocks of rows run on the device that has their expert's body.

Every device sorts the choices of its own tokens by expert, as on one device, and sends whole blocks
of rows to the devices that have the experts. These run them and send the results back. Blocks of
the backbone stay, since every device has its matrices.

What is computed for a row depends on the token, on the expert's own weights and on the expert's own
rows before it on the same device, as for a bank that is not split. Nothing is dropped: there is
room for the case that every device chooses experts of one device alone.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from composable.kernels import (
    Dispatch,
    combine_rows,
    count_blocks,
    count_up_to,
    gather_rows,
    group_blocks,
    grouped_changed_swiglu,
    grouped_swiglu,
)
from composable.model.bank import Bank
from composable.model.body import MATRICES, SlotMatrices
from composable.parallel import Traffic, exchange_rows, gather_tables


class Routes(NamedTuple):
    """Where blocks of rows are run, decided once for all slots.

    Args:
        outward: Blocks to the devices that have their experts.
        back: The same blocks on their way back.
        n_received: How many blocks there is room for; static.
        own: Rows by expert, of which only those of the backbone are in use.
        full: Blocks that came, by entry of this device; those of full bodies.
        changed: Those of low-rank changes.
    """

    outward: Traffic
    back: Traffic
    n_received: int
    own: Dispatch
    full: Dispatch | None
    changed: Dispatch | None


def plan_routes(bank: Bank, dispatch: Dispatch, n_shards: int) -> Routes:
    """Return where the blocks of a dispatch are run.

    Args:
        bank: The bank, of which this device has some entries.
        dispatch: Rows of this device by entry of the whole bank.
        n_shards: Devices that share the bank.
    """
    n_own, n_choices, block = bank.capacity // n_shards, dispatch.position_MJ.size, dispatch.block
    end_XE, index = gather_tables(dispatch.end_block_E)
    end_XX = end_XE[:, n_own - 1 :: n_own]  # of what each device, first axis, has for each
    begin_XX = jnp.concatenate([end_XE[:, :1], end_XX[:, :-1]], axis=1)  # after the backbone's
    size_XX = end_XX - begin_XX
    place_XX = jnp.cumsum(size_XX, axis=0) - size_XX
    outward = Traffic(begin_XX[index], size_XX[index], place_XX[index], size_XX[:, index])
    back = Traffic(place_XX[:, index], size_XX[:, index], begin_XX[:, index], size_XX[index])

    n_received = n_shards * count_blocks(n_choices, n_own, block)
    received_Y = jnp.arange(n_received)
    end_X = place_XX[:, index] + size_XX[:, index]
    source_Y = jnp.minimum(count_up_to(end_X, received_Y), n_shards - 1)
    sent_Y = received_Y - place_XX[source_Y, index] + begin_XX[source_Y, index]
    entry_Y = jnp.sum(end_XE[source_Y] <= sent_Y[:, None], axis=-1)
    is_used_Y = received_Y < end_X[-1]
    is_changed_Y = jnp.take(bank.is_changed_E, entry_Y, mode="clip")

    def group(is_kind_Y: jax.Array) -> Dispatch:
        own_Y = jnp.where(is_used_Y & is_kind_Y, entry_Y - index * n_own, n_own)
        return group_blocks(own_Y, n_own, block)

    return Routes(
        outward=outward,
        back=back,
        n_received=n_received,
        own=dataclasses.replace(
            dispatch,
            expert_Y=jnp.zeros_like(dispatch.expert_Y),
            end_block_E=dispatch.end_block_E[:1],
            end_row_E=dispatch.end_row_E[:1],
        ),
        full=group(~is_changed_Y) if bank.has_full else None,
        changed=group(is_changed_Y) if bank.changes else None,
    )


def run_split(
    bank: Bank, own: SlotMatrices, index: int, x_PD: jax.Array, dispatch: Dispatch, routes: Routes
) -> jax.Array:
    """Run each row through its own body in one slot, wherever that is.

    Args:
        bank: The bank, of which this device has some entries.
        own: The backbone's matrices.
        index: Index of the slot.
        x_PD: Rows of this device.
        dispatch: Their experts.
        routes: What `plan_routes` returned for it.

    Returns:
        Outputs, shape PD.
    """
    shared = {name: own[name][None] for name in MATRICES}
    y_PD = _run_bodies(x_PD, shared, routes.own)
    blocks = (-1, dispatch.block, x_PD.shape[1])
    room = jnp.zeros((routes.n_received, *blocks[1:]), x_PD.dtype)
    received_MD = exchange_rows(x_PD.reshape(blocks), room, routes.outward).reshape(-1, blocks[2])
    outputs = []
    if routes.full is not None:
        grouped_PD = _run_bodies(
            gather_rows(received_MD, routes.full), bank.slots[index], routes.full
        )
        outputs.append(_ungroup(grouped_PD, routes.full))
    if routes.changed is not None:
        grouped_PD = gather_rows(received_MD, routes.changed)
        grouped_PD = grouped_changed_swiglu(grouped_PD, shared, bank.changes[index], routes.changed)
        outputs.append(_ungroup(grouped_PD, routes.changed))
    y_MD: jax.Array = sum(outputs[1:], outputs[0])  # each is zero at the other's rows
    x = exchange_rows(y_MD.reshape(blocks), y_PD.reshape(blocks), routes.back)
    return x.reshape(x_PD.shape)


def _run_bodies(x_PD: jax.Array, slot: SlotMatrices, dispatch: Dispatch) -> jax.Array:
    return grouped_swiglu(x_PD, slot["w_gate"], slot["w_up"], slot["w_down"], dispatch)


def _ungroup(y_PD: jax.Array, groups: Dispatch) -> jax.Array:
    """Return rows in the order that they came in; zero for those that are in no group."""
    return combine_rows(y_PD, jnp.ones(groups.position_MJ.shape), groups)
