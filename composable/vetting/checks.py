"""The checks that an expert must pass before it is published, measured with it installed alone.

Every check compares a figure with a limit, on evidence that can be recomputed. Whether the files
fit the interface is checked when they are read, the effect on other experts in `peers.py`, and the
comparison with a previous release in `regression.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
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
from composable.model.model import Model, Pluggable
from composable.model.tokenizer import Tokenizer
from composable.progress import CountProgress
from composable.vetting.card import Check
from composable.vetting.evaluation import BATCH, Score
from composable.vetting.evidence import (
    MAX_BYTES,
    BoundedNorms,
    ClassBits,
    Evidence,
    compare_body_and_scout,
    count_changed_scores,
    gather_evidence,
    measure_bounded_norms,
)
from composable.vetting.statistics import CONFIDENCE

# An expert must lower the bits per byte of its own held-out text by at least this share ...
MIN_GAIN: Final = 0.01
# ... and, as the only expert in mix mode, may raise those of the anchor by at most this share.
MAX_ANCHOR_LOSS: Final = 0.01
# Largest share of public text that may be routed to it, with confidence, unless that text gains ...
MAX_ROUTED: Final = 0.5
# ... if there are at least this many documents; with fewer, the measured share itself is compared.
MIN_DOCUMENTS: Final = 6
# Largest share of its outputs that may exceed the slots' bounds, and count as zero.
MAX_ZEROED: Final = 0.001
# Router scores of this many tokens are compared bit by bit.
_SCORED_TOKENS: Final = 512
# Passes over text that `vet` makes.
_PASSES: Final = 9


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All checks of an expert and the figures behind them.

    Args:
        checks: In the order they ran.
        measured: Bits per byte and shares, as the card records them.
        evidence: Measurements of each document, for comparisons; None if the expert cannot run.
        before: The same of the previous release that it was compared with; None if there was none.
        regressions: What is worse than in a previous release, in words; None if it was not
            compared with one.
        warnings: What is suspicious but does not keep an expert from being published, in words.
    """

    checks: tuple[Check, ...]
    measured: dict[str, Any]
    evidence: Evidence | None = field(default=None, compare=False)
    before: Evidence | None = field(default=None, compare=False)
    regressions: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def recovery(backbone: float, own: float, composed_: float) -> float:
    """Return the share of the gap between backbone and own expert that a composed model closes.

    Args:
        backbone: Bits per byte of the backbone.
        own: Bits per byte of the expert, always on.
        composed_: Bits per byte of the composed model.

    Returns:
        1 if the composed model is as good as the expert, 0 if it is as good as the backbone or
        the two are alike.

    Example:
        >>> recovery(4.0, 2.0, 2.5)
        0.75
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
    """Vet an expert, installed alone.

    Args:
        backbone: The frozen model.
        interface: Its contract.
        expert: The expert to vet.
        heldout: The contributor's own text that the expert was not trained on.
        anchor: The public text that ships with the backbone.
        tokenizer: The backbone's; the one for bytes by default.
        progress: Called with the number of passes over text done and in all.

    Returns:
        The checks, their figures, and the evidence for comparisons.

    Raises:
        TextError: If either text is empty.
    """
    model, name = Model(backbone, interface, [expert], tokenizer=tokenizer), expert.name
    tick = _pass_counter(progress)
    evidence = gather_evidence(model, name, heldout, anchor, tick=tick)
    norms = measure_bounded_norms(model, name, [heldout, anchor])
    tick()
    repeated = heldout[:BATCH]
    n_changed = count_changed_scores(model, repeated, evidence.scores["own_mix"])
    tick()
    classes = compare_body_and_scout(model, name, heldout)
    tick()
    checks = (
        *_check_scores(model, name, heldout[0], anchor[0], len(repeated), n_changed),
        _check_finite(evidence.scores),
        _check_norms(norms),
        _check_gain(evidence.bits_per_byte, evidence.gain),
        _check_anchor(evidence.bits_per_byte, evidence.anchor_loss),
        _check_routed_share(
            evidence.routed_share_B, evidence.routed_share_bound, evidence.anchor_loss
        ),
    )
    documents = {"own": len(heldout), "anchor": len(anchor), "max_bytes": MAX_BYTES}
    measured = {**_list_figures(evidence, norms, classes), "documents": documents}
    return Verdict(
        checks=checks, measured=measured, evidence=evidence, warnings=_find_warnings(classes)
    )


def figure(value: float) -> float | None:
    """Return a figure as cards record it: rounded, and None if it is not finite.

    Example:
        >>> figure(1 / 3)
        0.33333
        >>> figure(float("nan")) is None
        True
    """
    return round(value, 5) if np.isfinite(value) else None


def _pass_counter(progress: CountProgress | None) -> Callable[[], None]:
    """Return a function that reports one more pass as done."""
    passes = itertools.count(1)

    def tick() -> None:
        if progress:
            progress(next(passes), _PASSES)

    return tick


def _list_figures(evidence: Evidence, norms: BoundedNorms, classes: ClassBits) -> dict[str, Any]:
    """Return the figures of an expert as its card records them."""
    bits = evidence.bits_per_byte
    low, high = evidence.gain_interval
    return {
        "bits_per_byte": {run: figure(value) for run, value in bits.items()},
        "class_bits_per_byte": {"body": figure(classes.body), "scout": figure(classes.scout)},
        "gain": figure(evidence.gain),
        "gain_interval": {"low": figure(low), "high": figure(high)},
        "anchor_loss": figure(evidence.anchor_loss),
        "anchor_taken": figure(float(evidence.routed_share_B.mean())),
        "anchor_taken_bound": figure(evidence.routed_share_bound),
        "recovery": figure(recovery(bits["own_backbone"], bits["own_expert"], bits["own_mix"])),
        "norms": {
            "largest": [figure(float(norm)) for norm in norms.largest_L],
            "zeroed": figure(norms.zeroed),
        },
    }


def _find_warnings(classes: ClassBits) -> tuple[str, ...]:
    """Return what is suspicious about an expert that may pass every check."""
    if not classes.scout < classes.body:
        return ()
    return (
        "the scout alone predicts the held-out text better than the body does: "
        f"{classes.scout:.3f} against {classes.body:.3f} bits per byte for the tokens' classes; "
        "train for more steps",
    )


def _check_finite(scores: Mapping[str, Score]) -> Check:
    """Check that every score is a number."""
    n_finite = sum(bool(np.isfinite(score.nats_B).all()) for score in scores.values())
    return Check(
        name="finite",
        passed=n_finite == len(scores),
        found=f"{n_finite} of {len(scores)} sets of scores finite",
        expected="all",
    )


def _check_norms(norms: BoundedNorms) -> Check:
    """Check that nearly no output is beyond its slot's bound."""
    return Check(
        name="norms",
        passed=norms.zeroed <= MAX_ZEROED,
        found=f"outputs reach {norms.largest_share:.2f} of their slot's bound; {norms.zeroed:.2%} "
        f"of {norms.n_outputs:,} are beyond it and count as zero",
        expected=f"at most {MAX_ZEROED:.1%} beyond",
    )


