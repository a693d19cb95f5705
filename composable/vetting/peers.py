"""What a newcomer does to experts that are published already, when plugged in beside them.

An expert's card was measured with the expert alone beside the backbone. So each published expert is
plugged in alone, then the newcomer beside it, and what changes is the newcomer's doing. Public text
is always at hand. The other expert's own text is often private: where it is not at hand, the effect
on it is unknown, and the check says so.

Nobody's text is needed to tell whether the newcomer's scout is a copy of the other's. A copy gets
half of the other's tokens in mix mode, whatever its body does with them. Scouts that were trained
apart, on one domain or on the very same text, predict that text about as well, but each token of
public text as well and as badly as the other only a copy does
(`docs/adr/0010-copied-scouts-by-public-text.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from composable.interface import RouterInterface
from composable.model.backbone import Backbone
from composable.model.model import BACKBONE, Model, Pluggable
from composable.model.tokenizer import Tokenizer
from composable.progress import CountProgress
from composable.vetting.card import Check
from composable.vetting.checks import MAX_BYTES, figure
from composable.vetting.evaluation import measure_evidence, mix_scorer, score_documents

# A newcomer may raise the bits per byte of another expert's text, or of public text, by this share.
MAX_CHANGE: Final = 0.005
# Its scout may be so much like another's. On the anchor of `tiny-bytes` (ADR 10), rivals in one
# domain reach 0.82, and 0.84 with the same text but for a twentieth; begun from the same seed and
# hardly trained, 0.92. A copy is at 1, and with 5 % of noise on every weight at 0.95 or more.
MAX_LIKENESS: Final = 0.93
# Predictions beyond this quantile of all, at either end, count as being there: a copy that is made
# to fail on a few bytes that its domain does not have remains a copy.
_TAIL: Final = 0.05
# A scout of whose variance the backbone's explains all but this share says what that one says.
_ROUNDING: Final = 1e-9
# Room for the backbone, the peer and the newcomer: one program serves every pair.
_CAPACITY: Final = 4


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A published expert.

    Args:
        expert: The expert.
        release: What it is, `NAME@VERSION`.
        texts: Text of its domain that it was not trained on, if there is any at hand.
        source: Where that text is from.
        is_kin: Whether the newcomer and it derive from one another, or both from a third, by what
            their manifests say: then their scouts may be alike.
    """

    expert: Pluggable
    release: str
    texts: tuple[bytes, ...] = ()
    source: str = ""
    is_kin: bool = False


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
    """Vet what an expert does to others in mix mode.

    Args:
        backbone: The frozen model.
        interface: Its contract.
        newcomer: What to vet.
        peers: Whom to plug it in beside, one at a time.
        anchor: Public text.
        tokenizer: The backbone's; the one for bytes by default.
        progress: Called with peers done and in all.

    Returns:
        A check for every peer, one of the newcomer's scout, and the figures behind them by
        name.
    """
    model = Model(backbone, interface, capacity=_CAPACITY, tokenizer=tokenizer)
    checks, measured = [], {}
    likenesses: list[tuple[Peer, float]] = []
    for done, peer in enumerate(peers, start=1):
        texts = {"own": peer.texts, "anchor": anchor}
        at_hand = {kind: list(documents) for kind, documents in texts.items() if documents}

        def measure(at_hand: dict[str, list[bytes]] = at_hand) -> dict[str, float]:
            return {
                kind: score_documents(
                    mix_scorer(model), documents, context=model.context, max_bytes=MAX_BYTES
                ).bits_per_byte
                for kind, documents in at_hand.items()
            }

        name = peer.expert.name
        model.install(peer.expert)
        before = measure()
        model.install(newcomer)
        after = measure()
        evidence_ET = measure_evidence(model, anchor, max_bytes=MAX_BYTES)
        own_T, other_T, backbone_T = (
            evidence_ET[model.names.index(whose)] for whose in (newcomer.name, name, BACKBONE)
        )
        likenesses.append((peer, measure_likeness(own_T, other_T, backbone_T)))
        for expert in (peer.expert, newcomer):
            model.remove(expert.name)
        checks.append(_check(peer, before, after))
        measured[name] = {
            "release": peer.release,
            **{
                kind: {"without": figure(before[kind]), "with": figure(after[kind])}
                if kind in before
                else None
                for kind in texts
            },
            "likeness": figure(likenesses[-1][1]),
        }
        if progress:
            progress(done, len(peers))
    if likenesses:
        checks.append(_check_copied(likenesses))
    return checks, measured


def measure_likeness(own_T: np.ndarray, other_T: np.ndarray, backbone_T: np.ndarray) -> float:
    """Return how alike two scouts are by what they say of the same tokens.

    It is the correlation of what the backbone's scout does not explain of either: without that, two
    scouts that know nothing would be alike for finding hard what is hard.

    Args:
        own_T: Log likelihood of every token by one scout, in nats.
        other_T: By the other.
        backbone_T: By the backbone's.

    Returns:
        1 for a scout and its copy, 0 where one of them says nothing that the backbone's does not.
    """
    if np.array_equal(own_T, other_T):
        return 1.0
    common_T, *both = (
        _centre(np.clip(x_T, *np.quantile(x_T, [_TAIL, 1 - _TAIL])))
        for x_T in (backbone_T, own_T, other_T)
    )
    power = float(common_T @ common_T) or 1.0
    rest = [x_T - (x_T @ common_T / power) * common_T for x_T in both]
    for x_T, rest_T in zip(both, rest, strict=True):
        if not rest_T @ rest_T > _ROUNDING * (x_T @ x_T):
            return 0.0
    own_T, other_T = (rest_T / np.linalg.norm(rest_T) for rest_T in rest)
    return float(own_T @ other_T)


def _centre(x_T: np.ndarray) -> np.ndarray:
    return x_T - x_T.mean()


def _check_copied(likenesses: Sequence[tuple[Peer, float]]) -> Check:
    """Check that the newcomer's scout is not a copy of another expert's."""
    strangers = sorted((like, it.release) for it, like in likenesses if not it.is_kin)
    copied = [pair for pair in strangers if pair[0] > MAX_LIKENESS]
    found = [f"{like:.2f} with that of {release}" for like, release in copied or strangers[-1:]]
    if copied:
        found[-1] += " (a copy, or begun from the same seed and taught little)"
    found += [
        f"{like:.2f} with that of {it.release}, its kin by the manifests"
        for it, like in likenesses
        if it.is_kin
    ]
    return Check(
        name="copied",
        passed=not copied,
        found=f"on public text its scout correlates {'; '.join(found)}",
        expected=f"at most {MAX_LIKENESS:.2f}, but for kin by the manifests",
    )


def _check(peer: Peer, before: dict[str, float], after: dict[str, float]) -> Check:
    """Hold what changed against the limit."""
    change = {kind: after[kind] / before[kind] - 1 for kind in before}

    def tell(kind: str, what: str) -> str:
        return (
            f"{before[kind]:.3f} to {after[kind]:.3f} bits per byte on {what} ({change[kind]:+.2%})"
        )

    own = (
        tell("own", f"its text, {peer.source}")
        if "own" in change
        else "none of its own text is at hand, so what happens there is unknown"
    )
    return Check(
        name=f"beside {peer.expert.name}",
        passed=all(value <= MAX_CHANGE for value in change.values()),
        found=f"{own}; {tell('anchor', 'public text')}",
        expected=f"at most {MAX_CHANGE:+.1%}",
    )
