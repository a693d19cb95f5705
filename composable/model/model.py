"""`Model`: a composed model with expert names, checked inputs and compiled calls.

The arrays are in `parts`, a pytree for `jax.jit`, `grad` and `vmap`. A `Model` is a pytree too,
with its names and tokenizer as static data. The arithmetic is in `mix.py`, `safe.py` and
`composed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from composable.errors import InterfaceError, ModelError, TextError
from composable.interface import RouterInterface
from composable.model import bank as banks
from composable.model import composed
from composable.model import mix as mix_mode
from composable.model import safe as safe_mode
from composable.model.backbone import Backbone
from composable.model.body import Body, SlotMatrices
from composable.model.composed import Parts
from composable.model.decoding import Mode, continue_tokens
from composable.model.guard import Contributions, Tally, make_reporter, read_tally
from composable.model.sampling import Sampling
from composable.model.scout import Scout
from composable.model.text import Conversation, Piece, stop_before, to_pieces
from composable.model.tokenizer import ByteTokenizer, Tokenizer
from composable.parallel import place_rows, replicate_tree

BACKBONE = "backbone"
_Static = tuple[tuple[str | None, ...], Tokenizer, Mesh | None]


@dataclass(frozen=True, kw_only=True)
class Pluggable:
    """An expert that can be installed in a model.

    Args:
        name: Its name in `Model.names` and `Model.path`.
        body: Its body.
        scout: Its scout.
        key: A number of its own, from its digest, that settles exact ties between experts.
    """

    name: str
    body: Body
    scout: Scout
    key: int


@jax.tree_util.register_pytree_node_class
class Model:
    """A backbone with experts plugged in.

    Args:
        backbone: The frozen model.
        interface: Its contract.
        experts: What to plug in, in any order.
        capacity: Entries of the bank, the backbone's included; by default the next power of two.
            Installing within it compiles nothing.
        factor_rank: Low-rank bodies of at most this rank are kept as factors, which take little
            memory. The others are merged into full matrices, and by default all are. Outputs
            agree up to rounding. With factors only, the first body that is merged needs room that
            has to be made, which compiles the programs again. A backbone with quantized matrices
            merges none: there the default is the highest rank that its interface allows.
        tokenizer: The backbone's tokenizer; the one for bytes by default.
        mesh: Devices to run on; by default the one that jax chooses. Documents are split over all
            of them, and bodies over those along `expert`: each device holds its part of the bank,
            whose capacity is rounded up to a multiple of their number. Functions of your own that
            read `parts` run inside `jax.set_mesh(model.mesh)`.

    Raises:
        ModelError: If two experts have one name.
        InterfaceError: If the tokenizer is not the interface's.

    Example:
        >>> import composable as cx
        >>> model = cx.load("tiny-bytes", experts=[])  # a Model, with the backbone alone
        >>> model.names, model.context
        (('backbone',), 512)
    """

    def __init__(
        self,
        backbone: Backbone,
        interface: RouterInterface,
        experts: Sequence[Pluggable] = (),
        *,
        capacity: int | None = None,
        factor_rank: int | None = None,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.tokenizer: Tokenizer = tokenizer or ByteTokenizer()
        if self.tokenizer.digest != interface.tokenizer:
            raise InterfaceError(
                f"the tokenizer given has digest {self.tokenizer.digest}, "
                f"expected {interface.tokenizer}",
                where="interface.tokenizer",
                hint="a backbone package has its own: tokenizer=loaded.tokenizer",
            )
        if factor_rank is None:
            factor_rank = interface.lora_max_rank if backbone.cfg.matrix_dtype else 0
        needed = len(experts) + 1
        capacity = max(capacity or 1, _power_of_two(needed))
        # How a body is kept depends on nothing else that is installed: no bit of its output may.
        has_full = not factor_rank or not all(0 < e.body.rank <= factor_rank for e in experts)
        self.mesh = mesh
        if mesh is not None:
            n_devices = mesh.shape["expert"]
            capacity = -(-capacity // n_devices) * n_devices
            backbone = replicate_tree(backbone, mesh)
        with self._use_mesh():
            bank = banks.empty_bank(
                backbone, interface, capacity, rank=factor_rank, has_full=has_full
            )
        self.parts = Parts(backbone=backbone, bank=bank, interface=interface)
        self.names: tuple[str | None, ...] = (BACKBONE,) + (None,) * (capacity - 1)
        for expert in sorted(experts, key=lambda expert: expert.name):
            self.install(expert)

    def tree_flatten(self) -> tuple[tuple[Parts], _Static]:
        """Split into arrays, and names, tokenizer and mesh, for jax."""
        return (self.parts,), (self.names, self.tokenizer, self.mesh)

    @classmethod
    def tree_unflatten(cls, static: _Static, children: tuple[Parts]) -> Model:
        """Rebuild from what `tree_flatten` returned, for jax."""
        model = object.__new__(cls)
        (model.parts,) = children
        model.names, model.tokenizer, model.mesh = static
        return model

    @property
    def interface(self) -> RouterInterface:
        """The contract that its experts fit."""
        return self.parts.interface

    @property
    def experts(self) -> list[str]:
        """Names of the installed experts, sorted."""
        return sorted(name for name in self.names[1:] if name is not None)

    @property
    def context(self) -> int:
        """Longest sequence, in tokens."""
        return self.parts.backbone.cfg.context

    def install(self, expert: Pluggable) -> None:
        """Plug an expert in; within the bank's capacity this compiles nothing.

        Raises:
            ModelError: If its name is taken.
        """
        if expert.name in self.names:
            raise ModelError(f"an expert named {expert.name!r} is already plugged in")
        backbone, interface, bank = self.parts.backbone, self.interface, self.parts.bank
        with self._use_mesh():
            if None not in self.names:
                bank = banks.grow(bank, 2 * bank.capacity)
                self.names += (None,) * (bank.capacity - len(self.names))
            index = self.names.index(None)
            if not bank.has_full and not 0 < expert.body.rank <= bank.rank:
                bank = banks.grow(bank, has_full=True)
            body, scout = expert.body, expert.scout
            if self.mesh is not None:
                body, scout = replicate_tree((body, scout), self.mesh)
            entry = banks.make_entry(backbone, interface, body, scout, expert.key, rank=bank.rank)
            bank = banks.install(bank, index, entry)
        self.parts = Parts(backbone=backbone, bank=bank, interface=interface)
        self.names = (*self.names[:index], expert.name, *self.names[index + 1 :])

    def remove(self, name: str) -> None:
        """Unplug an expert.

        Raises:
            ModelError: If no such expert is plugged in.
        """
        index = self._index(name, experts_only=True)
        with self._use_mesh():
            bank = banks.remove(self.parts.bank, index)
        self.parts = Parts(backbone=self.parts.backbone, bank=bank, interface=self.interface)
        self.names = (*self.names[:index], None, *self.names[index + 1 :])

    def __call__(self, tokens_BT: jax.typing.ArrayLike) -> jax.Array:
        """Return logits in mix mode.

        Args:
            tokens_BT: Token ids of whole documents or their first parts, as `encode` returns them.

        Returns:
            Logits of the next token, shape BTV float32.

        Raises:
            ModelError: If the tokens do not have two dimensions, or are not integers.
            TrainingError: If their rows do not divide among the devices of the mesh.
            TextError: If they are longer than the context.
        """
        logits_BTV: jax.Array = self._run(_mix, tokens_BT)
        return logits_BTV

    def safe(self, tokens_BT: jax.typing.ArrayLike) -> jax.Array:
        """Return log-probabilities in safe mode, shape BTV; `model.safe.safe` states its bound."""
        log_prob_BTV: jax.Array = self._run(_safe, tokens_BT)
        return log_prob_BTV

    def route(self, tokens_BT: jax.typing.ArrayLike) -> jax.Array:
        """Return the router weights per token and expert, shape BTE.

        Entry e belongs to `names[e]`; the backbone comes first.
        """
        weight_BTE: jax.Array = self._run(_route, tokens_BT)
        return weight_BTE

    def path(self, tokens_BT: jax.typing.ArrayLike, name: str = BACKBONE) -> jax.Array:
        """Return logits, shape BTV, with one expert or the backbone active at every token."""
        logits_BTV: jax.Array = self._run(_path, tokens_BT, self._index(name))
        return logits_BTV

    def contributions(self, tokens_BT: jax.typing.ArrayLike) -> dict[str, Contributions]:
        """Return how many contributions of each expert mix mode makes and counts as zero.

        A contribution is the output of a body in one slot at one token. If it is not finite, or
        exceeds the interface's bound, it counts as zero and its weight goes to the token's other
        choices. A vetted expert should have none.
        """
        return read_tally(self.names, self._run(_tally, tokens_BT))

    def average_slots(self) -> tuple[SlotMatrices, ...]:
        """Return the mean of the installed bodies: a merge to compare composition with."""
        return banks.average_slots(self.parts.bank)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return tokens_T of a text, the start token first."""
        return self.tokenizer.encode(text)

    def stream(
        self,
        prompt: str,
        max_tokens: int = 100,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        mode: Mode = "mix",
    ) -> Iterator[Piece]:
        """Yield the continuation of a prompt piece by piece, with the router weights of each.

        Arguments as for `generate`; entry e of the weights belongs to `names[e]`. At the end, each
        expert whose contributions counted as zero is reported in a `ContributionWarning`.
        """
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        tokens_T = self.encode(prompt)
        drawn = continue_tokens(
            self.parts,
            self.tokenizer,
            tokens_T,
            max_tokens,
            sampling=sampling,
            mode=mode,
            report=make_reporter(self.names),
        )
        return stop_before(to_pieces(drawn, self.tokenizer, tokens_T), stop)

    def converse(
        self,
        system: str = "",
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        mode: Mode = "mix",
    ) -> Conversation:
        """Return a fresh conversation with the model; arguments as for `generate`."""
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        return Conversation(
            self.parts,
            self.tokenizer,
            system=system,
            sampling=sampling,
            mode=mode,
            report=make_reporter(self.names),
        )

    def _use_mesh(self) -> AbstractContextManager[Any]:
        """Return a context in which programs run on the model's devices."""
        is_set = self.mesh is None or not jax.sharding.get_abstract_mesh().empty
        return nullcontext() if is_set else jax.set_mesh(self.mesh)

    def _run(self, fn: Callable[..., Any], tokens: jax.typing.ArrayLike, *more: Any) -> Any:
        """Return `fn` of parts and tokens, computed on the model's devices."""
        tokens_BT = self._checked(tokens)
        if self.mesh is not None and not isinstance(tokens_BT, jax.core.Tracer):
            tokens_BT = place_rows(tokens_BT, self.mesh)
        with self._use_mesh():
            return fn(self.parts, tokens_BT, *more)

    def _index(self, name: str, experts_only: bool = False) -> int:
        if name not in self.names or (experts_only and name == BACKBONE):
            plugged = ", ".join(self.experts) or "none"
            raise ModelError(f"no expert named {name!r} is plugged in (there are: {plugged})")
        return self.names.index(name)

    def _checked(self, tokens: jax.typing.ArrayLike) -> jax.Array:
        tokens_BT = jnp.asarray(tokens)
        is_batch = tokens_BT.ndim == 2 and tokens_BT.size > 0
        if not is_batch or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise ModelError(
                f"tokens of shape {tokens_BT.shape} and dtype {tokens_BT.dtype}, expected whole "
                "numbers of shape (B, T)",
                hint="model.encode(text)[None] is a batch of one",
            )
        if tokens_BT.shape[1] > self.context:
            raise TextError(
                f"{tokens_BT.shape[1]} tokens do not fit the context of {self.context}",
                hint="cut the text, or score it in windows with composable.vetting",
            )
        return tokens_BT


