"""The effect of a new expert on published experts, its peers.

The card of an expert is measured with the expert installed alone. Here each peer is installed
alone, then together with the new expert, and the difference is due to the new one. Public text is
always available. A peer's own text is often private: without it the effect on the peer is unknown,
and the check reports that.

Public text alone shows whether the new scout is a copy of a peer's. A copy receives half of the
peer's tokens in mix mode, whatever its body does with them. Scouts trained separately, on one
domain or even on the same text, predict that text about equally well, but only a copy predicts each
token of public text equally well (`docs/adr/0010-copied-scouts-by-public-text.md`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy import stats

from composable.interface import RouterInterface
from composable.model.backbone import Backbone
from composable.model.model import BACKBONE, Model, Pluggable
from composable.model.tokenizer import Tokenizer
from composable.progress import CountProgress
from composable.vetting.card import Check
from composable.vetting.checks import figure
from composable.vetting.evaluation import measure_evidence, mix_scorer, score_documents
from composable.vetting.evidence import MAX_BYTES

# A new expert may raise the bits per byte of a peer's text, or of public text, by this share.
MAX_CHANGE: Final = 0.005
# Largest correlation of its scout with a peer's. On the anchor of `tiny-bytes` (ADR 10), rivals in
# one domain reach 0.82, and 0.84 with the same text but for a twentieth; with the same initial
# weights and hardly any training, 0.92. A copy has 1, and 0.95 or more with 5 % noise on every
# weight.
MAX_CORRELATION: Final = 0.93
# Log-probabilities beyond this quantile, at either end, are clipped to it: a copy that is made to
# fail on a few bytes that its domain does not have still counts as a copy.
_TAIL: Final = 0.05
# A scout whose variance the backbone's explains but for this share predicts what that one predicts.
_ROUNDING: Final = 1e-9
# Room for the backbone, the peer and the newcomer: one program serves every pair.
_CAPACITY: Final = 4


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A published expert.

    Args:
        expert: The expert.
        release: Its release, `NAME@VERSION`.
        texts: Text of its domain that it was not trained on, if any is available.
        source: Where that text comes from.
        is_related: Whether the new expert and it derive from one another, or both from a third, by
            their manifests: then their scouts may be alike.
    """

    expert: Pluggable
    release: str
    texts: tuple[bytes, ...] = ()
    source: str = ""
    is_related: bool = False


def vet_with_peers(
    backbone: Backbone,
    interface: RouterInterface,
    newcomer: Pluggable,
    peers: Sequence[Peer],
    anchor: Sequence[bytes],
    *,
    tokenizer: Tokenizer | None = None,
    progress: CountProgress | None = None,
) -> tuple[list[Check], dict[str, Any]]:
    """Vet the effect of an expert on others in mix mode.

    Args:
        backbone: The frozen model.
        interface: Its contract.
        newcomer: The expert to vet.
        peers: Published experts to install it with, one at a time.
        anchor: Public text.
        tokenizer: The backbone's; the one for bytes by default.
        progress: Called with the number of peers done and in all.

    Returns:
        A check for every peer, one of the newcomer's scout, and the figures behind them by
        name.
    """
    model = Model(backbone, interface, capacity=_CAPACITY, tokenizer=tokenizer)
    checks, measured = [], {}
    correlations: list[tuple[Peer, float]] = []
    for done, peer in enumerate(peers, start=1):
        effect = _measure_effect(
            model, newcomer, peer.expert, {"own": peer.texts, "anchor": anchor}
        )
        checks.append(_check_effect(peer, effect.before, effect.after))
        measured[peer.expert.name] = {"release": peer.release, **_list_figures(effect)}
        correlations.append((peer, effect.correlation))
        if progress:
            progress(done, len(peers))
    if correlations:
        checks.append(_check_copied(correlations))
    return checks, measured


def correlate_scouts(own_M: np.ndarray, other_M: np.ndarray, backbone_M: np.ndarray) -> float:
    """Return the correlation of two scouts' log-probabilities, given those of the backbone's.

    It is the correlation of what the backbone's scout does not explain of either. Otherwise two
    scouts that know nothing would be alike, since the same tokens are hard for both.

    Args:
        own_M: Log-probability of every token by one scout, in nats.
        other_M: By the other.
        backbone_M: By the backbone's.

    Returns:
        1 for a scout and its copy, 0 where one of them predicts nothing that the backbone's does
        not.

    Example:
        >>> backbone_M, own_M = np.array([1.0, 1.0, -1.0, -1.0]), np.array([3.0, 1.0, -1.0, -3.0])
        >>> correlate_scouts(own_M, own_M, backbone_M)
        1.0
        >>> correlate_scouts(own_M, backbone_M, backbone_M)
        0.0
    """
    if np.array_equal(own_M, other_M):
        return 1.0
    common_M, *both = (
        _centre(np.clip(x_M, *np.quantile(x_M, [_TAIL, 1 - _TAIL])))
        for x_M in (backbone_M, own_M, other_M)
    )
    power = float(common_M @ common_M) or 1.0
    residuals = [x_M - (x_M @ common_M / power) * common_M for x_M in both]
    for x_M, rest_M in zip(both, residuals, strict=True):
        if not rest_M @ rest_M > _ROUNDING * (x_M @ x_M):
            return 0.0
    return float(stats.pearsonr(*residuals).statistic)


