"""Vetting: what an expert must show, on evidence that anyone can recompute, before it is published.

Every check compares a figure with a limit and says so. Format, shapes and finite weights were
checked when the package was loaded; here is what only running it can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from composable.interface import RouterInterface
from composable.model import composed
from composable.model.backbone import Backbone
from composable.model.model import Model, Pluggable
from composable.model.tokenizer import Tokenizer
from composable.vetting.evaluation import (
    Score,
    mix_scorer,
    path_scorer,
    score_documents,
    trace_routing,
)

# An expert must lower the bits per byte of its own held-out text by at least this share ...
MIN_GAIN: Final = 0.01
# ... and, plugged in alone, may raise those of the anchor by at most this share in mix mode.
MAX_ANCHOR_LOSS: Final = 0.01
# Documents are scored up to here; enough to see past the first uncertain bytes.
MAX_BYTES: Final = 1024
# Scores of this many tokens are compared bit by bit.
_ISOLATION_TOKENS: Final = 512


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was asked of an expert.

    Args:
        name: What was checked.
        passed: Whether it held.
        found: The figure, in words.
        expected: The limit, in words.
    """

    name: str
    passed: bool
    found: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All checks of an expert and the figures behind them.

    Args:
        checks: In the order they ran.
        measured: Bits per byte and shares, as the card records them.
    """

    checks: tuple[Check, ...]
    measured: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def recovery(backbone: float, own: float, composed_: float) -> float:
    """Return the share of the gap between backbone and own expert that a composed model closes.

    Where there is no gap there is nothing to close, and the share is 0.
    """
    gap = backbone - own
    return (backbone - composed_) / gap if gap else 0.0


def vet(
    backbone: Backbone,
    interface: RouterInterface,
    expert: Pluggable,
    heldout: Sequence[bytes],
    anchor: Sequence[bytes],
    *,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Vet an expert, plugged alone into its backbone.

    Args:
        backbone: The frozen model.
        interface: Its contract.
        expert: What to vet.
        heldout: The contributor's own text that the expert was not trained on.
        anchor: The public text that ships with the backbone.
        tokenizer: The backbone's; the one for bytes by default.
        progress: Called with scoring passes done and in all.

    Raises:
        TextError: If either text is empty.
    """
    model = Model(backbone, interface, [expert], tokenizer=tokenizer)
    runs = {
        "own_backbone": (path_scorer(model), heldout),
        "own_expert": (path_scorer(model, expert.name), heldout),
        "own_mix": (mix_scorer(model), heldout),
        "anchor_backbone": (path_scorer(model), anchor),
        "anchor_mix": (mix_scorer(model), anchor),
    }
    scores: dict[str, Score] = {}
    for name, (scorer, documents) in runs.items():
        scores[name] = score_documents(
            scorer, documents, context=model.context, max_bytes=MAX_BYTES
        )
        if progress:
            progress(len(scores), len(runs) + 1)
    bits = {name: score.bits_per_byte for name, score in scores.items()}
    index = model.names.index(expert.name)
    traces = trace_routing(model, anchor, max_bytes=MAX_BYTES)
    taken = np.concatenate(traces)[:, index].mean()
    if progress:
        progress(len(runs) + 1, len(runs) + 1)
    gain = 1 - bits["own_expert"] / bits["own_backbone"]
    loss = bits["anchor_mix"] / bits["anchor_backbone"] - 1
    checks = (
        _check_isolation(model, heldout[0]),
        Check(
            name="finite",
            passed=all(np.isfinite(score.nats).all() for score in scores.values()),
            found=f"{sum(np.isfinite(score.nats).all() for score in scores.values())} of "
            f"{len(scores)} scorings finite",
            expected="all",
        ),
        Check(
            name="gain",
            passed=gain >= MIN_GAIN,
            found=f"{bits['own_backbone']:.3f} to {bits['own_expert']:.3f} bits per byte on its "
            f"own held-out text ({gain:.1%} less)",
            expected=f"at least {MIN_GAIN:.0%} less",
        ),
        Check(
            name="anchor",
            passed=loss <= MAX_ANCHOR_LOSS,
            found=f"{bits['anchor_backbone']:.3f} to {bits['anchor_mix']:.3f} bits per byte on "
            f"public text ({loss:+.2%})",
            expected=f"at most {MAX_ANCHOR_LOSS:+.0%}",
        ),
    )
    measured = {
        "bits_per_byte": {name: _figure(value) for name, value in bits.items()},
        "gain": _figure(gain),
        "anchor_loss": _figure(loss),
        "anchor_taken": _figure(float(taken)),
        "recovery": _figure(recovery(bits["own_backbone"], bits["own_expert"], bits["own_mix"])),
        "documents": {"own": len(heldout), "anchor": len(anchor), "max_bytes": MAX_BYTES},
    }
    return Verdict(checks=checks, measured=measured)


def _figure(value: float) -> float | None:
    """Return a figure as the card records it; JSON has no word for what is not finite."""
    return round(value, 5) if np.isfinite(value) else None


def _check_isolation(plugged: Model, document: bytes) -> Check:
    """Check that the backbone's track record is the same to the bit with the expert plugged in."""
    alone = Model(plugged.parts.backbone, plugged.interface, tokenizer=plugged.tokenizer)
    n_tokens = min(plugged.context, _ISOLATION_TOKENS)
    tokens_BT = jnp.asarray(plugged.encode(document)[:n_tokens])[None]
    with_BT = np.asarray(_backbone_track(plugged.parts, tokens_BT))
    without_BT = np.asarray(_backbone_track(alone.parts, tokens_BT))
    differing = int((with_BT != without_BT).sum())
    return Check(
        name="isolation",
        passed=differing == 0,
        found=f"{differing} of {with_BT.size} of the backbone's scores changed",
        expected="none, to the bit",
    )


@jax.jit
def _backbone_track(parts: composed.Parts, tokens_BT: jax.Array) -> jax.Array:
    state = composed.mix_state(parts, tokens_BT.shape[0])
    return composed.track_records(parts, tokens_BT, state.router)[..., 0]
