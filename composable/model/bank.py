"""The bank: installed bodies and scouts, stacked for the device, with spare capacity.

Entry 0 is the backbone. Installing writes one entry in place (the old arrays are donated) at a
traced index, and removing clears it; neither compiles anything.

A bank has room for full matrices, for the factors of low-rank bodies up to a rank, or for both. A
low-rank body is kept as factors where there is room for them, and merged into full matrices
elsewhere.

On a mesh with devices along `expert`, bodies are split over them by entry; scouts are not. Inside
`split_batch` a bank then has the bodies of this device's entries, and everything else of all.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from composable.errors import ModelError
from composable.interface import RouterInterface
from composable.kernels import quantize_like, widen
from composable.model.backbone import Backbone
from composable.model.body import MATRICES, Body, SlotChanges, SlotMatrices, backbone_slot
from composable.model.router import ScoutBank
from composable.model.scout import Scout
from composable.parallel import keep_entries_split, read_entry

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Bank:
    """Stacked experts.

    Args:
        slots: For every slot of the interface, in order, its matrices stacked over E: "w_gate" and
            "w_up" of shape EDF, "w_down" of shape EFD. Without room for full matrices there is the
            backbone's entry alone.
        changes: For every slot, the low-rank changes of the backbone's matrices, stacked over E:
            pairs of shape EDR and ERF, EFR and ERD for "w_down"; zero for entries that are not
            low-rank. Empty without room for them.
        is_changed_E: Which entries are low-rank changes.
        scouts: Stacked scouts.
        width_E: Hidden units of each scout before it was padded; 0 where there is none.
        alive_E: Which entries hold an expert.
        key_E: Each expert's own number, which settles ties; the backbone's is 0.
        has_full: Whether there is room for full matrices.
    """

    slots: tuple[SlotMatrices, ...]
    changes: tuple[SlotChanges, ...]
    is_changed_E: jax.Array
    scouts: ScoutBank
    width_E: jax.Array
    alive_E: jax.Array
    key_E: jax.Array
    has_full: bool = field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Number of entries, the backbone's included."""
        return int(self.alive_E.shape[0])

    @property
    def n_bodies(self) -> int:
        """Number of bodies that there is room for, the backbone's included; see `number_bodies`."""
        both = bool(self.changes) and self.has_full
        return 2 * self.capacity - 1 if both else self.capacity

    def number_bodies(self, entry: jax.typing.ArrayLike) -> jax.Array:
        """Return the numbers of the bodies of entries: the backbone's, then changes, then full.

        Args:
            entry: Indices of entries; E for none, which becomes `n_bodies`.
        """
        entry = jnp.asarray(entry)
        if self.n_bodies == self.capacity:
            return entry
        is_full = ~jnp.take(self.is_changed_E, entry, mode="fill", fill_value=False)
        body_E: jax.Array = entry + jnp.where(is_full & (entry > 0), self.capacity - 1, 0)
        return body_E

    @property
    def rank(self) -> int:
        """Largest rank R that is kept as factors, 0 without room for any."""
        return int(self.changes[0]["w_gate"][0].shape[-1]) if self.changes else 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BankEntry:
    """One expert in the form that the bank stores.

    Args:
        slots: For every slot its full matrices; empty for a low-rank change.
        changes: For every slot its low-rank change; empty otherwise.
        scout: The scout, padded to the interface's widest.
        width: Its hidden units before that.
        key: The expert's own number, at least 1.
    """

    slots: tuple[SlotMatrices, ...]
    changes: tuple[SlotChanges, ...]
    scout: ScoutBank
    width: jax.Array
    key: jax.Array


def make_entry(
    backbone: Backbone,
    interface: RouterInterface,
    body: Body,
    scout: Scout,
    key: int,
    *,
    rank: int = 0,
) -> BankEntry:
    """Return an expert as a bank stores it: body merged unless it is kept as factors, scout padded.

    Args:
        backbone: The frozen backbone.
        interface: Its contract.
        body: The expert's body.
        scout: Its scout.
        key: Its own number.
        rank: The bank's rank; a low-rank body of at most this rank is kept as factors.

    Raises:
        ModelError: For a low-rank body that would have to be merged into quantized matrices.
    """
    is_change, layers = 0 < body.rank <= rank, interface.slots
    slots = () if is_change else tuple(_merge(backbone, body, layer) for layer in layers)
    changes = tuple(body.changes(backbone, layer, rank) for layer in layers) if is_change else ()
    # Put there as they are, which needs no program; `jnp.uint32` would.
    width, number = jax.device_put((np.int32(_width(scout)), np.uint32(key)))
    return BankEntry(
        slots=slots,
        changes=changes,
        scout=pad_scout(scout, interface),
        width=width,
        key=number,
    )


