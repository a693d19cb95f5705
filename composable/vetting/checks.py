"""Vetting: what an expert must show, on evidence that anyone can recompute, before it is published.

Every check compares a figure with a limit and says so. Whether the files are what the interface
wants is told when they are read; here is what only running the expert can tell. How it gets on with
others is in `peers.py`, how it compares with what it was before in `regression.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from composable.interface import RouterInterface
from composable.model import composed
from composable.model import mix as mix_mode
from composable.model.backbone import Backbone
from composable.model.model import BACKBONE, Model, Pluggable
from composable.model.tokenizer import Tokenizer
from composable.progress import CountProgress
from composable.vetting.card import Check
from composable.vetting.evaluation import (
    BATCH,
    Score,
    measure_norms,
    mix_scorer,
    path_scorer,
    score_documents,
    trace_routing,
)
from composable.vetting.statistics import CONFIDENCE, upper_mean

# An expert must lower the bits per byte of its own held-out text by at least this share ...
MIN_GAIN: Final = 0.01
# ... and, plugged in alone, may raise those of the anchor by at most this share in mix mode.
MAX_ANCHOR_LOSS: Final = 0.01
# Documents are scored up to here; enough to see past the first uncertain bytes.
MAX_BYTES: Final = 1024
# With confidence, it may take this share of public text, unless that gains by it ...
MAX_TAKEN: Final = 0.5
# ... which so many documents can tell; with fewer, the share itself is judged.
MIN_DOCUMENTS: Final = 6
# This share of its contributions may be beyond the slots' bounds, and count as zero.
MAX_ZEROED: Final = 0.001
# Scores of this many tokens are compared bit by bit.
_SCORED_TOKENS: Final = 512
# Passes over text that `vet` makes.
_PASSES: Final = 8


@dataclass(frozen=True)
class Evidence:
    """What every document of an expert's card cost, and how much of it the expert took.

    Args:
        scores: By run: `own_backbone`, `own_expert`, `own_mix`, `anchor_backbone`, `anchor_mix`.
        taken_N: Share of the tokens of each anchor document that were the expert's to predict.
    """

    scores: Mapping[str, Score]
    taken_N: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All checks of an expert and the figures behind them.

    Args:
        checks: In the order they ran.
        measured: Bits per byte and shares, as the card records them.
        evidence: What every document cost, for comparisons; None where nothing could be run.
        regressions: What is worse than in an older release, in words; None where there was none
            to compare with.
    """

    checks: tuple[Check, ...]
    measured: dict[str, Any]
    evidence: Evidence | None = field(default=None, compare=False)
    regressions: tuple[str, ...] | None = None

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
    progress: CountProgress | None = None,
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
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, _PASSES)

    evidence = gather_evidence(model, expert.name, heldout, anchor, tick=tick)
    norm_LN = np.concatenate(
        [
            measure_norms(model, expert.name, documents, max_bytes=MAX_BYTES)
            for documents in (heldout, anchor)
        ],
        axis=1,
    )
    tick()
    scores = evidence.scores
    bits = {name: score.bits_per_byte for name, score in scores.items()}
    gain = 1 - bits["own_expert"] / bits["own_backbone"]
    loss = bits["anchor_mix"] / bits["anchor_backbone"] - 1
    again = score_documents(
        mix_scorer(model), heldout[:BATCH], context=model.context, max_bytes=MAX_BYTES
    ).nats
    n_changed = int((again.view(np.int64) != scores["own_mix"].nats[:BATCH].view(np.int64)).sum())
    tick()
    taken, bound = float(evidence.taken_N.mean()), upper_mean(evidence.taken_N)
    share_L1 = norm_LN / np.array(interface.output_bounds)[:, None]
    zeroed = float((~(share_L1 <= 1)).mean())
    checks = (
        *_check_scores(model, expert.name, heldout[0], anchor[0], len(again), n_changed),
        Check(
            name="finite",
            passed=all(np.isfinite(score.nats).all() for score in scores.values()),
            found=f"{sum(np.isfinite(score.nats).all() for score in scores.values())} of "
            f"{len(scores)} scorings finite",
            expected="all",
        ),
        Check(
            name="norms",
            passed=zeroed <= MAX_ZEROED,
            found=f"outputs reach {share_L1.max():.2f} of their slot's bound; {zeroed:.2%} of "
            f"{share_L1.size:,} contributions beyond it count as zero",
            expected=f"at most {MAX_ZEROED:.1%} beyond",
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
        _check_taken(evidence.taken_N, bound, loss),
    )
    measured = {
        "bits_per_byte": {name: figure(value) for name, value in bits.items()},
        "gain": figure(gain),
        "anchor_loss": figure(loss),
        "anchor_taken": figure(taken),
        "anchor_taken_bound": figure(bound),
        "recovery": figure(recovery(bits["own_backbone"], bits["own_expert"], bits["own_mix"])),
        "norms": {
            "largest": [figure(float(norm)) for norm in norm_LN.max(axis=1)],
            "zeroed": figure(zeroed),
        },
        "documents": {"own": len(heldout), "anchor": len(anchor), "max_bytes": MAX_BYTES},
    }
    return Verdict(checks=checks, measured=measured, evidence=evidence)


def gather_evidence(
    model: Model,
    name: str,
    heldout: Sequence[bytes],
    anchor: Sequence[bytes],
    *,
    tick: Callable[[], None] = lambda: None,
) -> Evidence:
    """Return what an expert's card is made of.

    Args:
        model: The expert, plugged alone into its backbone.
        name: Its name.
        heldout: Text of its own domain.
        anchor: Public text.
        tick: Called after every pass.

    Raises:
        TextError: If either text is empty.
    """
    runs = {
        "own_backbone": (path_scorer(model, BACKBONE), heldout),
        "own_expert": (path_scorer(model, name), heldout),
        "own_mix": (mix_scorer(model), heldout),
        "anchor_backbone": (path_scorer(model, BACKBONE), anchor),
        "anchor_mix": (mix_scorer(model), anchor),
    }
    scores: dict[str, Score] = {}
    for run, (scorer, documents) in runs.items():
        scores[run] = score_documents(scorer, documents, context=model.context, max_bytes=MAX_BYTES)
        tick()
    index = model.names.index(name)
    traces = trace_routing(model, anchor, max_bytes=MAX_BYTES)
    tick()
    return Evidence(scores, np.array([weight_TE[:, index].mean() for weight_TE in traces]))


def figure(value: float) -> float | None:
    """Return a figure as cards record it; JSON has no word for what is not finite."""
    return round(value, 5) if np.isfinite(value) else None


def _check_taken(taken_N: np.ndarray, bound: float, loss: float) -> Check:
    """Check that public text stays mostly routed to the backbone, or gains where it is not."""
    n = len(taken_N)
    can_tell = n >= MIN_DOCUMENTS
    judged = bound if can_tell else float(taken_N.mean())
    certain = f"with {CONFIDENCE:.0%} confidence at most {bound:.1%} of such text"
    found = certain if can_tell else f"{n} documents are too few to bound what it takes of others"
    return Check(
        name="taken",
        passed=judged <= MAX_TAKEN or loss <= 0,
        found=f"{taken_N.mean():.2%} of public text was the expert's to predict; {found}",
        expected=f"at most {MAX_TAKEN:.0%}, unless it predicts it better than the backbone",
    )


def _check_scores(
    model: Model, name: str, own: bytes, other: bytes, n_repeated: int, n_changed: int
) -> tuple[Check, Check]:
    """Check that scores are deterministic and independent of batch row and bank entry.

    Args:
        model: The expert, plugged in.
        name: Its name.
        own: A text.
        other: Another one, for the other row of a batch.
        n_repeated: Documents that were scored again.
        n_changed: How many of them cost something else.
    """
    # Scores need no bodies, so the bank goes without.
    parts, index = model.parts, model.names.index(name)
    bank = dataclasses.replace(parts.bank, slots=())
    length = min(model.context, _SCORED_TOKENS)
    rows = [model.encode(document)[:length] for document in (own, other)]
    tokens_BT = np.zeros((2, max(map(len, rows))), np.int32)
    for row, tokens_T in zip(tokens_BT, rows, strict=True):
        row[: len(tokens_T)] = tokens_T

    def track(entries: list[int], tokens_BT: np.ndarray) -> np.ndarray:
        placed = jax.tree.map(lambda stack: stack[np.array(entries)], bank)
        return np.asarray(_tracks(dataclasses.replace(parts, bank=placed), jnp.asarray(tokens_BT)))

    track_BTE = track([0, index], tokens_BT)
    alone_BT = track([0], tokens_BT)[..., 0]
    n_touched = int((track_BTE[..., 0] != alone_BT).sum())
    again_BTE = track([0, index], tokens_BT)
    moved_BTE = track([0, 0, index, index], tokens_BT[::-1])[::-1]
    found_BTE = np.concatenate([again_BTE, moved_BTE[..., 1:]], axis=-1)
    n_differing = int((found_BTE != track_BTE[..., [0, 1, 0, 1, 1]]).sum())
    return (
        Check(
            name="isolation",
            passed=n_touched == 0,
            found=f"{n_touched} of {alone_BT.size} of the backbone's scores changed",
            expected="none, to the bit",
        ),
        Check(
            name="determinism",
            passed=n_differing + n_changed == 0,
            found=f"{n_differing} of {found_BTE.size} scores differ when computed again, in "
            f"another slot or in another row of a batch; {n_changed} of {n_repeated} documents "
            "cost something else the second time",
            expected="none, to the bit",
        ),
    )


@jax.jit
def _tracks(parts: composed.Parts, tokens_BT: jax.Array) -> jax.Array:
    state = mix_mode.mix_state(parts, tokens_BT.shape[0])
    return composed.track_records(parts, tokens_BT, state.router)
