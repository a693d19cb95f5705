"""Continuing text: prefill once, then one token at a time with the KV cache and router state.

Two compilations serve any text: a prefill chunk of fixed length and a single step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np

from composable.errors import ModelError, TextError
from composable.model.composed import Parts, mix, mix_state, safe, safe_state
from composable.model.tokenizer import BEGIN

Mode = Literal["mix", "safe"]
_PREFILL: Final = 32
_MODES: Final[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "mix": (mix, mix_state),
    "safe": (safe, safe_state),
}


@partial(jax.jit, static_argnames="mode", donate_argnames="state")
def _advance(parts: Parts, tokens_BT: jax.Array, state: Any, *, mode: Mode) -> tuple[Any, Any]:
    """Return logits BTV and the new state."""
    return _MODES[mode][0](parts, tokens_BT, state)


@jax.jit
def _sample(key: jax.Array, logits_V: jax.Array, temperature: jax.Array) -> jax.Array:
    """Draw a token; temperature 0 takes the likeliest. The begin token is never drawn."""
    logits_V = logits_V.at[BEGIN].set(-jnp.inf)
    drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))


def continue_tokens(
    parts: Parts,
    tokens_T: np.ndarray,
    n_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    mode: Mode = "mix",
) -> Iterator[int]:
    """Yield tokens that continue a sequence, as they are made.

    Args:
        parts: The model.
        tokens_T: The sequence so far, not empty.
        n_tokens: How many to make.
        temperature: Softmax temperature; 0 always takes the likeliest token.
        seed: Seed of the draws.
        mode: "mix" or "safe".

    Raises:
        TextError: If sequence and continuation do not fit the context.
        ModelError: For a negative temperature or an unknown mode.
    """
    context = parts.backbone.cfg.context
    if len(tokens_T) + n_tokens > context:
        raise TextError(
            f"{len(tokens_T)} tokens and {n_tokens} more do not fit the context of {context}",
            hint="shorten the text, or ask for fewer tokens",
        )
    if temperature < 0:
        raise ModelError(f"{temperature} is negative", where="temperature")
    if mode not in _MODES:
        raise ModelError(f"{mode!r} is not one of {', '.join(_MODES)}", where="mode")
    advance = partial(_advance, parts, mode=mode)
    state = _MODES[mode][1](parts, 1, context)
    whole = len(tokens_T) - len(tokens_T) % _PREFILL
    # Whole chunks first, the rest one by one: no length of prompt compiles anything new.
    pieces = [tokens_T[i : i + _PREFILL] for i in range(0, whole, _PREFILL)]
    pieces += [tokens_T[i : i + 1] for i in range(whole, len(tokens_T))]
    for piece in pieces:
        logits_BTV, state = advance(jnp.asarray(piece)[None], state)
    keys = jax.random.split(jax.random.key(seed), n_tokens)
    for i in range(n_tokens):
        token = int(_sample(keys[i], logits_BTV[0, -1], jnp.float32(temperature)))
        yield token
        if i + 1 < n_tokens:
            logits_BTV, state = advance(jnp.full((1, 1), token), state)
