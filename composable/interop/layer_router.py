"""Routers of other runtimes: a linear map of each layer's hidden state, fitted to ours.

Our router tracks which expert predicts a document well; theirs sees a single hidden state, in every
layer separately. So theirs is an approximation. How good it is, is measured by running here, on the
same weights, what the other runtime will compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from composable.errors import TextError
from composable.model import mix as mix_mode
from composable.model.bank import Bank, merge_entry
from composable.model.body import MATRICES
from composable.model.composed import Parts
from composable.model.layers import swiglu
from composable.model.model import BACKBONE, Model
from composable.model.router import choose, dense_weights
from composable.progress import CountProgress
from composable.vetting.evaluation import Scorer

# Positions of one window, at most; as `vetting.evaluation` reads documents.
_WINDOW: Final = 512
# Weight of the squared rows beside the loss in nats, in units where hidden states have unit size.
_DECAY: Final = 1e-3
_STEPS: Final = 60


@dataclass(frozen=True)
class Observed:
    """Our router's weights on a text, and the inputs that routers of the layers would have.

    Args:
        hidden_LMD: Input of the feed-forward block in every slot, float16.
        weight_ME: Weights of the experts, in the order of `expert_names`.
    """

    hidden_LMD: np.ndarray
    weight_ME: np.ndarray


def expert_names(model: Model) -> list[str]:
    """Return the names of the mixed experts, the backbone first, the others sorted."""
    return [BACKBONE, *model.experts]


def observe(
    model: Model,
    texts: Sequence[bytes],
    *,
    max_tokens: int,
    progress: CountProgress | None = None,
) -> Observed:
    """Run mix mode over a text and record every slot's input and the router's weights.

    Args:
        model: The model.
        texts: Documents; the tokens are shared equally among them.
        max_tokens: Number of tokens in all, at most.
        progress: Called with documents done and in all.

    Raises:
        TextError: If there is no text.
    """
    if not texts:
        raise TextError("there is no text to fit routers on")
    order_E = _order(model)
    window = min(model.context, _WINDOW)
    share = max(1, max_tokens // len(texts))
    hidden, weights = [], []
    for done, text in enumerate(texts):
        tokens_T = model.encode(text)[:share]
        state = mix_mode.mix_state(model.parts, 1)
        for start in range(0, len(tokens_T), window):
            here_T = tokens_T[start : start + window]
            # Always a full window, so that one program serves all; nothing looks ahead.
            padded_BT = np.pad(here_T, (0, window - len(here_T)))[None]
            hidden_LBTD, weight_BTE, state = _observe(model.parts, padded_BT, state, order_E)
            hidden.append(np.asarray(hidden_LBTD[:, 0, : len(here_T)], np.float16))
            weights.append(np.asarray(weight_BTE[0, : len(here_T)]))
        if progress:
            progress(done + 1, len(texts))
    return Observed(np.concatenate(hidden, axis=1), np.concatenate(weights))


@jax.jit
def _observe(
    parts: Parts, tokens_BT: jax.Array, state: mix_mode.MixState, order_E: jax.Array
) -> tuple[jax.Array, jax.Array, mix_mode.MixState]:
    weight_BTE, state = mix_mode.route(parts, tokens_BT, state)
    weight_BTE = weight_BTE[..., order_E]
    seen = []

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        seen.append(x_BTD)
        index = parts.interface.slots.index(layer)
        bound = parts.interface.output_bounds[index]
        return _mix_bodies(parts.bank, index, order_E, weight_BTE, x_BTD, bound)

    x_BTD, _ = parts.backbone.trunk(tokens_BT)
    parts.backbone.upper(x_BTD, run)
    return jnp.stack(seen), weight_BTE, state


def fit_rows(
    observed: Observed, progress: CountProgress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of every slot's router, shape LED, and how often their first choice is ours, L.

    A convex fit: the cross entropy between our weights and the softmax of `h rows`, with a little
    weight decay, by L-BFGS.

    References:
        Liu and Nocedal 1989, "On the limited memory BFGS method for large scale optimization".
    """
    rows, agreement = [], []
    n_slots = len(observed.hidden_LMD)
    first_M = observed.weight_ME.argmax(axis=1)
    for slot, hidden_MD in enumerate(observed.hidden_LMD):
        hidden_MD = hidden_MD.astype(np.float32)
        scale_D = np.sqrt(np.mean(np.square(hidden_MD), axis=0)) + 1e-6
        fitted_ED = np.asarray(_fit(hidden_MD / scale_D, observed.weight_ME)) / scale_D
        rows.append(fitted_ED.astype(np.float32))
        agreement.append(np.mean((hidden_MD @ fitted_ED.T).argmax(axis=1) == first_M))
        if progress:
            progress(slot + 1, n_slots)
    return np.stack(rows), np.array(agreement)