def _merge(backbone: Backbone, body: Body, layer: int) -> SlotMatrices:
    """Return the full matrices of one slot, kept as the backbone's are."""
    kept = backbone.cfg.matrix_dtype
    if kept is not None and body.rank:  # most of its change would be rounded away
        raise ModelError(
            f"a body of rank {body.rank} cannot be merged into matrices of {kept}",
            hint="make room for its factors: Model(..., factor_rank=RANK)",
        )
    own = backbone_slot(backbone, layer)
    return {name: quantize_like(w, own[name]) for name, w in body.merged(backbone, layer).items()}


@functools.partial(jax.jit, static_argnames=("interface", "capacity", "rank", "has_full"))
def empty_bank(
    backbone: Backbone,
    interface: RouterInterface,
    capacity: int,
    *,
    rank: int = 0,
    has_full: bool = True,
) -> Bank:
    """Return a bank that holds the backbone alone.

    Args:
        backbone: The frozen backbone.
        interface: Its contract.
        capacity: Number of entries, the backbone's included.
        rank: Largest rank of low-rank bodies that are kept as factors; 0 makes no room for them.
        has_full: Whether to make room for full matrices.
    """
    own = BankEntry(
        slots=tuple(backbone_slot(backbone, layer) for layer in interface.slots),
        changes=(),
        scout=pad_scout(backbone.scout, interface),
        width=jnp.int32(_width(backbone.scout)),
        key=jnp.uint32(0),
    )

    def stack(array: jax.Array, n: int = capacity) -> jax.Array:
        return jnp.zeros((n, *array.shape), array.dtype)

    rows = capacity if has_full else 1
    bank = Bank(
        slots=jax.tree.map(lambda matrix: stack(matrix, rows), own.slots),
        changes=_empty_changes(own.slots, capacity, rank),
        is_changed_E=jnp.zeros(capacity, bool),
        scouts=jax.tree.map(stack, own.scout),
        width_E=stack(own.width),
        alive_E=jnp.zeros(capacity, bool),
        key_E=jnp.full(capacity, 2**32 - 1, jnp.uint32),
        has_full=has_full,
    )
    filled: Bank = install(bank, 0, own)
    return filled


@functools.partial(jax.jit, donate_argnums=0)
def install(bank: Bank, index: jax.Array | int, entry: BankEntry) -> Bank:
    """Write an expert into an entry of the bank, in place.

    Args:
        bank: The bank; its arrays are donated and must not be used again.
        index: Which entry; traced, so that one compiled program serves all.
        entry: The expert, in a form that the bank has room for.
    """
    put = functools.partial(jax.tree.map, lambda stack, one: stack.at[index].set(one))
    return Bank(
        slots=keep_entries_split(put(bank.slots, entry.slots) if entry.slots else bank.slots),
        changes=keep_entries_split(
            put(bank.changes, entry.changes) if entry.changes else bank.changes
        ),
        is_changed_E=bank.is_changed_E.at[index].set(bool(entry.changes)),
        scouts=put(bank.scouts, entry.scout),
        width_E=put(bank.width_E, entry.width),
        alive_E=bank.alive_E.at[index].set(True),
        key_E=bank.key_E.at[index].set(entry.key),
        has_full=bank.has_full,
    )


@functools.partial(jax.jit, donate_argnums=0)
def remove(bank: Bank, index: jax.Array | int) -> Bank:
    """Clear an entry in place: its arrays become zero and it counts as empty."""
    clear = functools.partial(jax.tree.map, lambda stack: stack.at[index].set(0))
    return Bank(
        slots=keep_entries_split(clear(bank.slots) if bank.has_full else bank.slots),
        changes=keep_entries_split(clear(bank.changes)),
        is_changed_E=bank.is_changed_E.at[index].set(False),
        scouts=clear(bank.scouts),
        width_E=clear(bank.width_E),
        alive_E=bank.alive_E.at[index].set(False),
        key_E=bank.key_E.at[index].set(jnp.uint32(2**32 - 1)),
        has_full=bank.has_full,
    )


@functools.partial(jax.jit, static_argnames=("capacity", "has_full"))
def grow(bank: Bank, capacity: int | None = None, *, has_full: bool = False) -> Bank:
    """Return a copy of the bank with more room.

    Args:
        bank: The bank.
        capacity: Number of entries; by default as many as before.
        has_full: Whether to make room for full matrices, if there is none.
    """
    capacity = bank.capacity if capacity is None else capacity
    rows = capacity if has_full or bank.has_full else 1

    def pad(stack: jax.Array, n_rows: int = capacity, value: int = 0) -> jax.Array:
        widths = [(0, n_rows - stack.shape[0])] + [(0, 0)] * (stack.ndim - 1)
        return jnp.pad(stack, widths, constant_values=jnp.asarray(value, stack.dtype))

    scouts, width_E, alive_E, is_changed_E = jax.tree.map(
        pad, (bank.scouts, bank.width_E, bank.alive_E, bank.is_changed_E)
    )
    return Bank(
        slots=keep_entries_split(jax.tree.map(lambda stack: pad(stack, rows), bank.slots)),
        changes=keep_entries_split(jax.tree.map(pad, bank.changes)),
        is_changed_E=is_changed_E,
        scouts=scouts,
        width_E=width_E,
        alive_E=alive_E,
        key_E=pad(bank.key_E, value=2**32 - 1),
        has_full=has_full or bank.has_full,
    )


