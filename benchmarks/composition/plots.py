"""Plots of the composition benchmark, from its figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def plot_methods(summary: Mapping[str, Any], path: Path) -> None:
    """Draw mean and public bits per byte of every method: near the lower left corner is good."""
    order = sorted(summary, key=lambda name: summary[name]["mean"])
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.32 * len(order) + 1.6), sharey=True)
    places = np.arange(len(order))[::-1]
    for axis, column in zip(axes, ("mean", "public", "spliced"), strict=True):
        values = [summary[name][column] for name in order]
        colours = [
            "tab:blue" if n in ("mix", "safe") else "0.75" if summary[n]["isolated"] else "tab:pink"
            for n in order
        ]
        bars = [np.nan if v is None else v for v in values]
        axis.barh(places, bars, color=colours)
        for place, value in zip(places, values, strict=True):
            if value is not None:
                axis.text(value, place, f" {value:.3f}", va="center", fontsize=8)
        top = np.nanmax(bars)
        axis.set_xlim(0, 1.15 * top)
        axis.set_title({"mean": "own domains"}.get(column, f"{column} text"), fontsize=10)
        axis.set_xlabel("bits per byte")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(places, order)
    figure.text(0.99, 0.01, "blue: ours   pink: trained on all text", ha="right", fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_questions(result: Mapping[str, Any], path: Path) -> None:
    """Draw the questions that were answered, a panel each."""
    panels = {
        "peers": _draw_peers,
        "growth": _draw_growth,
        "switching": _draw_switching,
        "hostile": _draw_hostile,
        "unequal": _draw_unequal,
        "generations": _draw_generations,
        "ablations": _draw_ablations,
    }
    drawn = {name: draw for name, draw in panels.items() if result[name]}
    figure, axes = plt.subplots(-(-len(drawn) // 2), 2, figsize=(13, 4.6 * -(-len(drawn) // 2)))
    for axis, (name, draw) in zip(axes.flat, drawn.items(), strict=False):
        draw(axis, result[name])
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(drawn) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_peers(axis: Any, found: Mapping[str, Any]) -> None:
    names, columns = list(found), list(next(iter(found.values())))
    change = 100 * np.array([[found[n][c] for c in columns] for n in names])
    axis.imshow(np.clip(change, -2, 2), cmap="RdYlGn_r", vmin=-2, vmax=2, aspect="auto")
    for (i, j), value in np.ndenumerate(change):
        axis.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("added expert")
    axis.set_title("change when one expert is added, per cent of bits (mix)", fontsize=10)


def _draw_growth(axis: Any, found: Mapping[str, Any]) -> None:
    sizes = [int(size) for size in found]
    recovery = [100 * v["recovery"] for v in found.values()]
    axis.plot(sizes, recovery, "o-", label="recovery")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, map(str, sizes))
    axis.set_xlabel("experts installed")
    axis.set_ylabel("recovery, per cent")
    axis.set_ylim(min(90, *recovery), max(105, *recovery) + 1)
    axis.set_title("growth", fontsize=10)
    twin = axis.twinx()
    cost = [v["flops_of_backbone"] for v in found.values()]
    twin.plot(sizes, cost, "s--", color="0.5")
    twin.set_ylabel("FLOPs per token, of the backbone's (dashed)")
    twin.set_ylim(0, 1.3 * max(cost))


def _draw_switching(axis: Any, found: Mapping[str, Any]) -> None:
    for mode, row in found.items():
        waits = np.array(row["waits"])
        axis.step(waits, np.arange(1, len(waits) + 1) / len(waits), where="post", label=mode)
    axis.set_xlabel("bytes after a switch")
    axis.set_ylabel("share of switches")
    axis.set_title("the right expert has half of the weight", fontsize=10)
    axis.legend(fontsize=8)


def _draw_hostile(axis: Any, found: Mapping[str, Any]) -> None:
    places = np.arange(len(found))
    for offset, mode, colour in ((-0.2, "mix", "tab:blue"), (0.2, "safe", "tab:green")):
        worst = [
            100 * max(row[mode]["public"], row[mode]["worst_domain"]) for row in found.values()
        ]
        axis.barh(places + offset, worst, 0.38, color=colour, label=mode)
    axis.axvline(0.5, color="tab:red", linewidth=0.8)
    axis.set_yticks(places, list(found), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("worst change of any text, per cent of bits (red: 0.5)")
    axis.set_title("adversarial and broken experts", fontsize=10)
    axis.legend(fontsize=8)


def _draw_unequal(axis: Any, found: Mapping[str, Any]) -> None:
    places = np.arange(len(found))
    for offset, column, colour in ((-0.2, "own", "0.6"), (0.2, "mix", "tab:blue")):
        values = [row[column] for row in found.values()]
        label = {"own": "own expert, domain known", "mix": "mix"}[column]
        axis.barh(places + offset, values, 0.38, color=colour, label=label)
    axis.set_yticks(places, list(found), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("bits per byte of its domain")
    axis.set_xlim(0, 1.9 * max(row["own"] for row in found.values()))
    axis.set_title("unequal contributors", fontsize=10)
    axis.legend(fontsize=8, loc="center right")


def _draw_generations(axis: Any, found: Mapping[str, Any]) -> None:
    names, places = list(found), np.arange(len(found))
    styles = {"mix": ("tab:blue", "o-"), "safe": ("tab:green", "o-"), "dense": ("tab:pink", "s-")}
    for method, (colour, style) in styles.items():
        axis.plot(places, [found[n][method]["mean"] for n in names], style, c=colour, label=method)
    axis.plot(places, [found[n]["own"] for n in names], "--", color="0.5", label="own experts")
    axis.set_xticks(places, names)
    axis.set_ylabel("bits per byte of all domains")
    axis.set_title("second generation", fontsize=10)
    axis.legend(fontsize=8)


def _draw_ablations(axis: Any, found: Mapping[str, Any]) -> None:
    places = np.arange(len(found))
    axis.plot([100 * row["recovery"] for row in found.values()], places, "o", color="tab:blue")
    axis.set_yticks(places, list(found), fontsize=7)
    axis.invert_yaxis()
    axis.grid(axis="x", linewidth=0.3)
    axis.set_xlabel("recovery, per cent")
    axis.set_title("router ablations: one change at a time", fontsize=10)