@jax.jit
def _fit(hidden_MD: jax.Array, weight_ME: jax.Array) -> jax.Array:
    def loss(rows_ED: jax.Array) -> jax.Array:
        log_prob_ME = jax.nn.log_softmax(hidden_MD @ rows_ED.T)
        cross_entropy = -(weight_ME * log_prob_ME).sum(axis=1).mean()
        return cross_entropy + _DECAY * jnp.square(rows_ED).sum()

    solver = optax.lbfgs()
    rows_ED = jnp.zeros((weight_ME.shape[1], hidden_MD.shape[1]), jnp.float32)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        rows_ED, state = carry
        value, grad = value_and_grad(rows_ED, state=state)
        updates, state = solver.update(grad, state, rows_ED, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(rows_ED, updates), state), None

    (rows_ED, _), _ = jax.lax.scan(step, (rows_ED, solver.init(rows_ED)), length=_STEPS)
    return rows_ED


def layered_scorer(model: Model, rows_LED: np.ndarray, top_k: int) -> Scorer:
    """Return the scorer of what another runtime computes: a router per layer, no bounds, no state.

    Args:
        model: The model.
        rows_LED: Rows of every slot's router, experts in the order of `expert_names`.
        top_k: Experts mixed per token.
    """
    step = partial(_score_layered, model.parts, jnp.asarray(rows_LED), _order(model), top_k)
    return Scorer(step, model.tokenizer)


def layered_logits(
    model: Model, tokens_BT: jax.typing.ArrayLike, rows_LED: np.ndarray, top_k: int
) -> jax.Array:
    """Return the logits of the same, shape BTV."""
    order_E = _order(model)
    logits_BTV: jax.Array = _layered(
        model.parts, jnp.asarray(rows_LED), order_E, top_k, jnp.asarray(tokens_BT)
    )
    return logits_BTV


@partial(jax.jit, static_argnums=3)
def _layered(
    parts: Parts, rows_LED: jax.Array, order_E: jax.Array, top_k: int, tokens_BT: jax.Array
) -> jax.Array:
    n_experts = len(order_E)

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        index = parts.interface.slots.index(layer)
        score_BTE = jnp.einsum("BTD,ED->BTE", x_BTD, rows_LED[index].astype(x_BTD.dtype))
        # Softmax over the chosen experts is softmax over all, renormalised.
        choice = choose(score_BTE.astype(jnp.float32), jnp.arange(n_experts), top_k)
        weight_BTE = dense_weights(choice, n_experts)
        return _mix_bodies(parts.bank, index, order_E, weight_BTE, x_BTD, None)

    x_BTD, _ = parts.backbone.trunk(tokens_BT)
    return parts.backbone.upper(x_BTD, run)[0]


def _score_layered(
    parts: Parts,
    rows_LED: jax.Array,
    order_E: jax.Array,
    top_k: int,
    tokens_BT: jax.typing.ArrayLike,
    targets_BT: jax.typing.ArrayLike,
    state: Any,
) -> tuple[jax.Array, None]:
    logits_BTV = _layered(parts, rows_LED, order_E, top_k, jnp.asarray(tokens_BT))
    targets_BT = jnp.asarray(targets_BT)
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return nats_BT, None


def _mix_bodies(
    bank: Bank,
    slot: int,
    order_E: jax.Array,
    weight_BTE: jax.Array,
    x_BTD: jax.Array,
    bound: float | None,
) -> jax.Array:
    """Return the weighted sum of all bodies' outputs, one body at a time."""

    def add(total_BTD: jax.Array, entry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, weight_BT = entry
        matrices = merge_entry(bank, slot, index)
        y_BTD = swiglu(x_BTD, *(matrices[name] for name in MATRICES))
        counts_BT = weight_BT > 0
        if bound is not None:
            power_BT = jnp.mean(jnp.square(y_BTD.astype(jnp.float32)), axis=-1)
            counts_BT &= (power_BT <= bound**2) | (index == 0)
        y_BTD = jnp.where(counts_BT[..., None], y_BTD, 0)
        return total_BTD + weight_BT[..., None].astype(y_BTD.dtype) * y_BTD, None

    weight_EBT = jnp.moveaxis(weight_BTE, -1, 0)
    return jax.lax.scan(add, jnp.zeros_like(x_BTD), (order_E, weight_EBT))[0]


def _order(model: Model) -> jax.Array:
    """Return the entries of the bank in the order of `expert_names`."""
    return jnp.array([model.names.index(name) for name in expert_names(model)])