def _empty_changes(
    own: tuple[SlotMatrices, ...], capacity: int, rank: int
) -> tuple[SlotChanges, ...]:
    """Return stacks of zero changes to matrices; none of rank zero."""
    if rank == 0:
        return ()
    return tuple(
        {
            name: (
                jnp.zeros((capacity, matrix.shape[0], rank), matrix.dtype),
                jnp.zeros((capacity, rank, matrix.shape[1]), matrix.dtype),
            )
            for name, matrix in slot.items()
        }
        for slot in own
    )


def average_slots(bank: Bank) -> tuple[SlotMatrices, ...]:
    """Return the mean of the installed experts' bodies, without the backbone, for comparison.

    References:
        Wortsman et al. 2022, arXiv:2203.05482 (uniform soup).
    """
    weight_E = bank.alive_E.at[0].set(False).astype(jnp.float32)
    weight_E = weight_E / jnp.maximum(weight_E.sum(), 1)
    # A change is an addition to the backbone's matrices, so it has these as well.
    full_E = jnp.where(bank.is_changed_E, 0, weight_E).at[0].set(weight_E @ bank.is_changed_E)

    def average(slot: int, name: str) -> jax.Array:
        stack = bank.slots[slot][name]
        array: jax.Array = jnp.einsum("E,E...->...", full_E[: stack.shape[0]], widen(stack))
        if bank.changes:
            a, b = bank.changes[slot][name]
            array = array + jnp.einsum("E,EDR,ERF->DF", weight_E, a, b)
        return array

    return tuple({name: average(i, name) for name in MATRICES} for i in range(len(bank.slots)))


def entry_slots(bank: Bank, index: jax.Array | int) -> tuple[SlotMatrices, ...]:
    """Return the full matrices of one entry of the bank, for every slot."""
    return tuple(merge_entry(bank, i, index) for i in range(len(bank.slots)))


def merge_entry(bank: Bank, slot: int, index: jax.Array | int) -> SlotMatrices:
    """Return the full matrices of one entry, or of an array of entries, in one slot.

    Args:
        bank: The bank.
        slot: Index of the slot, from 0.
        index: Index of the entry, or indices of several, shape E.
    """
    # A change is of the backbone's matrices, entry 0.
    is_own = bank.is_changed_E[jnp.asarray(index)] | (not bank.has_full)
    row = jnp.where(is_own, 0, index)

    def read(stack: Any, index: Any) -> Any:
        return jax.tree.map(lambda x: read_entry(x, index, bank.capacity), stack)

    own: Callable[[Any, Any], Any] = read if bank.has_full else operator.getitem
    merged: SlotMatrices = {name: own(bank.slots[slot][name], row) for name in MATRICES}
    if bank.changes:
        for name, (a, b) in bank.changes[slot].items():
            merged[name] = widen(merged[name]) + read(a, index) @ read(b, index)
    return merged


def view_entry(stacks: Tree, index: int) -> Tree:
    """Return one entry of a bank's stacked arrays, on a CPU without copying it.

    As long as such an array is in use, `install` and `remove` copy the bank instead of writing into
    it in place.

    Args:
        stacks: The `slots` or the `changes` of a bank.
        index: Index of the entry.
    """
    entry: Tree = jax.tree.map(lambda stack: _view(stack, index), stacks)
    return entry


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


def _width(scout: Scout) -> int:
    return int(scout.b_in[...].shape[0])


# One program: array by array, every shape would need its own.
@functools.partial(jax.jit, static_argnames="interface")
def pad_scout(scout: Scout, interface: RouterInterface) -> ScoutBank:
    """Return one scout's arrays, without E, its hidden width padded to the interface's bound.

    Args:
        scout: The scout.
        interface: The contract.
    """
    more = interface.scout_max_width - scout.b_in[...].shape[0]
    return ScoutBank(
        jnp.pad(scout.w_in[...], ((0, 0), (0, more))).astype(jnp.float32),
        jnp.pad(scout.b_in[...], (0, more)).astype(jnp.float32),
        jnp.pad(scout.w_out[...], ((0, more), (0, 0))).astype(jnp.float32),
        scout.b_out[...].astype(jnp.float32),
    )
