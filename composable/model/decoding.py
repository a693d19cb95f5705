"""Continuing tokens: prefill in chunks, then one token at a time with KV cache and router state.

Two compiled programs serve any text, one for a chunk of fixed length and one for a single token;
each also draws the next token. The next step is dispatched before the host reads the token that was
drawn, so the device never waits for the host. Turning tokens into text is left to `text.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from composable.errors import ModelError, TextError
from composable.model.composed import Parts
from composable.model.guard import Tally
from composable.model.mix import mix_state, trace_mix
from composable.model.safe import safe_state, trace_safe
from composable.model.tokenizer import Tokenizer

Mode = Literal["mix", "safe"]
PREFILL: Final = 32
# The number of positions in a cache is a power of two, and at least this: shorter texts share one
# compilation, longer ones need one per doubling.
_MIN_CACHE: Final = 1024
_MODES: Final[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "mix": (trace_mix, mix_state),
    "safe": (trace_safe, safe_state),
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for drawing the next token; those of transformers, with the same meaning.

    They apply in the order of transformers: repetition penalty, temperature, top k, top p, min p.
    At temperature 0 only the repetition penalty has an effect. Scores are logits in mix mode, and
    log-probabilities, which are never positive, in safe mode.

    Args:
        temperature: Softmax temperature, at least 0 and finite; 0 selects the likeliest token.
        top_k: Draw only from this many likeliest tokens, and from those that tie with the last of
            them; at least 0, where 0 is no limit.
        top_p: Draw only from the likeliest tokens whose probabilities add up to this, in (0, 1].
        min_p: Draw only from tokens that are at least this many times as probable as the likeliest,
            in [0, 1]; 0 is no limit.
        repetition_penalty: Positive scores of tokens of the prompt or the continuation so far are
            divided by this, and negative ones multiplied; positive and finite. Values over 1 make
            repetitions less likely, 1 changes nothing.
        seed: Seed of the draws.

    Raises:
        ModelError: For a value out of its range; `where` names the setting.

    Example:
        >>> Sampling(temperature=0.8, top_k=50, min_p=0.05, repetition_penalty=1.1).top_p
        1.0
        >>> Sampling(top_p=1.5)
        Traceback (most recent call last):
        composable.errors.ModelError: top_p: 1.5 is not in (0, 1]

    References:
        Fan et al. 2018, arXiv:1805.04833 (top k); Holtzman et al. 2020, arXiv:1904.09751 (top p);
        Nguyen et al. 2024, arXiv:2407.01082 (min p); Keskar et al. 2019, arXiv:1909.05858, section
        4.1 (repetition penalty; the paper divides negative scores too, which favours repetitions).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise ModelError(f"{self.temperature} is negative or not finite", where="temperature")
        if not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ModelError(f"{self.top_k} is not a whole number of at least 0", where="top_k")
        if not 0 < self.top_p <= 1:
            raise ModelError(f"{self.top_p} is not in (0, 1]", where="top_p")
        if not 0 <= self.min_p <= 1:
            raise ModelError(f"{self.min_p} is not in [0, 1]", where="min_p")
        if not 0 < self.repetition_penalty < np.inf:
            raise ModelError(
                f"{self.repetition_penalty} is not positive and finite", where="repetition_penalty"
            )


class Drawn(NamedTuple):
    """A token, and the router weights of the prediction that it was drawn from."""

    token: int
    weight_E: np.ndarray


class _Draw(NamedTuple):
    """Inputs of a draw, on the device."""

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    is_banned_V: jax.Array


class Decoder:
    """Continues one sequence, with its caches and router state.

    Args:
        parts: The model.
        tokenizer: Its tokenizer; defines which tokens are never drawn and which end a text.
        length: Largest number of positions in the sequence.
        sampling: How tokens are drawn; greedy by default.
        mode: "mix" or "safe".
        report: Called with the guards' tally of the sequence whenever drawing ends.

    Raises:
        TextError: If `length` is larger than the model's context.
        ModelError: For an unknown mode.
    """

    def __init__(
        self,
        parts: Parts,
        tokenizer: Tokenizer,
        *,
        length: int,
        sampling: Sampling | None = None,
        mode: Mode = "mix",
        report: Callable[[Tally], None] | None = None,
    ) -> None:
        context = parts.backbone.cfg.context
        if length > context:
            raise TextError(f"{length} positions do not fit the context of {context}")
        if mode not in _MODES:
            raise ModelError(f"{mode!r} is not one of {', '.join(_MODES)}", where="mode")
        sampling = sampling or Sampling()
        self._length, self._ends = length, frozenset(tokenizer.ends)
        self._parts, self._mode, self._report = parts, mode, report
        self._state = _MODES[mode][1](parts, 1, cache_length(length, context))
        vocab_size = parts.interface.vocab_size
        self._draw = _make_draw(sampling, _banned(tokenizer, vocab_size))
        self._seen_V = jnp.zeros(vocab_size, bool)
        self._n_fed = 0
        self._last: int | None = None
        self._unfed: list[int] = []
        self._next: tuple[jax.Array, jax.Array] | None = None

    @property
    def last(self) -> int | None:
        """The last token of the sequence if it was drawn, or None."""
        return self._last

    @property
    def room(self) -> int:
        """Number of positions left."""
        return self._length - self._n_fed - len(self._unfed)

    def feed(self, tokens_T: np.ndarray | list[int]) -> None:
        """Read tokens into the caches and the router state.

        Args:
            tokens_T: Token ids that continue the sequence.

        Raises:
            TextError: If there are more tokens than positions left.
        """
        if len(tokens_T) > self.room:
            raise TextError(
                f"{len(tokens_T)} more tokens do not fit the {self.room} positions left"
            )
        self._last = None
        tokens_T = np.asarray(tokens_T, np.int32)
        for token in self._unfed:
            self._advance(jnp.full((1, 1), token, jnp.int32), is_drawn=True)
        self._unfed = []
        whole = len(tokens_T) - len(tokens_T) % PREFILL
        # Whole chunks first, then single tokens: a prompt of any length reuses the two programs.
        pieces = [tokens_T[i : i + PREFILL] for i in range(0, whole, PREFILL)]
        pieces += [tokens_T[i : i + 1] for i in range(whole, len(tokens_T))]
        for piece in pieces:
            self._advance(jnp.asarray(piece)[None], is_drawn=False)

    def draw(self, n_tokens: int) -> Iterator[Drawn]:
        """Yield up to `n_tokens` tokens as they are drawn; a token that ends a text is not yielded.

        Args:
            n_tokens: Largest number of tokens to draw.

        Raises:
            TextError: If nothing was fed, or there are fewer positions left.
        """
        if n_tokens > self.room:
            raise TextError(f"{n_tokens} more tokens do not fit the {self.room} positions left")
        try:
            yield from self._draw_tokens(n_tokens)
        finally:
            if self._report is not None:
                self._report(self._state.tally)

    def _draw_tokens(self, n_tokens: int) -> Iterator[Drawn]:
        for i in range(n_tokens):
            if self._next is None:
                raise TextError("no tokens to continue: feed at least one first")
            token, weight_E = self._next
            self._next = None
            if i + 1 < n_tokens:
                self._advance(token[None, None], is_drawn=True)
                drawn = Drawn(int(token), np.asarray(weight_E))
            else:
                drawn = Drawn(int(token), np.asarray(weight_E))
                self._unfed = [drawn.token]
            self._last = drawn.token
            if drawn.token in self._ends:
                return
            yield drawn

    def _advance(self, tokens_BT: jax.Array, *, is_drawn: bool) -> None:
        token, weight_E, self._state, self._seen_V = _advance(
            self._parts,
            tokens_BT,
            self._state,
            self._seen_V,
            self._draw,
            is_drawn,
            mode=self._mode,
        )
        self._next = token, weight_E
        self._n_fed += tokens_BT.shape[1]


def continue_tokens(
    parts: Parts,
    tokenizer: Tokenizer,
    tokens_T: np.ndarray,
    n_tokens: int,
    *,
    sampling: Sampling | None = None,
    mode: Mode = "mix",
    report: Callable[[Tally], None] | None = None,
) -> Iterator[Drawn]:
    """Yield tokens that continue a sequence, as they are drawn.

    Args:
        parts: The model.
        tokenizer: Its tokenizer.
        tokens_T: The sequence so far, not empty.
        n_tokens: Largest number of tokens to draw; a token that ends a text stops earlier.
        sampling: How they are drawn; greedy by default.
        mode: "mix" or "safe".
        report: Called with the guards' tally when drawing ends.

    Raises:
        TextError: If sequence and continuation do not fit the context.
        ModelError: For an unknown mode.
    """
    context, length = parts.backbone.cfg.context, len(tokens_T) + n_tokens
    if length > context:
        raise TextError(
            f"{len(tokens_T)} tokens and {n_tokens} more do not fit the context of {context}",
            hint="shorten the text or request fewer tokens",
        )
    decoder = Decoder(parts, tokenizer, length=length, sampling=sampling, mode=mode, report=report)
    decoder.feed(tokens_T)
    yield from decoder.draw(n_tokens)


def cache_length(length: int, context: int) -> int:
    """Return the number of positions in a cache; few sizes, so that few programs are compiled.

    Args:
        length: Positions needed.
        context: Longest sequence of the model, in tokens.

    Example:
        >>> [cache_length(n, context=4096) for n in (5, 1024, 1025, 4000)]
        [1024, 1024, 2048, 4096]
    """
    return min(context, max(_MIN_CACHE, 1 << (length - 1).bit_length()))


def _banned(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Return which ids are never drawn: ids without a token, and the start token unless it ends."""
    is_banned_V = np.arange(vocab_size) >= tokenizer.vocab_size
    is_banned_V[tokenizer.begin] |= tokenizer.begin not in tokenizer.ends
    return is_banned_V


