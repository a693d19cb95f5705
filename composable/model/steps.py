"""Steps of decoding: the programs that read tokens, and what the host decides between them.

Tokens run in two programs. The first runs the trunk and the router; the host reads which experts
were chosen, and passes their matrices to the second, which runs the upper layers. The second
program is therefore the same whichever experts there are, reads nothing but what it multiplies, and
does not grow with the bank. Inside one program a matrix would have to be sliced out of the bank,
and XLA's CPU backend copies what it slices.

In safe mode the second program is one path, and runs once for each that is awake. A path that
sleeps costs nothing: what it missed is kept as the trunk left it, and it catches up when it wakes.

This file does not draw tokens (`decoding.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from composable.model.bank import view_entry
from composable.model.body import SlotChanges, SlotMatrices, backbone_slot
from composable.model.chunks import Length, is_text, is_worth_a_chunk, take_last
from composable.model.composed import (
    Caches,
    Parts,
    TrunkPass,
    log_prior_of,
    run_trunk_and_scouts,
    writing_state,
)
from composable.model.config import DTYPE_NAMES
from composable.model.guard import Tally
from composable.model.layers import KVCache
from composable.model.mix import Bodies, MixState, Reading, mix_state, predict_mix, read_mix
from composable.model.occupancy import empty_occupancy, switch_targets
from composable.model.router import RouterState
from composable.model.safe import (
    PathOutputs,
    SafeState,
    mix_paths,
    run_path,
    safe_state,
    shortlist,
)
from composable.model.writer import Writer

T = TypeVar("T")

# Experts that the tokens of a chunk may choose together before their bodies are sliced out of the
# bank, which takes another program.
_FEW: Final = 4


class _Structure:
    """A tree structure that is hashed once; there is one object for equal ones."""

    def __init__(self, treedef: jax.tree_util.PyTreeDef) -> None:
        self.treedef = treedef


# Hashing and comparing the structure of a model takes a millisecond, too long for every token.
_structure_of = functools.lru_cache(maxsize=16)(_Structure)


@jax.tree_util.register_pytree_node_class
class FlatParts:
    """A model as a flat list of arrays, which jax flattens a hundred times faster than its modules.

    Args:
        parts: The model.
    """

    def __init__(self, parts: Parts) -> None:
        self._leaves, treedef = jax.tree.flatten(parts)
        self._structure = _structure_of(treedef)

    @property
    def parts(self) -> Parts:
        """The model."""
        parts: Parts = jax.tree.unflatten(self._structure.treedef, self._leaves)
        return parts

    def tree_flatten(self) -> tuple[list[Any], _Structure]:
        """Split into arrays and structure, for jax."""
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, leaves: Iterable[Any]) -> Self:
        """Rebuild from what `tree_flatten` returned, for jax."""
        flat = object.__new__(cls)
        flat._leaves, flat._structure = list(leaves), structure
        return flat


class Entries:
    """The bodies in a bank, as arrays of their own.

    Args:
        parts: The model.
    """

    def __init__(self, parts: Parts) -> None:
        backbone, interface = parts.backbone, parts.interface
        own = tuple(backbone_slot(backbone, layer) for layer in interface.slots)
        self._bank = parts.bank
        self._is_changed_E = np.asarray(parts.bank.is_changed_E)
        self._full: dict[int, tuple[SlotMatrices, ...]] = {0: own}
        self._changes: dict[int, tuple[SlotChanges, ...]] = {}

    def __getitem__(self, index: int) -> tuple[SlotMatrices, ...] | tuple[SlotChanges, ...]:
        """Return the slots of an entry, in the form that the bank keeps them in."""
        return self.changes(index) if self._is_changed_E[index] else self.full(index)

    def full(self, index: int) -> tuple[SlotMatrices, ...]:
        """Return the matrices of an entry."""
        if index not in self._full:
            self._full[index] = view_entry(self._bank.slots, index)
        return self._full[index]

    def changes(self, index: int) -> tuple[SlotChanges, ...]:
        """Return the factors of an entry; zeros if it is not low-rank."""
        if index not in self._changes:
            self._changes[index] = view_entry(self._bank.changes, index)
        return self._changes[index]


class MixSteps:
    """Reads one sequence in mix mode.

    Args:
        parts: The model.
        cache_length: Positions in the caches.
    """

    def __init__(self, parts: Parts, cache_length: int) -> None:
        self._flat, self._entries = FlatParts(parts), Entries(parts)
        self._bank = parts.bank
        self._is_changed_E = np.asarray(parts.bank.is_changed_E)
        self._n_few = min(parts.bank.capacity, max(parts.interface.n_mixed, _FEW))
        self._state: MixState
        self._state, body_E = _start_mix(self._flat, cache_length)
        self._body_E = np.asarray(body_E)
        # Where these are few, no step waits until the host knows which of them it chose.
        self._bodies_of_all = self._gather(np.flatnonzero(parts.bank.alive_E).tolist())
        self._last: tuple[list[int], Bodies | None] = ([], None)

    @property
    def tally(self) -> Tally:
        """Contributions of every expert so far."""
        return self._state.tally

    def advance(
        self, tokens_BT: jax.Array, is_drawn: bool, length: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Read tokens of one sequence.

        Args:
            tokens_BT: Token ids that continue it.
            is_drawn: Whether the model drew them.
            length: How many there are before padding; None without room for padding.

        Returns:
            Logits of the next token, shape V, and the router weights for it, shape E.
        """
        caches = self._state.caches
        assert caches is not None
        lower = self._state._replace(caches=caches._replace(upper=()))
        reading, lower = _read(self._flat, tokens_BT, lower, is_drawn, _on_device(length))
        bodies = self._bodies_of_all or self._gather_chosen(reading.choice.expert_BTJ)
        trunk = lower.caches.trunk
        upper = lower._replace(caches=lower.caches._replace(trunk=(), upper=caches.upper))
        logits_V, weight_E, upper = _predict(self._flat, reading, upper, is_drawn, bodies)
        self._state = upper._replace(caches=upper.caches._replace(trunk=trunk))
        return logits_V, weight_E

    def start_writing(self) -> None:
        """Do nothing: mix mode writes with the logits that `advance` returned."""

    def _gather_chosen(self, expert_BTJ: jax.Array) -> Bodies | None:
        """Return the bodies of the experts that a reading chose; tokens often choose alike."""
        chosen = np.unique(np.asarray(expert_BTJ))
        experts = chosen[chosen < self._bank.capacity].tolist()
        if experts != self._last[0]:
            self._last = experts, self._gather(experts)
        return self._last[1]

    def _gather(self, experts: list[int]) -> Bodies | None:
        """Return the bodies of experts, always as many; None if they are too many.

        The backbone's own matrices are those of all low-rank changes, so where the bank has room
        for any it is not among the full bodies.
        """
        changed = [e for e in experts if self._is_changed_E[e]]
        first = 1 if self._bank.changes else 0
        full = [e for e in experts if e >= first and not self._is_changed_E[e]]
        if max(len(changed), len(full)) > self._n_few:
            return None
        n_full = self._n_few if self._bank.has_full else 0
        n_changed = self._n_few if self._bank.changes else 0
        changed_A, changes = self._fill(changed, n_changed, self._entries.changes)
        full_A, slots = self._fill(full, n_full, self._entries.full)
        number_A = np.array([*([0] if changes else []), *changed_A, *full_A], np.int32)
        return Bodies(jax.device_put(number_A), changes, slots)

    def _fill(
        self, experts: list[int], n: int, read: Callable[[int], T]
    ) -> tuple[list[int], tuple[T, ...]]:
        """Return numbers and slots of `n` bodies: those of experts, then some that stand for none.

        The slots of those are not read.
        """
        missing = n - len(experts)
        numbers = [*self._body_E[experts].tolist(), *[self._bank.n_bodies] * missing]
        return numbers, tuple(read(e) for e in [*experts, *[0] * missing])


