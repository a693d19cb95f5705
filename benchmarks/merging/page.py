"""The tables and plots of `docs/results/merging.md`, from the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.demo_seeds import fill

# What becomes of a merge, in the order of the table.
_DECISIONS: Final = ("merged", "grouped", "refused")


def write_docs(results: Mapping[str, Any], folder: Path) -> None:
    """Fill in the page, and write a plot of every setting beside it."""
    texts = {}
    for name, result in results.items():
        if name == "smoke":
            continue
        image = f"merging_{name.replace('-', '_')}.png"
        texts[name] = (
            f"![Bits per byte of every way, and over rounds]({image})\n\n"
            + _methods_table(result)
            + _decisions_table(result)
            + _agreement_table(result)
            + _rounds_table(result)
        )
        _plot(result, folder / image, name)
    fill(folder / "merging.md", texts)


def _seeds(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(result["seeds"].values())


def _means(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the mean bits per byte over parts of every row, by seed."""
    found: dict[str, list[float]] = {}
    for seed in _seeds(result):
        for name, row in seed["rows"].items():
            found.setdefault(name, []).append(float(np.mean(list(row.values()))))
    return found


def _methods_table(result: Mapping[str, Any]) -> str:
    means = _means(result)
    n = len(_seeds(result))
    lines = [
        f"| bits per byte, mean of four parts, {n} seed{'s' * (n > 1)} | mean | range |",
        "|---|---|---|",
    ]
    for name, values in sorted(means.items(), key=lambda item: float(np.mean(item[1]))):
        lines.append(f"| {name} | {np.mean(values):.3f} | {min(values):.3f}–{max(values):.3f} |")
    return "\n".join(lines) + "\n"


def _decisions_table(result: Mapping[str, Any]) -> str:
    """Return what was decided, by number of sides; and how it holds on other text."""
    rows = [row for seed in _seeds(result) for row in seed.get("decisions", [])]
    if not rows:
        return ""
    lines = [
        "\n| merges of | written | grouped | refused | merged alone: not worse, undecided, worse "
        "| what was kept, on other text: not worse, undecided, worse |",
        "|---|---|---|---|---|---|",
    ]
    for n in sorted({len(row["sides"]) for row in rows}):
        own = [row for row in rows if len(row["sides"]) == n]
        counts = [sum(row["outcome"] == what for row in own) for what in _DECISIONS]
        kept = [row for row in own if row["outcome"] != "refused"]
        lines.append(
            f"| {n} | {' | '.join(map(str, counts))} | {_count_outcomes(own, 'merged')} "
            f"| {_count_outcomes(kept, 'unseen')} |"
        )
    return "\n".join(lines) + "\n\nThe last two columns count pairs of text and side.\n"


def _count_outcomes(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    found = Counter(judgement["outcome"] for row in rows for judgement in row[key])
    return ", ".join(str(found[outcome]) for outcome in ("not worse", "undecided", "worse"))


def _agreement_table(result: Mapping[str, Any]) -> str:
    lines = [
        "\n| choice by statistics | rank correlation with text | best by text | its choice, on text"
        " | as it predicted | median candidate |",
        "|---|---|---|---|---|---|",
    ]
    for number, seed in result["seeds"].items():
        for part, row in seed["agreement"].items():
            lines.append(
                f"| {part}, seed {number} | {row['rank_correlation']:.2f} | {row['best']:+.1%} "
                f"| {row['of_statistics_choice']:+.1%} | {row['predicted']:+.1%} "
                f"| {row['median']:+.1%} |"
            )
    sizes = _seeds(result)[0]["bytes"]
    share = sizes["statistics"] / sizes["expert"]
    return "\n".join(lines) + (
        f"\n\nChange of the loss on the part where it is largest. Statistics take "
        f"{sizes['statistics'] / 1e3:.0f} kB, {share:.1%} of an expert's tensors.\n"
    )


def _rounds_table(result: Mapping[str, Any]) -> str:
    seeds = [seed for seed in _seeds(result) if "rounds" in seed]
    stamp = f"\n*{result['machine']}; {result['date']}.*\n"
    if not seeds:
        return stamp
    n_rounds = len(seeds[0]["rounds"])
    lines = [
        "\n| round | bits per byte | range | refused |",
        "|---|---|---|---|",
    ]
    for number in range(n_rounds):
        bits = [float(np.mean(list(s["rounds"][number]["bits"].values()))) for s in seeds]
        refused = sum(s["rounds"][number]["refused"] for s in seeds)
        lines.append(
            f"| {number} | {np.mean(bits):.3f} | {min(bits):.3f}–{max(bits):.3f} "
            f"| {refused} of {len(seeds)} |"
        )
    alone = [float(np.mean(list(s["alone"].values()))) for s in seeds]
    lines.append(
        f"| one alone, {n_rounds - 1} rounds | {np.mean(alone):.3f} "
        f"| {min(alone):.3f}–{max(alone):.3f} | |"
    )
    return "\n".join(lines) + "\n" + stamp


def _plot(result: Mapping[str, Any], path: Path, name: str) -> None:
    """Draw every row, and bits per byte over rounds."""
    means = _means(result)
    order = sorted(means, key=lambda row: -float(np.mean(means[row])))
    has_rounds = any("rounds" in seed for seed in _seeds(result))
    figure, axes = plt.subplots(
        1, 1 + has_rounds, figsize=(6.5 * (1 + has_rounds), 0.3 * len(order) + 1.5), squeeze=False
    )
    axis = axes[0][0]
    for place, row in enumerate(order):
        colour = "tab:blue" if row.startswith("merged") else "0.5"
        axis.plot(means[row], [place] * len(means[row]), "o", color=colour, alpha=0.5, ms=5)
        axis.plot(np.mean(means[row]), place, "|", color=colour, ms=14, mew=2)
    axis.set_yticks(range(len(order)), order)
    axis.set_xlabel("bits per byte, mean of four parts (points: seeds)")
    axis.set_title(name, fontsize=10)
    if has_rounds:
        _draw_rounds(axes[0][1], [seed for seed in _seeds(result) if "rounds" in seed])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_rounds(axis: Any, seeds: list[Mapping[str, Any]]) -> None:
    for seed in seeds:
        bits = [float(np.mean(list(row["bits"].values()))) for row in seed["rounds"]]
        axis.plot(range(len(bits)), bits, "o-", color="tab:blue", alpha=0.6)
        last = len(bits) - 1
        alone = float(np.mean(list(seed["alone"].values())))
        axis.plot(last, alone, "x", color="tab:red")
        every = float(np.mean(list(seed["rows"]["trained on all parts"].values())))
        axis.plot(1, every, "s", color="0.5", ms=5)
    axis.plot([], [], "o-", color="tab:blue", label="merged after each round")
    axis.plot([], [], "s", color="0.5", label="trained on all parts, the steps of one round")
    axis.plot([], [], "x", color="tab:red", label="one contributor alone")
    axis.set_xlabel("round")
    axis.set_ylabel("bits per byte, mean of four parts")
    axis.legend(frameon=False, fontsize=8)