def _make_draw(sampling: Sampling, is_banned_V: np.ndarray) -> _Draw:
    """Return the settings as arrays: a new value compiles no new program."""
    return _Draw(
        jax.random.key(sampling.seed),
        jnp.float32(sampling.temperature),
        jnp.int32(min(sampling.top_k, len(is_banned_V))),
        jnp.float32(sampling.top_p),
        jnp.float32(sampling.min_p),
        jnp.float32(sampling.repetition_penalty),
        jnp.asarray(is_banned_V),
    )


@partial(jax.jit, static_argnames="mode", donate_argnames=("state", "seen_V"))
def _advance(
    parts: Parts,
    tokens_BT: jax.Array,
    state: Any,
    seen_V: jax.Array,
    draw: _Draw,
    is_drawn: jax.Array,
    *,
    mode: Mode,
) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """Return the next token, its router weights, the new state, and the tokens seen so far."""
    logits_BTV, weight_BTE, state = _MODES[mode][0](parts, tokens_BT, state, is_drawn)
    # Whether or not there is a penalty: writing in place costs less than a condition.
    seen_V = seen_V.at[tokens_BT[0]].set(True)
    key = jax.random.fold_in(draw.key, state.caches.position)
    token = _draw_token(draw._replace(key=key), seen_V, logits_BTV[0, -1])
    return token, weight_BTE[0, -1], state, seen_V