def generate(
    model: Model,
    prompt: str,
    max_tokens: int = 100,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    mode: Mode = "mix",
) -> str:
    """Return the continuation of a prompt.

    Args:
        model: The model.
        prompt: Text to continue, not empty.
        max_tokens: Largest number of tokens to generate.
        temperature: Softmax temperature, at least 0; 0 selects the likeliest token.
        top_k: Draw only from this many likeliest tokens; 0 is no limit.
        top_p: Draw only from the likeliest tokens whose probabilities add up to this, in (0, 1].
        min_p: Draw only from tokens at least this many times as probable as the likeliest, in
            [0, 1].
        repetition_penalty: Makes tokens of the prompt or the continuation so far less likely if
            over 1, also at temperature 0; positive. `Sampling` has the details.
        stop: Strings before which the text ends.
        seed: Seed of the draws.
        mode: "mix" or "safe".

    Raises:
        TextError: If the prompt is empty, or prompt and continuation do not fit the context.
        ModelError: For a setting out of its range.

    Example:
        >>> import composable as cx
        >>> model = cx.load("tiny-bytes", experts=[])
        >>> len(generate(model, "The President of the ", max_tokens=4))
        4
    """
    pieces = model.stream(
        prompt,
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
        mode=mode,
    )
    return "".join(piece.text for piece in pieces)


@jax.jit
def _mix(parts: Parts, tokens_BT: jax.Array) -> jax.Array:
    return mix_mode.mix(parts, tokens_BT, mix_mode.mix_state(parts, tokens_BT.shape[0]))[0]


@jax.jit
def _tally(parts: Parts, tokens_BT: jax.Array) -> Tally:
    return mix_mode.mix(parts, tokens_BT, mix_mode.mix_state(parts, tokens_BT.shape[0]))[1].tally


@jax.jit
def _route(parts: Parts, tokens_BT: jax.Array) -> jax.Array:
    return mix_mode.route(parts, tokens_BT, mix_mode.mix_state(parts, tokens_BT.shape[0]))[0]


@jax.jit
def _safe(parts: Parts, tokens_BT: jax.Array) -> jax.Array:
    return safe_mode.safe(parts, tokens_BT, safe_mode.safe_state(parts, tokens_BT.shape[0]))[0]


@jax.jit
def _path(parts: Parts, tokens_BT: jax.Array, index: jax.Array) -> jax.Array:
    return composed.path(parts, tokens_BT, banks.entry_slots(parts.bank, index))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
