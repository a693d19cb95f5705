"""Continuing tokens: prefill in chunks, then one token at a time with KV cache and router state.

The programs that read tokens are in `steps.py`: those for a chunk of fixed length and those for a
single token serve any text. The next step is dispatched before the host reads the token that was
drawn. Turning tokens into text is left to `text.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Literal, NamedTuple, get_args

import jax
import numpy as np

from composable.errors import ModelError, TextError
from composable.model.chunks import cut_prompt, pad
from composable.model.composed import Parts
from composable.model.guard import Tally
from composable.model.sampling import Draw, Sampling, draw_token, make_draw
from composable.model.steps import MixSteps, SafeSteps
from composable.model.tokenizer import Tokenizer

Mode = Literal["mix", "safe"]
# The number of positions in a cache is a power of two, and at least this: shorter texts share one
# compilation, longer ones need one per doubling.
_MIN_CACHE: Final = 1024


class Drawn(NamedTuple):
    """A token, and the router weights of the prediction that it was drawn from."""

    token: int
    weight_E: np.ndarray


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
        if mode not in get_args(Mode):
            raise ModelError(f"{mode!r} is not one of {', '.join(get_args(Mode))}", where="mode")
        sampling = sampling or Sampling()
        self._length, self._ends = length, frozenset(tokenizer.ends)
        self._report = report
        self._n_cached, seed = cache_length(length, context), sampling.seed
        self._steps: MixSteps | SafeSteps
        if mode == "safe":
            self._steps = SafeSteps(parts, self._n_cached, seed if sampling.temperature else None)
        else:
            self._steps = MixSteps(parts, self._n_cached)
        vocab_size = parts.interface.vocab_size
        self._draw = make_draw(sampling, _banned(tokenizer, vocab_size))
        self._seen_V = jax.device_put(np.zeros(vocab_size, bool), may_alias=False)
        self._n_fed = 0
        self._token_BT: jax.Array | np.ndarray = _one_token(tokenizer.begin)  # the last one read
        self._last: int | None = None
        self._unfed: list[int] = []
        # Logits and weights for the token that comes next, until it is drawn from them.
        self._output: tuple[jax.Array, jax.Array] | None = None
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
        self._note_seen([*self._unfed, *tokens_T.tolist()])
        for token in self._unfed:
            self._read(jax.device_put(_one_token(token)), is_drawn=True)
        self._unfed = []
        start = 0
        for n_tokens, size in cut_prompt(len(tokens_T), self._n_cached - self._n_fed):
            piece_BT = jax.device_put(pad(tokens_T[start : start + n_tokens], size))
            self._read(piece_BT, is_drawn=False, length=n_tokens if size > 1 else None)
            start += n_tokens

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
                self._report(self._steps.tally)

    def _draw_tokens(self, n_tokens: int) -> Iterator[Drawn]:
        if n_tokens and self._output is not None:
            # What writes need not be what predicts given text.
            self._draw_from(self._steps.start_writing() or self._output)
        for i in range(n_tokens):
            if self._next is None:
                raise TextError("no tokens to continue: feed at least one first")
            token_BT, weight_E = self._next
            self._next = None
            # The next step runs while the host reads this token. The first token does not wait for
            # that: the step may load programs that the prompt did not need.
            is_ahead = 0 < i < n_tokens - 1
            if is_ahead:
                self._advance(token_BT)
            drawn = Drawn(np.asarray(token_BT).item(), np.asarray(weight_E))
            self._unfed = [] if is_ahead else [drawn.token]
            self._last = drawn.token
            if drawn.token in self._ends:
                return
            yield drawn
            if i == 0 and n_tokens > 1:
                self._unfed = []
                self._advance(token_BT)

    def _advance(self, token_BT: jax.Array) -> None:
        """Read a token that was drawn, and draw the next."""
        self._read(token_BT, is_drawn=True)
        self._token_BT = token_BT
        assert self._output is not None
        self._draw_from(self._output)

    def _read(self, tokens_BT: jax.Array, *, is_drawn: bool, length: int | None = None) -> None:
        self._output = self._steps.advance(tokens_BT, is_drawn, length)
        self._n_fed += tokens_BT.shape[1] if length is None else length

    def _note_seen(self, tokens: list[int]) -> None:
        """Count tokens as seen that the host knows; the program that draws counts one at a time."""
        if tokens:
            seen_V = np.array(self._seen_V)
            seen_V[tokens] = True
            self._seen_V = jax.device_put(seen_V, may_alias=False)
            self._token_BT = _one_token(tokens[-1])

    def _draw_from(self, output: tuple[jax.Array, jax.Array]) -> None:
        logits_V, weight_E = output
        position = np.int32(self._n_fed)
        token_BT, self._seen_V = _draw_next(
            self._draw, self._seen_V, self._token_BT, position, logits_V
        )
        self._output, self._next = None, (token_BT, weight_E)


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


def _one_token(token: int) -> np.ndarray:
    """Return a token as an array of shape BT."""
    return np.full((1, 1), token, np.int32)


@partial(jax.jit, donate_argnames="seen_V")
def _draw_next(
    draw: Draw,
    seen_V: jax.Array,
    token_BT: jax.Array,
    position: jax.Array,
    logits_V: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the next token, shape BT, and which were seen so far, the one before it included."""
    # Whether or not there is a penalty: writing in place costs less than a condition.
    seen_V = seen_V.at[token_BT[0]].set(True)
    key = jax.random.fold_in(draw.key, position)
    return draw_token(draw._replace(key=key), seen_V, logits_V)[None, None], seen_V
