"""What the table, page and figure of the demo share: methods, labels, colours and rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from composable.demo.result import Measurements

METHODS: Final = ("backbone", "own_expert", "average", "mix", "safe")
_COMPOSED: Final = ("average", "mix", "safe")
# Hues for experts (Okabe & Ito 2008, made for the colour-blind); methods are greys and one violet.
BACKBONE_HUE: Final = "#8b939e"
_HUES: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")


def text_rows(measured: Measurements) -> list[tuple[str, dict[str, float]]]:
    """Return the texts and their bits per byte by method.

    Args:
        measured: Measurements of the demo.
    """
    texts = {**measured.domains, "public": measured.public, "spliced": measured.spliced}
    return [(name, bits.by_method()) for name, bits in texts.items()]


def best_method(row: Mapping[str, float]) -> str:
    """Return the composed method with the fewest bits.

    Args:
        row: Bits per byte by method.

    Example:
        >>> best_method({"backbone": 1.0, "average": 3.0, "mix": 2.1, "safe": 2.0})
        'safe'
    """
    return min(_COMPOSED, key=row.__getitem__)


def method_label(method: str) -> str:
    """Return the label of a method.

    Example:
        >>> method_label("own_expert")
        'own expert'
    """
    return method.replace("_", " ")


def format_bits(value: float | None) -> str:
    """Return bits per byte as text, or a dash for None.

    Example:
        >>> format_bits(1.98204), format_bits(None)
        ('1.982', '–')
    """
    return "–" if value is None else f"{value:.3f}"


def expert_hues(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name, the backbone first; from the eighth expert colours repeat.

    Args:
        names: Names of the experts.

    Example:
        >>> expert_hues(["german"])
        {'backbone': '#8b939e', 'german': '#0072b2'}
    """
    hues = {name: _HUES[i % len(_HUES)] for i, name in enumerate(names)}
    return {"backbone": BACKBONE_HUE, **hues}