def _check_gain(bits: Mapping[str, float], gain: float) -> Check:
    """Check that the body, always on, predicts its own text better than the backbone."""
    return Check(
        name="gain",
        passed=gain >= MIN_GAIN,
        found=f"{bits['own_backbone']:.3f} to {bits['own_expert']:.3f} bits per byte on its "
        f"own held-out text ({-gain:+.1%}) with the body always on; {bits['own_mix']:.3f} in "
        "mix mode",
        expected=f"at least {MIN_GAIN:.0%} less",
    )


def _check_anchor(bits: Mapping[str, float], loss: float) -> Check:
    """Check that public text costs hardly more in mix mode than with the backbone alone."""
    return Check(
        name="anchor",
        passed=loss <= MAX_ANCHOR_LOSS,
        found=f"{bits['anchor_backbone']:.3f} to {bits['anchor_mix']:.3f} bits per byte on "
        f"public text ({loss:+.2%})",
        expected=f"at most {MAX_ANCHOR_LOSS:+.0%}",
    )


def _check_routed_share(routed_share_B: np.ndarray, bound: float, loss: float) -> Check:
    """Check that public text stays mostly routed to the backbone, or gains where it is not."""
    n, mean = len(routed_share_B), float(routed_share_B.mean())
    has_bound = n >= MIN_DOCUMENTS
    bounded = f"with {CONFIDENCE:.0%} confidence at most {bound:.1%} of such text"
    found = bounded if has_bound else f"{n} documents are too few to bound the share of other text"
    return Check(
        name="taken",
        passed=(bound if has_bound else mean) <= MAX_ROUTED or loss <= 0,
        found=f"{mean:.2%} of the tokens of public text routed to the expert; {found}",
        expected=f"at most {MAX_ROUTED:.0%}, unless it predicts it better than the backbone",
    )


def _check_scores(
    model: Model, name: str, own: bytes, other: bytes, n_repeated: int, n_changed: int
) -> tuple[Check, Check]:
    """Check that scores are deterministic and independent of batch row and bank entry.

    Args:
        model: A model with the expert.
        name: Its name.
        own: A text.
        other: Another text, for the other row of a batch.
        n_repeated: Number of documents that were scored again.
        n_changed: Number of them whose score changed.
    """
    # Router scores do not depend on bodies, so they are left out of the bank.
    parts, index = model.parts, model.names.index(name)
    bank = dataclasses.replace(parts.bank, slots=(), changes=())
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
            f"another bank entry or another row of a batch; {n_changed} of {n_repeated} documents "
            "have another score the second time",
            expected="none, to the bit",
        ),
    )


@jax.jit
def _tracks(parts: composed.Parts, tokens_BT: jax.Array) -> jax.Array:
    state = mix_mode.mix_state(parts, tokens_BT.shape[0])
    return composed.track_records(parts, tokens_BT, state.router)