def _draw_token(draw: _Draw, seen_V: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Draw a token; the conditions skip what the settings do not need."""
    logits_V = jnp.where(draw.is_banned_V, -jnp.inf, logits_V)
    penalty = draw.repetition_penalty
    logits_V = _apply_if(penalty != 1, partial(_penalize, penalty, seen_V), logits_V)

    def sample(logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(draw.key, _restrict(draw, logits_V)).astype(jnp.int32)

    def take_likeliest(logits_V: jax.Array) -> jax.Array:
        return jnp.argmax(logits_V).astype(jnp.int32)

    index: jax.Array = jax.lax.cond(draw.temperature > 0, sample, take_likeliest, logits_V)
    return index


def _restrict(draw: _Draw, logits_V: jax.Array) -> jax.Array:
    """Apply temperature, top k, top p and min p, in this order; excluded tokens become -inf."""
    logits_V = logits_V / jnp.maximum(draw.temperature, 1e-6)
    logits_V = _apply_if(draw.top_k > 0, partial(_keep_top_k, draw.top_k), logits_V)
    logits_V = _apply_if(draw.top_p < 1, partial(_keep_top_p, draw.top_p), logits_V)
    return _apply_if(draw.min_p > 0, partial(_keep_probable, draw.min_p), logits_V)


def _apply_if(
    condition: jax.Array, change: Callable[[jax.Array], jax.Array], logits_V: jax.Array
) -> jax.Array:
    """Return changed logits if a condition holds; otherwise the change is not computed."""
    changed_V: jax.Array = jax.lax.cond(condition, change, lambda x_V: x_V, logits_V)
    return changed_V


def _penalize(penalty: jax.Array, seen_V: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Make tokens that were seen less likely: divide positive logits, multiply negative ones."""
    penalized_V = jnp.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
    return jnp.where(seen_V, penalized_V, logits_V)


def _keep_top_k(top_k: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Keep the `top_k` likeliest tokens, and those that tie with the last of them."""
    return jnp.where(logits_V >= _kth_largest(top_k, logits_V), logits_V, -jnp.inf)


def _kth_largest(k: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Return the k-th largest logit, for k from 1 to the size of the vocabulary.

    Bisects its 32 bits, since `jax.lax.top_k` needs a static k, and a sort takes many times longer
    on a CPU.
    """
    sign = jnp.uint32(1 << 31)
    bits_V = jax.lax.bitcast_convert_type(logits_V, jnp.uint32)
    # Floats have the order of these integers: negative ones have all bits flipped, others the sign.
    rank_V = jnp.where(bits_V < sign, bits_V | sign, ~bits_V)

    def set_bit(i: jax.Array, rank: jax.Array) -> jax.Array:
        raised = rank | (sign >> i.astype(jnp.uint32))
        return jnp.where((rank_V >= raised).sum() >= k, raised, rank)

    rank = jax.lax.fori_loop(0, 32, set_bit, jnp.uint32(0))
    return jax.lax.bitcast_convert_type(jnp.where(rank < sign, ~rank, rank ^ sign), jnp.float32)


def _keep_top_p(top_p: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Keep the fewest likeliest tokens whose probabilities add up to `top_p`.

    Of tokens that tie at the edge, the ones with the smallest ids are kept; transformers leaves
    that to its sort, which is not stable.
    """
    order_V = jnp.argsort(-logits_V)
    probability_V = jax.nn.softmax(logits_V[order_V])
    # A token is kept if the sum before it is below `top_p`, so the likeliest always is.
    is_kept_V = jnp.cumsum(probability_V) - probability_V < top_p
    return logits_V.at[order_V].set(jnp.where(is_kept_V, logits_V[order_V], -jnp.inf))


def _keep_probable(min_p: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Keep tokens at least `min_p` times as probable as the likeliest."""
    # The normaliser cancels in the ratio p / p_max, which is exactly 1 for the likeliest.
    return jnp.where(jnp.exp(logits_V - logits_V.max()) >= min_p, logits_V, -jnp.inf)
