"""Figures of cards, which their authors' machines wrote: each is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def read_figure(card: Mapping[str, Any], *path: str) -> float | None:
    """Return a figure of a card if it is there and a finite number.

    Args:
        card: The card as data.
        path: The keys below `measured`.

    Example:
        >>> read_figure({"measured": {"gain": 0.7}}, "gain")
        0.7
        >>> read_figure({"measured": {"gain": "high"}}, "gain")
    """
    value: Any = card.get("measured")
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e15 and math.isfinite(value) else None
