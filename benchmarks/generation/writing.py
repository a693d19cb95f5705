"""Writing many texts at once: a batch of prompts is read and continued by two compiled programs."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from composable.model.composed import Parts
from composable.model.decoding import Mode, continue_tokens
from composable.model.mix import mix_state, trace_mix
from composable.model.model import Model
from composable.model.safe import safe_state, trace_safe
from composable.model.sampling import Draw, Sampling, draw_token, make_draw
from composable.model.tokenizer import ByteTokenizer, Tokenizer

_MODES: Final = {"mix": (trace_mix, mix_state), "safe": (trace_safe, safe_state)}


class Written(NamedTuple):
    """Texts that a model wrote, and the router weights of the predictions they were drawn from."""

    tokens_BT: np.ndarray
    weight_BTE: np.ndarray
    state: Any  # after the last token


def to_texts(tokens_BT: np.ndarray, tokenizer: Tokenizer) -> list[bytes]:
    """Return the texts that tokens stand for."""
    if isinstance(tokenizer, ByteTokenizer):
        return [bytes(text_T.tolist()) for text_T in tokens_BT.astype(np.uint8)]
    return [tokenizer.decode(text_T).encode() for text_T in tokens_BT]


def write_texts(
    model: Model,
    prompts_BT: np.ndarray,
    n_tokens: int,
    *,
    sampling: Sampling,
    mode: Mode = "mix",
    is_evidence: bool = False,
) -> Written:
    """Continue prompts of one length; texts do not end early.

    Where the context is full, its later half is read again and the router's state is kept. In safe
    mode texts are written one by one, each by the paths that its own draws choose.

    Args:
        model: The model.
        prompts_BT: Prompts of at most half a context, start token included.
        n_tokens: Tokens to write after each, a multiple of half a context unless it is less.
        sampling: How tokens are drawn; row b uses the seed folded with b.
        mode: "mix" or "safe"; in safe mode the tokenizer must have no token that ends a text.
        is_evidence: Whether written tokens count as given ones, as they did before ADR 15.
    """
    if mode == "safe":
        return _write_one_by_one(model, prompts_BT, n_tokens, sampling=sampling)
    tokenizer, half = model.tokenizer, model.context // 2
    is_banned_V = np.arange(model.interface.vocab_size) >= tokenizer.vocab_size
    is_banned_V[[tokenizer.begin, *tokenizer.ends]] = True
    draw = make_draw(sampling, is_banned_V)
    all_BT, weights = prompts_BT, []
    length = min(model.context, prompts_BT.shape[1] + n_tokens)
    read = partial(_read, model.parts, length=length)
    latest, state = read(jnp.asarray(prompts_BT, jnp.int32))
    for at in range(0, n_tokens, half):
        if at:
            _, fresh = read(jnp.asarray(all_BT[:, -half:], jnp.int32))
            state = state._replace(caches=fresh.caches)
        latest, state, tokens_BT, weight_BTE = _write(
            model.parts,
            *(latest, state, draw._replace(key=jax.random.fold_in(draw.key, at)), not is_evidence),
            n_tokens=min(half, n_tokens - at),
        )
        all_BT = np.concatenate([all_BT, tokens_BT], axis=1)
        weights.append(np.asarray(weight_BTE))
    return Written(all_BT[:, prompts_BT.shape[1] :], np.concatenate(weights, axis=1), state)


def _write_one_by_one(
    model: Model, prompts_BT: np.ndarray, n_tokens: int, *, sampling: Sampling
) -> Written:
    """Continue prompts as `Model.stream` does, within the context."""
    tokens_BT, weight_BTE = [], []
    for row, prompt_T in enumerate(prompts_BT):
        drawn = list(
            continue_tokens(
                model.parts,
                model.tokenizer,
                prompt_T,
                n_tokens,
                sampling=dataclasses.replace(sampling, seed=sampling.seed + row),
                mode="safe",
            )
        )
        tokens_BT.append([one.token for one in drawn])
        weight_BTE.append([one.weight_E for one in drawn])
    return Written(np.array(tokens_BT), np.array(weight_BTE), None)


def read_turn(model: Model, written: Written, turn_BT: np.ndarray) -> np.ndarray:
    """Return the router weights, BTE, while a given turn is read after text written in mix mode."""
    return np.asarray(_read_more(model.parts, written.state, turn_BT, mode="mix"))


def read_given(model: Model, tokens_BT: np.ndarray, mode: Mode = "mix") -> np.ndarray:
    """Return the router weights, BTE, while given text is read."""
    state = _MODES[mode][1](model.parts, tokens_BT.shape[0])
    return np.asarray(_read_more(model.parts, state, tokens_BT, mode=mode))


@partial(jax.jit, static_argnames="mode")
def _read_more(parts: Parts, state: Any, tokens_BT: jax.Array, *, mode: Mode) -> jax.Array:
    weight_BTE: jax.Array = _MODES[mode][0](parts, tokens_BT, state)[1]
    return weight_BTE


@partial(jax.jit, static_argnames="length")
def _read(parts: Parts, tokens_BT: jax.Array, *, length: int) -> tuple[tuple[jax.Array, ...], Any]:
    """Return the latest logits BV, weights BE and tokens seen BV, and the state."""
    state = mix_state(parts, tokens_BT.shape[0], length)
    logits_BTV, weight_BTE, state = trace_mix(parts, tokens_BT, state)
    seen_BV = jax.nn.one_hot(tokens_BT, logits_BTV.shape[-1], dtype=bool).any(1)
    return (logits_BTV[:, -1], weight_BTE[:, -1], seen_BV), state


@partial(jax.jit, static_argnames="n_tokens", donate_argnames="state")
def _write(
    parts: Parts,
    latest: tuple[jax.Array, ...],
    state: Any,
    draw: Draw,
    is_drawn: jax.Array,
    *,
    n_tokens: int,
) -> tuple[tuple[jax.Array, ...], Any, jax.Array, jax.Array]:
    """Return the latest logits, weights and tokens seen, the state, tokens BT and weights BTE."""
    key_B = jax.vmap(partial(jax.random.fold_in, draw.key))(jnp.arange(latest[0].shape[0]))

    def draw_one(row: tuple[jax.Array, ...]) -> jax.Array:
        key, seen_V, logits_V = row
        return draw_token(draw._replace(key=key), seen_V, logits_V)

    def step(carried: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], Any]:
        (logits_BV, weight_BE, seen_BV), state = carried
        keys_B = jax.vmap(partial(jax.random.fold_in, data=i))(key_B)
        # Row by row, so that a draw skips what its settings do not need: under vmap both branches
        # of a condition run.
        token_B = jax.lax.map(draw_one, (keys_B, seen_BV, logits_BV))
        seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
        logits_BTV, next_BTE, state = trace_mix(parts, token_B[:, None], state, is_drawn)
        return ((logits_BTV[:, -1], next_BTE[:, -1], seen_BV), state), (token_B, weight_BE)

    (latest, state), written = jax.lax.scan(step, (latest, state), jnp.arange(n_tokens))
    return latest, state, written[0].T, jnp.moveaxis(written[1], 0, 1)
