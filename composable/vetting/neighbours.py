"""What a newcomer does to experts that are published already, when plugged in beside them.

An expert's card was measured with the expert alone beside the backbone. So each published expert is
plugged in alone, then the newcomer beside it, and what changes is the newcomer's doing. Public text
is always at hand. The other expert's own text is often private: where it is not at hand, the effect
on it is unknown, and the check says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from composable.interface import RouterInterface
from composable.model.backbone import Backbone
from composable.model.model import Model, Pluggable
from composable.model.tokenizer import Tokenizer
from composable.vetting.checks import MAX_BYTES, Check, figure
from composable.vetting.evaluation import mix_scorer, score_documents

# A newcomer may raise the bits per byte of another expert's text, or of public text, by this share.
MAX_CHANGE: Final = 0.005
# Room for the backbone, the neighbour and the newcomer: one program serves every pair.
_CAPACITY: Final = 4


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A published expert.

    Args:
        expert: The expert.
        release: What it is, `NAME@VERSION`.
        texts: Text of its domain that it was not trained on, if there is any at hand.
        source: Where that text is from.
    """

    expert: Pluggable
    release: str
    texts: tuple[bytes, ...] = ()
    source: str = ""


def vet_beside(
    backbone: Backbone,
    interface: RouterInterface,
    newcomer: Pluggable,
    neighbours: Sequence[Neighbour],
    anchor: Sequence[bytes],
    *,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Check], dict[str, Any]]:
    """Vet what an expert does to others in mix mode.

    Args:
        backbone: The frozen model.
        interface: Its contract.
        newcomer: What to vet.
        neighbours: Whom to plug it in beside, one at a time.
        anchor: Public text.
        tokenizer: The backbone's; the one for bytes by default.
        progress: Called with neighbours done and in all.

    Returns:
        A check for every neighbour, and the figures behind them by name.
    """
    model = Model(backbone, interface, capacity=_CAPACITY, tokenizer=tokenizer)
    checks, measured = [], {}
    for done, neighbour in enumerate(neighbours, start=1):
        texts = {"own": neighbour.texts, "anchor": anchor}
        at_hand = {kind: list(documents) for kind, documents in texts.items() if documents}

        def measure(at_hand: dict[str, list[bytes]] = at_hand) -> dict[str, float]:
            return {
                kind: score_documents(
                    mix_scorer(model), documents, context=model.context, max_bytes=MAX_BYTES
                ).bits_per_byte
                for kind, documents in at_hand.items()
            }

        name = neighbour.expert.name
        model.install(neighbour.expert)
        before = measure()
        model.install(newcomer)
        after = measure()
        for expert in (neighbour.expert, newcomer):
            model.remove(expert.name)
        checks.append(_check(neighbour, before, after))
        measured[name] = {
            "release": neighbour.release,
            **{
                kind: {"without": figure(before[kind]), "with": figure(after[kind])}
                if kind in before
                else None
                for kind in texts
            },
        }
        if progress:
            progress(done, len(neighbours))
    return checks, measured


def _check(neighbour: Neighbour, before: dict[str, float], after: dict[str, float]) -> Check:
    """Hold what changed against the limit."""
    change = {kind: after[kind] / before[kind] - 1 for kind in before}

    def tell(kind: str, what: str) -> str:
        return (
            f"{before[kind]:.3f} to {after[kind]:.3f} bits per byte on {what} ({change[kind]:+.2%})"
        )

    own = (
        tell("own", f"its text, {neighbour.source}")
        if "own" in change
        else "none of its own text is at hand, so what happens there is unknown"
    )
    return Check(
        name=f"beside {neighbour.expert.name}",
        passed=all(value <= MAX_CHANGE for value in change.values()),
        found=f"{own}; {tell('anchor', 'public text')}",
        expected=f"at most {MAX_CHANGE:+.1%}",
    )