class _Path(NamedTuple):
    """A path that has been awake: its caches, and how many positions they hold."""

    caches: tuple[KVCache, ...]
    n_filled: int


class _SafeReading(NamedTuple):
    """Results for some tokens before any path runs."""

    trunk: TrunkPass
    awake_BTE: jax.Array  # which paths predict the next tokens, in the order of keys
    router: RouterState  # after the tokens


class _PathReading(NamedTuple):
    """What is kept of one path's predictions for the tokens after some positions."""

    given_BT: jax.Array  # log-probability of the token that follows; of any value at the last
    log_prob_BTV: jax.Array  # after every position, or after the last alone where that suffices
    is_finite_BT: jax.Array


class _Predictions(NamedTuple):
    """Predictions of a fixed number of paths; a path of number E stands for none."""

    path_A: np.ndarray
    readings: tuple[_PathReading, ...]


class _Piece(NamedTuple):
    """What the prediction after some tokens is made of."""

    tokens_BT: jax.Array
    reading: _SafeReading
    state: SafeState  # before the tokens
    before: _Predictions
    now: _Predictions


class SafeSteps:
    """Reads one sequence in safe mode.

    Args:
        parts: The model.
        cache_length: Positions in the caches.
        seed: Seed by which the paths that write are drawn; the likeliest path writes where None.
    """

    def __init__(self, parts: Parts, cache_length: int, seed: int | None = None) -> None:
        interface, capacity = parts.interface, parts.bank.capacity
        self._flat, self._entries, self._backbone = FlatParts(parts), Entries(parts), parts.backbone
        # Paths are numbered in the order of their experts' keys, as in `safe.py`.
        self._entry_of = np.argsort(np.asarray(parts.bank.key_E), kind="stable").tolist()
        self._n_awake = 1 + min(interface.top_k, capacity - 1)
        self._cache_length, self._n_read, self._chunk = cache_length, 0, 1
        self._trunk = tuple(self._empty_caches(range(parts.backbone.cfg.tap)))
        self._state: SafeState = _start_safe(self._flat)
        dtype = DTYPE_NAMES[parts.backbone.cfg.dtype]
        self._x_BSD = jnp.zeros((1, cache_length, interface.d_model), dtype)
        self._paths: dict[int, _Path] = {}
        none = _PathReading(
            jnp.zeros((1, 1), jnp.float32),
            jnp.zeros((1, 1, interface.vocab_size), jnp.float32),
            jnp.ones((1, 1), bool),
        )
        self._before = self._gather({0: none}, self._n_awake)
        self._seed = seed
        self._writer: Writer | None = None
        self._piece: _Piece | None = None

    @property
    def tally(self) -> Tally:
        """Contributions of every expert so far."""
        return self._state.tally

    def advance(
        self, tokens_BT: jax.Array, is_drawn: bool, length: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Read tokens of one sequence; arguments and results as for `MixSteps`.

        Tokens that the model drew are read by the path that writes alone.
        """
        if is_drawn and self._writer is None:
            self.start_writing()
        elif not is_drawn and self._writer is not None:
            self._wake_paths()
        position = self._n_read
        reading, self._trunk, self._x_BSD = _read_safe(
            *(self._flat, tokens_BT, self._state.router, self._trunk),
            *(self._x_BSD, np.int32(position), is_drawn, _on_device(length)),
        )
        size = tokens_BT.shape[1]
        n_tokens = size if length is None else length
        self._n_read, self._chunk = position + n_tokens, max(self._chunk, size)
        self._shortlist_BTE, self._last = reading.awake_BTE, n_tokens - 1
        if self._writer is not None:
            self._writer.move(self._n_read)
            reading = self._let_write(reading)
        awake_TE = np.asarray(reading.awake_BTE[0])
        outputs = {
            path: self._run_path(path, reading.trunk.x_BTD, tokens_BT, position, n_tokens)
            for path in np.flatnonzero(awake_TE.any(axis=0)).tolist()
        }
        width = self._n_awake if len(outputs) <= self._n_awake else len(self._entry_of)
        now = self._gather(outputs, width)
        self._piece = _Piece(tokens_BT, reading, self._state, self._before, now)
        logits_V, weight_E, self._state = _mix_paths(self._flat, *self._piece, is_drawn)
        self._weight_E = weight_E
        last = {
            path: _keep_last(outputs[path], np.int32(n_tokens))
            for path in np.flatnonzero(awake_TE[n_tokens - 1]).tolist()
        }
        self._before = self._gather(last, self._n_awake)
        return logits_V, weight_E

    def start_writing(self) -> tuple[jax.Array, jax.Array] | None:
        """Draw the path that writes what follows given text.

        Returns:
            Its logits for the next token, shape V, and the router weights, shape E; None if it
            writes already, so that `advance` returned them.
        """
        if self._writer is not None or self._piece is None:
            return None
        self._writer = Writer(
            np.asarray(self._weight_E)[self._entry_of],
            np.asarray(_targets(self._flat, self._state)),
            seed=self._seed,
            position=self._n_read,
        )
        piece = self._piece._replace(reading=self._let_write(self._piece.reading))
        logits_V, weight_E, _ = _mix_paths(self._flat, *piece, False)
        return logits_V, weight_E

    def _let_write(self, reading: _SafeReading) -> _SafeReading:
        """Return a reading in which only the path that writes predicts the token after it."""
        assert self._writer is not None
        length = reading.trunk.length
        last = -1 if length is None else int(length) - 1
        awake_BTE = np.array(reading.awake_BTE)
        awake_BTE[:, last] = np.arange(awake_BTE.shape[-1]) == self._writer.path
        return reading._replace(awake_BTE=jax.device_put(awake_BTE))

    def _wake_paths(self) -> None:
        """Let all paths of the shortlist predict the next token, which is evidence again."""
        awake_BE = np.asarray(self._shortlist_BTE)[:, self._last]
        last = self._n_read - 1
        x_BTD = _slice_positions(self._x_BSD, np.int32(last), 1)
        outputs = {
            path: self._run_path(path, x_BTD, _unread(1), last, 1)
            for path in np.flatnonzero(awake_BE[0]).tolist()
        }
        self._before = self._gather(outputs, self._n_awake)
        self._state = self._state._replace(awake_BE=jax.device_put(awake_BE))
        self._writer = None

    def _run_path(
        self,
        path: int,
        x_BTD: jax.Array,
        tokens_BT: jax.Array | np.ndarray,
        position: int,
        n_tokens: int,
    ) -> _PathReading:
        """Return what a path predicts after some tokens, when it has caught up."""
        slots = self._entries[self._entry_of[path]]
        caches, n_filled = self._paths.get(path) or _Path(
            tuple(self._empty_caches(self._backbone.cfg.slots)), 0
        )
        while n_filled < position:
            # By the program for chunks that the prompt was read with, if there is one.
            size = self._chunk if is_worth_a_chunk(position - n_filled, self._chunk) else 1
            # A chunk may repeat positions, or run ahead of those read; these are written again.
            start = np.int32(min(n_filled, self._cache_length - size))
            missed_BTD = _slice_positions(self._x_BSD, start, size)
            length = np.int32(size)
            _, caches = _run_path(
                self._flat, slots, missed_BTD, _unread(size), length, start, caches
            )
            n_filled = int(start) + size
        at, length = np.int32(position), np.int32(n_tokens)
        reading: _PathReading
        reading, caches = _run_path(self._flat, slots, x_BTD, tokens_BT, length, at, caches)
        self._paths[path] = _Path(caches, position + n_tokens)
        return reading

    def _gather(self, outputs: dict[int, _PathReading], n: int) -> _Predictions:
        """Return predictions by path as `n` of them, the last ones of no path."""
        missing = n - len(outputs)
        path_A = np.array([*outputs, *[len(self._entry_of)] * missing], np.int32)
        first = next(iter(outputs.values()))
        return _Predictions(path_A, (*outputs.values(), *[first] * missing))

    def _empty_caches(self, layers: Sequence[int]) -> list[KVCache]:
        return self._backbone.empty_caches(1, self._cache_length, layers)


def _unread(n_tokens: int) -> np.ndarray:
    """Return tokens for a path, whose predictions of them nobody reads."""
    return np.zeros((1, n_tokens), np.int32)


def _on_device(length: int | None) -> jax.Array | None:
    """Return the length of a text as an argument of a program."""
    return None if length is None else jax.device_put(np.int32(length))


# One program each: array by array, every shape would need its own.
@functools.partial(jax.jit, static_argnames="cache_length")
def _start_mix(flat: FlatParts, cache_length: int) -> tuple[MixState, jax.Array]:
    """Return the state before the first token, and the number of the body of every entry."""
    bank = flat.parts.bank
    return mix_state(flat.parts, 1, cache_length), bank.number_bodies(jnp.arange(bank.capacity))


@jax.jit
def _start_safe(flat: FlatParts) -> SafeState:
    router = writing_state(flat.parts, 1, is_decoding=True)
    state = safe_state(flat.parts, 1)._replace(router=router, log_prob_EBV=None)
    return state._replace(occupancy_BEO=empty_occupancy(1, flat.parts.bank.capacity))


@jax.jit
def _targets(flat: FlatParts, state: SafeState) -> jax.Array:
    """Return the weights that a switch leads to while the model writes, shape E."""
    parts = flat.parts
    prior_E = log_prior_of(parts)[jnp.argsort(parts.bank.key_E)]
    assert state.occupancy_BEO is not None
    return jnp.exp(switch_targets(state.occupancy_BEO, state.posterior_BE, prior_E))[0]


@functools.partial(jax.jit, donate_argnames="state")
def _read(
    flat: FlatParts,
    tokens_BT: jax.Array,
    state: MixState,
    is_drawn: jax.Array,
    length: Length = None,
) -> tuple[Reading, MixState]:
    return read_mix(flat.parts, tokens_BT, state, is_drawn, length=length)


@functools.partial(jax.jit, donate_argnames="state")
def _predict(
    flat: FlatParts,
    reading: Reading,
    state: MixState,
    is_drawn: jax.Array,
    bodies: Bodies | None,
) -> tuple[jax.Array, jax.Array, MixState]:
    logits_B1V, weight_B1E, state = predict_mix(
        flat.parts, reading, state, is_drawn, bodies, is_next_alone=True
    )
    return logits_B1V[0, 0], weight_B1E[0, 0], state


@functools.partial(jax.jit, donate_argnames=("trunk", "x_BSD"))
def _read_safe(
    flat: FlatParts,
    tokens_BT: jax.Array,
    router: RouterState,
    trunk: tuple[KVCache, ...],
    x_BSD: jax.Array,
    position: jax.Array,
    is_drawn: jax.Array,
    length: Length,
) -> tuple[_SafeReading, tuple[KVCache, ...], jax.Array]:
    """Run the trunk and the router, and keep the trunk's results for paths that sleep."""
    parts = flat.parts
    read, router, caches = run_trunk_and_scouts(
        parts, tokens_BT, router, Caches(trunk, (), position), is_drawn, length=length
    )
    assert caches is not None
    awake_BTE = shortlist(parts, read.track_BTE)[..., jnp.argsort(parts.bank.key_E)]
    if length is not None:
        awake_BTE &= is_text(tokens_BT.shape[1], length)[:, None]
    x_BSD = jax.lax.dynamic_update_slice_in_dim(x_BSD, read.x_BTD, position, axis=1)
    return _SafeReading(read, awake_BTE, router), caches.trunk, x_BSD


@functools.partial(jax.jit, donate_argnames="caches")
def _run_path(
    flat: FlatParts,
    slots: tuple[SlotMatrices, ...] | tuple[SlotChanges, ...],
    x_BTD: jax.Array,
    tokens_BT: jax.Array,
    length: Length,
    position: jax.Array,
    caches: tuple[KVCache, ...],
) -> tuple[_PathReading, tuple[KVCache, ...]]:
    """Run a path on tokens, as many of which as `length` says are text."""
    log_prob_BTV, is_finite_BT, caches = run_path(flat.parts, slots, x_BTD, position, caches)
    next_BT1 = jnp.roll(tokens_BT, -1, axis=1)[..., None]
    given_BT = jnp.take_along_axis(log_prob_BTV, next_BT1, axis=-1)[..., 0]
    if flat.parts.interface.output_mixture is None:
        log_prob_BTV = take_last(log_prob_BTV, length)[:, None]
    return _PathReading(given_BT, log_prob_BTV, is_finite_BT), caches


@jax.jit
def _keep_last(reading: _PathReading, length: Length) -> _PathReading:
    """Return what is kept of a reading for the token after the last position of the text."""

    def keep(x_BT: jax.Array) -> jax.Array:
        # What was kept after the last position alone has no other one.
        return take_last(x_BT, length)[:, None]

    kept: _PathReading = jax.tree.map(keep, reading)
    return kept


@functools.partial(jax.jit, static_argnames="n_tokens")
def _slice_positions(x_BSD: jax.Array, position: jax.Array, n_tokens: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_BSD, position, n_tokens, axis=1)


@jax.jit
def _mix_paths(
    flat: FlatParts,
    tokens_BT: jax.Array,
    reading: _SafeReading,
    state: SafeState,
    before: _Predictions,
    now: _Predictions,
    is_drawn: jax.Array,
) -> tuple[jax.Array, jax.Array, SafeState]:
    """Return the mixture's log-probabilities of the next token, V, weights E, and the state."""
    n_paths, n_tokens = reading.awake_BTE.shape[-1], tokens_BT.shape[1]
    log_prob_EBT = jnp.zeros((n_paths, 1, n_tokens), jnp.float32)
    # The prediction of token t is the one that each path made one position earlier.
    first_ABT = jnp.stack(
        [
            jnp.take_along_axis(one.log_prob_BTV, tokens_BT[:, :1, None], axis=-1)[..., 0]
            for one in before.readings
        ]
    )
    log_prob_EBT = log_prob_EBT.at[before.path_A, :, :1].set(first_ABT, mode="drop")
    given_ABT, log_prob_ABTV, is_finite_ABT = jax.tree.map(lambda *x: jnp.stack(x), *now.readings)
    log_prob_EBT = log_prob_EBT.at[now.path_A, :, 1:].set(given_ABT[:, :, :-1], mode="drop")
    outputs = PathOutputs(jnp.asarray(now.path_A), reading.awake_BTE, log_prob_ABTV, is_finite_ABT)
    log_prob_BTV, weight_BTE, state = mix_paths(
        flat.parts, reading.trunk, state, outputs, log_prob_EBT, is_drawn
    )
    length = reading.trunk.length
    # Of one position, the last is that one.
    log_prob_V, weight_E = take_last(log_prob_BTV, length)[0], take_last(weight_BTE, length)[0]
    return log_prob_V, weight_E, state._replace(router=reading.router)
