"""What the table, page and figure of the demo share: methods, labels, colours and rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

METHODS: Final = ("backbone", "own_expert", "average", "mix", "safe")
_COMPOSED: Final = ("average", "mix", "safe")
# Hues for experts (Okabe & Ito 2008, made for the colour-blind); methods are greys and one violet.
BACKBONE_HUE: Final = "#8b939e"
_HUES: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")


def text_rows(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Return the texts and their figures; an own expert only where there is one."""
    rest = [
        (name, {method: result[name][method] for method in result[name] if method != "own_expert"})
        for name in ("public", "spliced")
    ]
    return [*result["domains"].items(), *rest]


def best_method(row: Mapping[str, float]) -> str:
    """Return the composed method with the fewest bits."""
    return min(_COMPOSED, key=row.__getitem__)


def method_label(method: str) -> str:
    """Return how a method is shown."""
    return method.replace("_", " ")


def format_bits(value: float | None) -> str:
    """Return a figure in bits, or a dash for none."""
    return "–" if value is None else f"{value:.3f}"


def expert_hues(result: Mapping[str, Any]) -> dict[str, str]:
    """Return a colour per name, the backbone first; past seven experts colours repeat."""
    hues = {name: _HUES[i % len(_HUES)] for i, name in enumerate(result["experts"])}
    return {"backbone": BACKBONE_HUE, **hues}
