"""The bank: installed bodies and scouts, stacked for the device, with spare capacity.

Entry 0 is the backbone. Installing writes one entry in place (the old arrays are donated) at a
traced index, and removing clears it; neither compiles anything.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from composable.interface import RouterInterface
from composable.model.backbone import Backbone
from composable.model.body import MATRICES, Body, SlotMatrices, backbone_slot
from composable.model.router import ScoutBank
from composable.model.scout import Scout


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Bank:
    """Stacked experts.

    Args:
        slots: For every slot of the interface, in order, its matrices stacked over E: "w_gate" and
            "w_up" of shape EDF, "w_down" of shape EFD.
        scouts: Stacked scouts.
        width_E: Hidden units of each scout before it was padded; 0 where there is none.
        alive_E: Which entries hold an expert.
        key_E: Each expert's own number, which settles ties; the backbone's is 0.
    """

    slots: tuple[SlotMatrices, ...]
    scouts: ScoutBank
    width_E: jax.Array
    alive_E: jax.Array
    key_E: jax.Array

    @property
    def capacity(self) -> int:
        """Number of entries, the backbone's included."""
        return int(self.alive_E.shape[0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BankEntry:
    """One expert in the form that the bank stores.

    Args:
        slots: For every slot its full matrices.
        scout: The scout, padded to the interface's widest.
        width: Its hidden units before that.
        key: The expert's own number, at least 1.
    """

    slots: tuple[SlotMatrices, ...]
    scout: ScoutBank
    width: jax.Array
    key: jax.Array


def make_entry(
    backbone: Backbone, interface: RouterInterface, body: Body, scout: Scout, key: int
) -> BankEntry:
    """Return an expert as the bank stores it: body merged, scout padded."""
    slots = tuple(body.merged(backbone, layer) for layer in interface.slots)
    return BankEntry(
        slots=slots, scout=_pad(scout, interface), width=_width(scout), key=jnp.uint32(key)
    )


@functools.partial(jax.jit, static_argnames=("interface", "capacity"))
def empty_bank(backbone: Backbone, interface: RouterInterface, capacity: int) -> Bank:
    """Return a bank that holds the backbone alone."""
    own = BankEntry(
        slots=tuple(backbone_slot(backbone, layer) for layer in interface.slots),
        scout=_pad(backbone.scout, interface),
        width=_width(backbone.scout),
        key=jnp.uint32(0),
    )
    zeros = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), own)
    bank = Bank(
        slots=zeros.slots,
        scouts=zeros.scout,
        width_E=zeros.width,
        alive_E=jnp.zeros(capacity, bool),
        key_E=jnp.full(capacity, 2**32 - 1, jnp.uint32),
    )
    filled: Bank = install(bank, 0, own)
    return filled


@functools.partial(jax.jit, donate_argnums=0)
def install(bank: Bank, index: jax.Array | int, entry: BankEntry) -> Bank:
    """Write an expert into an entry of the bank, in place.

    Args:
        bank: The bank; its arrays are donated and must not be used again.
        index: Which entry; traced, so that one compiled program serves all.
        entry: The expert.
    """
    put = functools.partial(jax.tree.map, lambda stack, one: stack.at[index].set(one))
    return Bank(
        slots=put(bank.slots, entry.slots),
        scouts=put(bank.scouts, entry.scout),
        width_E=put(bank.width_E, entry.width),
        alive_E=bank.alive_E.at[index].set(True),
        key_E=bank.key_E.at[index].set(entry.key),
    )


@functools.partial(jax.jit, donate_argnums=0)
def remove(bank: Bank, index: jax.Array | int) -> Bank:
    """Clear an entry in place: its arrays become zero and it counts as empty."""
    clear = functools.partial(jax.tree.map, lambda stack: stack.at[index].set(0))
    return Bank(
        slots=clear(bank.slots),
        scouts=clear(bank.scouts),
        width_E=clear(bank.width_E),
        alive_E=bank.alive_E.at[index].set(False),
        key_E=bank.key_E.at[index].set(jnp.uint32(2**32 - 1)),
    )


def grow(bank: Bank, capacity: int) -> Bank:
    """Return a copy of the bank with more entries."""
    more = capacity - bank.capacity

    def pad(stack: jax.Array, value: int = 0) -> jax.Array:
        widths = [(0, more)] + [(0, 0)] * (stack.ndim - 1)
        return jnp.pad(stack, widths, constant_values=jnp.asarray(value, stack.dtype))

    slots, scouts, width_E = jax.tree.map(pad, (bank.slots, bank.scouts, bank.width_E))
    return Bank(
        slots=slots,
        scouts=scouts,
        width_E=width_E,
        alive_E=jnp.pad(bank.alive_E, (0, more)),
        key_E=pad(bank.key_E, 2**32 - 1),
    )


def average_slots(bank: Bank) -> tuple[SlotMatrices, ...]:
    """Return the mean of the installed experts' bodies, without the backbone, for comparison.

    References:
        Wortsman et al. 2022, arXiv:2203.05482 (uniform soup).
    """
    weight_E = bank.alive_E.at[0].set(False).astype(jnp.float32)
    weight_E = weight_E / jnp.maximum(weight_E.sum(), 1)
    mean: tuple[SlotMatrices, ...] = jax.tree.map(
        lambda stack: jnp.einsum("E,E...->...", weight_E, stack), bank.slots
    )
    return mean


def entry_slots(bank: Bank, index: jax.Array | int) -> tuple[SlotMatrices, ...]:
    """Return the matrices of one entry of the bank, for every slot."""
    return tuple({name: slot[name][index] for name in MATRICES} for slot in bank.slots)


def view_entry(bank: Bank, index: int) -> tuple[SlotMatrices, ...]:
    """Return the matrices of one entry as arrays of their own, on a CPU without copying them.

    As long as such an array is in use, `install` and `remove` copy the bank instead of writing into
    it in place.
    """
    slots: tuple[SlotMatrices, ...]
    slots = jax.tree.map(lambda stack: _view(stack, index), bank.slots)
    return slots


def _view(stack: jax.Array, index: int) -> jax.Array:
    """Return one index of an array's first axis; on a CPU it shares the memory, where aligned."""
    device, *more = stack.devices()
    if more or device.platform != "cpu":
        return stack[index]
    try:
        host = np.from_dlpack(cast(Any, stack))
    except RuntimeError:  # numpy has no bfloat16 of its own, so the array makes its own view
        host = np.asarray(stack)
    # Committed to its device only if the stack is: otherwise another program would be compiled.
    place = stack.sharding if stack.committed else None
    own_DF: jax.Array = jax.device_put(host[index], place, may_alias=True)
    return own_DF


def _width(scout: Scout) -> jax.Array:
    width: jax.Array = jnp.int32(scout.b_in[...].shape[0])
    return width


def _pad(scout: Scout, interface: RouterInterface) -> ScoutBank:
    """Return a scout with its hidden width padded to the interface's bound."""
    more = interface.scout_max_width - scout.b_in[...].shape[0]
    return ScoutBank(
        jnp.pad(scout.w_in[...], ((0, 0), (0, more))).astype(jnp.float32),
        jnp.pad(scout.b_in[...], (0, more)).astype(jnp.float32),
        jnp.pad(scout.w_out[...], ((0, more), (0, 0))).astype(jnp.float32),
        scout.b_out[...].astype(jnp.float32),
    )