@dataclass(frozen=True, kw_only=True)
class _Effect:
    """What changes when an expert is installed with a peer.

    Args:
        before: Bits per byte of each kind of text with the peer alone.
        after: The same with both.
        correlation: Of the two scouts on public text.
    """

    before: dict[str, float]
    after: dict[str, float]
    correlation: float


def _measure_effect(
    model: Model, newcomer: Pluggable, peer: Pluggable, texts: Mapping[str, Sequence[bytes]]
) -> _Effect:
    """Install a peer, then both, and remove them again.

    Args:
        model: The backbone without experts.
        newcomer: The new expert.
        peer: The published one.
        texts: Documents by kind, `own` and `anchor`; a kind without documents is skipped.
    """
    model.install(peer)
    before = _score_texts(model, texts)
    model.install(newcomer)
    after = _score_texts(model, texts)
    evidence_EM = measure_evidence(model, texts["anchor"], max_bytes=MAX_BYTES)
    scouts = (model.names.index(name) for name in (newcomer.name, peer.name, BACKBONE))
    correlation = correlate_scouts(*(evidence_EM[index] for index in scouts))
    for expert in (peer, newcomer):
        model.remove(expert.name)
    return _Effect(before=before, after=after, correlation=correlation)


def _score_texts(model: Model, texts: Mapping[str, Sequence[bytes]]) -> dict[str, float]:
    """Return bits per byte in mix mode, by kind of text."""
    scorer = mix_scorer(model)
    return {
        kind: score_documents(
            scorer, documents, context=model.context, max_bytes=MAX_BYTES
        ).bits_per_byte
        for kind, documents in texts.items()
        if documents
    }


def _list_figures(effect: _Effect) -> dict[str, Any]:
    """Return the figures of one peer as the card records them; None for text that is missing."""
    before, after = effect.before, effect.after
    rows = {
        kind: {"without": figure(before[kind]), "with": figure(after[kind])}
        if kind in before
        else None
        for kind in ("own", "anchor")
    }
    return {**rows, "likeness": figure(effect.correlation)}


def _centre(x_M: np.ndarray) -> np.ndarray:
    centred_M: np.ndarray = x_M - x_M.mean()
    return centred_M


def _check_copied(correlations: Sequence[tuple[Peer, float]]) -> Check:
    """Check that the newcomer's scout is not a copy of another expert's."""
    unrelated = sorted((value, peer.release) for peer, value in correlations if not peer.is_related)
    copied = [pair for pair in unrelated if pair[0] > MAX_CORRELATION]
    found = [f"{value:.2f} with that of {release}" for value, release in copied or unrelated[-1:]]
    if copied:
        found[-1] += " (a copy, or trained little from the same initial weights)"
    found += [
        f"{value:.2f} with that of {peer.release}, which is related by derives-from"
        for peer, value in correlations
        if peer.is_related
    ]
    return Check(
        name="copied",
        passed=not copied,
        found=f"on public text its scout correlates {'; '.join(found)}",
        expected=f"at most {MAX_CORRELATION:.2f}, except with related experts",
    )


def _check_effect(peer: Peer, before: dict[str, float], after: dict[str, float]) -> Check:
    """Check that neither the peer's text nor public text costs much more."""
    change = {kind: after[kind] / before[kind] - 1 for kind in before}

    def describe(kind: str, what: str) -> str:
        return (
            f"{before[kind]:.3f} to {after[kind]:.3f} bits per byte on {what} ({change[kind]:+.2%})"
        )

    own = (
        describe("own", f"its text, {peer.source}")
        if "own" in change
        else "none of its own text is available, so the effect there is unknown"
    )
    return Check(
        name=f"beside {peer.expert.name}",
        passed=all(value <= MAX_CHANGE for value in change.values()),
        found=f"{own}; {describe('anchor', 'public text')}",
        expected=f"at most {MAX_CHANGE:+.1%}",
    )
