"""The figures of a card as plots: bars in SVG, in the page's own colours, light or dark.

A card is what its author's machine wrote, so every figure is checked before it is drawn, and one
that is missing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup, escape

from composable.server.cards import read_figure

WIDTH: Final = 440
_LABEL: Final = 125
# Of the figure at a bar's end; a little more than it takes in most fonts.
_LETTER: Final = 8
_ROW: Final = 30
MAX_ROWS: Final = 12


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a plot.

    Args:
        label: What it shows.
        value: Its length.
        text: The figure at its end.
        kind: `base`, `ours` or `bad`, which sets its colour.
        lower: The lower end of an interval; by default the value.
        upper: The upper end of an interval; None without one.
    """

    label: str
    value: float
    text: str
    kind: str = "base"
    lower: float | None = None
    upper: float | None = None


def draw_bars(title: str, bars: Sequence[Bar], *, limit: float | None = None) -> Markup:
    """Return a plot with a bar in each row.

    Args:
        title: What is plotted; screen readers read it with all figures.
        bars: The bars, from the top.
        limit: A value to mark with a line.
    """
    bars = [bar for bar in bars if bar.value >= 0]
    largest = max([*(bar.upper or bar.value for bar in bars), limit or 0.0, 1e-9])
    room = WIDTH - _LABEL - 12 - _LETTER * max((len(bar.text) for bar in bars), default=0)
    height = _ROW * len(bars) + 8
    spoken = "; ".join(f"{bar.label}: {bar.text}" for bar in bars)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}. {escape(spoken)}">'
    ]
    for row, bar in enumerate(bars):
        y = _ROW * row + 4
        length = max(room * bar.value / largest, 1.0)
        end = _LABEL + max(length, room * (bar.upper or 0.0) / largest)
        parts.append(
            f'<text class="label" x="{_LABEL - 10}" y="{y + 18}">{escape(bar.label)}</text>'
            f'<rect class="{bar.kind}" x="{_LABEL}" y="{y + 3}" width="{length:.1f}" '
            f'height="{_ROW - 10}" rx="3"/>'
            f'<text class="value" x="{end + 8:.1f}" y="{y + 18}">{escape(bar.text)}</text>'
        )
        if bar.upper is not None:
            lower = bar.value if bar.lower is None else max(bar.lower, 0.0)
            left, right = (_LABEL + room * end / largest for end in (lower, bar.upper))
            middle = y + _ROW / 2 - 2
            tick = "" if bar.lower is None else f"M{left:.1f} {middle - 5}v10"
            parts.append(
                f'<path class="whisker" d="M{left:.1f} {middle}H{right:.1f}'
                f'M{right:.1f} {middle - 5}v10{tick}"/>'
            )
    if limit is not None:
        x = _LABEL + room * limit / largest
        parts.append(f'<path class="limit" d="M{x:.1f} 0v{height}"/>')
    return Markup("".join(parts) + "</svg>")


def plot_gain(card: Mapping[str, Any]) -> Markup | None:
    """Return the plot of an expert's own held-out text; None if the card lacks the figures."""
    return _plot_bits(
        card,
        "Bits per byte on its own held-out text, lower is better",
        (
            ("own_backbone", "backbone alone", "base"),
            ("own_expert", "expert always on", "ours"),
            ("own_mix", "routed", "ours"),
        ),
    )


def plot_saving(card: Mapping[str, Any]) -> Markup | None:
    """Return the plot of what it saves of its own text, with its interval; None without figures."""
    gain = read_figure(card, "gain")
    low, high = (read_figure(card, "gain_interval", end) for end in ("low", "high"))
    if gain is None or low is None or high is None or not low <= gain <= high:
        return None
    text = f"{100 * gain:.1f}% ({100 * low:.1f} to {100 * high:.1f}%)"
    bar = Bar(label="bits saved", value=gain, text=text, kind="ours", lower=low, upper=high)
    return draw_bars("Share of the backbone's bits that it saves, with the 95% interval", [bar])


def plot_public(card: Mapping[str, Any]) -> Markup | None:
    """Return the plot of public text; None if the card lacks the figures."""
    return _plot_bits(
        card,
        "Bits per byte on public text, lower is better",
        (("anchor_backbone", "backbone alone", "base"), ("anchor_mix", "with it", "ours")),
    )


def plot_share(card: Mapping[str, Any]) -> Markup | None:
    """Return the plot of the share of public text that is routed to it, with its interval."""
    share = read_figure(card, "anchor_taken")
    bound = read_figure(card, "anchor_taken_bound")
    if share is None:
        return None
    text = f"{100 * share:.2f}%" + (f" (≤ {100 * bound:.1f}%)" if bound is not None else "")
    bar = Bar(label="routed to it", value=share, text=text, kind="ours", upper=bound)
    title = "Share of public text that is routed to it, with the upper end of its 95% interval"
    return draw_bars(title, [bar])


def plot_peers(card: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Return a plot for each expert that it was measured with: what either text costs then."""
    peers = card.get("measured", {}).get("beside")
    found = []
    for name in list(peers)[:MAX_ROWS] if isinstance(peers, dict) else ():
        bars = []
        for key, label in (("own", "its text"), ("anchor", "public text")):
            for state, kind in (("without", "base"), ("with", "ours")):
                value = read_figure(card, "beside", name, key, state)
                if value is not None:
                    text = f"{value:.3f}"
                    bars.append(Bar(label=f"{label} {state}", value=value, text=text, kind=kind))
        if bars:
            title = f"Bits per byte with {name} installed, lower is better"
            found.append((str(name), draw_bars(title, bars)))
    return found


def _plot_bits(
    card: Mapping[str, Any], title: str, rows: Sequence[tuple[str, str, str]]
) -> Markup | None:
    bars = []
    for key, label, kind in rows:
        value = read_figure(card, "bits_per_byte", key)
        if value is not None:
            bars.append(Bar(label=label, value=value, text=f"{value:.3f}", kind=kind))
    return draw_bars(title, bars) if bars else None
