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
from typing import Any, Final, Protocol

import jax
import numpy as np
from flax import nnx

from composable.interface import RouterInterface
from composable.model.backbone import Backbone
from composable.model.config import DTYPE_NAMES
from composable.model.model import Model, Pluggable
from composable.model.scout import Scout
from composable.model.tokenizer import Tokenizer
from composable.progress import CountProgress
from composable.vetting.card import Check
from composable.vetting.checks import figure
from composable.vetting.evaluation import (
    WINDOW_TOKENS,
    Score,
    measure_scout,
    mix_scorer,
    score_documents,
)
from composable.vetting.evidence import MAX_BYTES
from composable.vetting.trunk import Trunk

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

    @property
    def name(self) -> str:
        """The expert's name."""
        return self.expert.name


class NamedPeer(Protocol):
    """What checks report of a peer; its tensors may be elsewhere."""

    @property
    def name(self) -> str:
        """The expert's name."""

    @property
    def release(self) -> str:
        """Its release, `NAME@VERSION`."""

    @property
    def source(self) -> str:
        """Where text of its domain comes from."""

    @property
    def is_related(self) -> bool:
        """Whether one of the two derives from the other, or both from a third."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What changes when an expert is installed with a peer.

    Args:
        before: Scores of each kind of text with the peer alone, `own` and `anchor`; without its own
            text only `anchor`.
        after: The same with both.
        correlation: Of the two scouts on public text.
    """

    before: Mapping[str, Score]
    after: Mapping[str, Score]
    correlation: float


class PeerMeter:
    """Measures experts alone and in pairs, on one backbone.

    What depends on the backbone and public text alone is computed once: programs, and the trunk's
    outputs.

    Args:
        backbone: The frozen model.
        interface: Its contract.
        anchor: Public text.
        tokenizer: The backbone's; the one for bytes by default.
        trunk: The trunk, for public text; by default one that starts with nothing.

    Attributes:
        trunk: The trunk, for public text.
        own_trunk: The trunk, for experts' own text.
    """

    def __init__(
        self,
        backbone: Backbone,
        interface: RouterInterface,
        anchor: Sequence[bytes],
        *,
        tokenizer: Tokenizer | None = None,
        trunk: Trunk | None = None,
    ) -> None:
        self._backbone, self._interface, self._anchor = backbone, interface, anchor
        self._tokenizer = tokenizer
        self._model = self._make_model()
        self._had_full = self._model.parts.bank.has_full
        self.trunk = trunk or Trunk(backbone)
        self.own_trunk = Trunk(backbone)

    def score_alone(self, peer: Peer) -> dict[str, Score]:
        """Return the scores of a peer's text and of public text with the peer alone, by kind."""
        return self._score([peer.expert], peer.texts)

    def score_together(self, peer: Peer, newcomer: Pluggable) -> dict[str, Score]:
        """Return the same scores with a new expert installed as well."""
        return self._score([peer.expert, newcomer], peer.texts)

    def measure_scout(self, scout: Scout) -> np.ndarray:
        """Return a scout's log-probabilities of public text, in nats, shape M."""
        return measure_scout(
            self.trunk,
            self._interface,
            scout,
            self._anchor,
            self._model.tokenizer,
            max_bytes=MAX_BYTES,
        )

    def _make_model(self) -> Model:
        return Model(self._backbone, self._interface, capacity=_CAPACITY, tokenizer=self._tokenizer)

    def _score(self, experts: Sequence[Pluggable], own: Sequence[bytes]) -> dict[str, Score]:
        """Install experts, score both kinds of text in mix mode, and remove the experts again."""
        if self._model.parts.bank.has_full != self._had_full:
            # An earlier expert made room for full matrices: another program, and maybe other bits.
            self._model = self._make_model()
        model = self._model
        for expert in experts:
            model.install(expert)
        kinds = (("own", own, self.own_trunk), ("anchor", self._anchor, self.trunk))
        scores = {
            kind: score_documents(
                mix_scorer(model, trunk), documents, context=model.context, max_bytes=MAX_BYTES
            )
            for kind, documents, trunk in kinds
            if documents
        }
        for expert in experts:
            model.remove(expert.name)
        return scores


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
    meter = PeerMeter(backbone, interface, anchor, tokenizer=tokenizer)
    own_M, backbone_M = (meter.measure_scout(scout) for scout in (newcomer.scout, backbone.scout))
    effects = []
    for done, peer in enumerate(peers, start=1):
        peer_M = meter.measure_scout(peer.expert.scout)
        effects.append(
            Effect(
                before=meter.score_alone(peer),
                after=meter.score_together(peer, newcomer),
                correlation=correlate_scouts(own_M, peer_M, backbone_M),
            )
        )
        if progress:
            progress(done, len(peers))
    return judge_effects(peers, effects)


def judge_effects(
    peers: Sequence[NamedPeer], effects: Sequence[Effect]
) -> tuple[list[Check], dict[str, Any]]:
    """Return the checks of measured effects.

    Args:
        peers: The peers.
        effects: What the new expert changes for each, in their order.

    Returns:
        As `vet_with_peers`.
    """
    checks, measured = [], {}
    for peer, effect in zip(peers, effects, strict=True):
        checks.append(_check_effect(peer, effect))
        measured[peer.name] = {"release": peer.release, **_list_figures(effect)}
    if peers:
        correlations = [effect.correlation for effect in effects]
        checks.append(_check_copied(list(zip(peers, correlations, strict=True))))
    return checks, measured


def count_bytes(backbone: Backbone) -> int:
    """Return the memory that a `PeerMeter` takes, roughly: weights, bank, and logits of a window.

    Args:
        backbone: The model.
    """
    cfg = backbone.cfg
    weights: int = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(backbone)))
    entry: int = (
        3 * len(cfg.slots) * cfg.d_model * cfg.d_ff * np.dtype(DTYPE_NAMES[cfg.dtype]).itemsize
    )
    # While an expert is installed its matrices exist twice, and logits in three stages.
    return weights + (_CAPACITY + 1) * entry + 3 * 4 * WINDOW_TOKENS * cfg.vocab_size


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
    return float(np.corrcoef(*residuals)[0, 1])


def _list_figures(effect: Effect) -> dict[str, Any]:
    """Return the figures of one peer as the card records them; None for text that is missing."""
    rows = {
        kind: {
            "without": figure(effect.before[kind].bits_per_byte),
            "with": figure(effect.after[kind].bits_per_byte),
        }
        if kind in effect.before
        else None
        for kind in ("own", "anchor")
    }
    return {**rows, "likeness": figure(effect.correlation)}


def _centre(x_M: np.ndarray) -> np.ndarray:
    centred_M: np.ndarray = x_M - x_M.mean()
    return centred_M


def _check_copied(correlations: Sequence[tuple[NamedPeer, float]]) -> Check:
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


def _check_effect(peer: NamedPeer, effect: Effect) -> Check:
    """Check that neither the peer's text nor public text costs much more."""
    before, after = (
        {kind: score.bits_per_byte for kind, score in scores.items()}
        for scores in (effect.before, effect.after)
    )
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
        name=f"beside {peer.name}",
        passed=all(value <= MAX_CHANGE for value in change.values()),
        found=f"{own}; {describe('anchor', 'public text')}",
        expected=f"at most {MAX_CHANGE:+.1%}",
    )
