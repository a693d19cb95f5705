"""The demo's figure for the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from composable.demo.report import (
    BACKBONE_HUE,
    METHODS,
    best_method,
    expert_hues,
    format_bits,
    method_label,
    text_rows,
)
from composable.demo.result import DemoResult, Measurements
from composable.demo.trace import Trace, thin_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure


_METHOD_HUES: Final = {
    "backbone": BACKBONE_HUE,
    "own_expert": "none",
    "average": "#c3c8cf",
    "mix": "#a594f0",
    "safe": "#5b3fd6",
}
_INK: Final = "#1b1f24"
_QUIET: Final = "#5b6470"


def write_readme_figure(path: Path, result: DemoResult, traces: Sequence[Trace]) -> None:
    """Write a PNG: bars for every text, and below them the router weights along one document.

    The background is white, so that the figure is readable on dark pages.

    Args:
        path: The file.
        result: The demo's results.
        traces: The first one is drawn; without any, only the bars are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.7 if traces else 2.5), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    bars, *below = figure.subfigures(
        1 + bool(traces), 1, squeeze=False, height_ratios=[2.5, 2.2][: 1 + bool(traces)]
    )[:, 0]
    _draw_bars(bars, result)
    if below:
        _draw_routing(below[0], traces[0], expert_hues(result.experts))
    figure.savefig(path, metadata={"Software": None})


def _draw_bars(figure: SubFigure, measured: Measurements) -> None:
    rows = text_rows(measured)
    top = max(value for _, row in rows for value in row.values())
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    figure.subplots_adjust(left=0.09, right=0.99, top=0.73, bottom=0.03, wspace=0.12)
    _write(figure, 0.01, 0.92, "Bits per byte on held-out text", weight="bold", size=11)
    recovery = measured.recovery
    note = (
        "lower is better; gap to the own expert that is closed: "
        f"{recovery.mix:.1%} in mix mode, {recovery.safe:.1%} in safe mode"
    )
    _write(figure, 0.99, 0.92, note, ha="right", color=_QUIET)
    for panel, (name, row) in zip(panels, rows, strict=True):
        _clear(panel, (0, 1.3 * top), (len(METHODS) - 0.4, -0.6))
        panel.set_title(name, loc="left", fontsize=9.5, weight="bold", parse_math=False)
        for y, method in enumerate(METHODS):
            if panel is panels[0]:
                _write(panel, -0.08 * top, y, method_label(method), ha="right", color=_QUIET)
            if method not in row:
                continue
            edge = _INK if method == "own_expert" else "none"
            panel.barh(y, row[method], 0.66, color=_METHOD_HUES[method], edgecolor=edge)
            weight = "bold" if method == best_method(row) else "normal"
            _write(panel, row[method] + 0.05 * top, y, format_bits(row[method]), weight=weight)


def _draw_routing(figure: SubFigure, trace: Trace, hues: Mapping[str, str]) -> None:
    panel = figure.subplots()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.68, bottom=0.19)
    _write(figure, 0.01, 0.91, "Router weights, byte by byte", weight="bold", size=11)
    weight_TE = thin_weights(trace.weight_TE)
    total = len(trace.text)
    _clear(panel, (0, total), (1, 0))
    # A step lasts until the next point, so the last one is drawn twice.
    weight_TE = np.append(weight_TE, weight_TE[-1:], axis=0)
    depth_TE = np.cumsum(weight_TE, axis=1)
    x_T = np.linspace(0, total, len(weight_TE))
    for e in np.flatnonzero(weight_TE.any(axis=0)).tolist():
        hue = hues.get(trace.names[e], BACKBONE_HUE)
        depth_T, weight_T = depth_TE[:, e], weight_TE[:, e]
        panel.fill_between(x_T, depth_T - weight_T, depth_T, step="post", color=hue, linewidth=0)
    for name, start, _ in trace.segments:
        panel.plot([start, start], [0, -0.24], color=_INK, linewidth=1, clip_on=False)
        _write(panel, start + 0.005 * total, -0.13, name)
    names = [name for name in hues if name in trace.names]
    for i, name in enumerate(names):
        x = 0.01 + min(0.16, 0.85 / len(names)) * i
        _write(figure, x, 0.1, "■", color=hues[name], size=11)
        _write(figure, x + 0.017, 0.1, name, color=_QUIET)
    _write(figure, 0.99, 0.1, f"{total:,} bytes", ha="right", color=_QUIET)


def _clear(panel: Axes, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    """Set the ranges of a plot and remove its axes and frame."""
    panel.set(xlim=xlim, ylim=ylim, xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def _write(
    place: Axes | SubFigure, x: float, y: float, text: str, size: float = 8.5, **look: Any
) -> None:
    place.text(x, y, text, size=size, va="center", parse_math=False, **look)
