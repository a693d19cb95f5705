"""The benchmark's tables in Markdown and its figure, from the measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.demo_seeds import fill
from benchmarks.generation.continuations import first_later
from benchmarks.generation.texts import PUBLIC, TINY

_METHODS: Final = ("mix", "safe", "evidence", "alone")


def write_page(result: Mapping[str, Any], folder: Path | None) -> str:
    """Return all tables, and fill them into `generation.md` where there is a folder."""
    tables = make_tables(result)
    if folder is not None:
        fill(folder / "generation.md", tables)
        if result["backbone"] == TINY:
            plot_weights(result, folder / "generation.png")
    return "\n".join(tables.values())


def make_tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables by name."""
    parts, domains = result["parts"], result["domains"]
    stamp = (
        f"*`python -m benchmarks.generation`, {result['backbone']}, {result['steps']} steps per "
        f"expert, {result['prompts']} prompts per domain; {result['machine']}; "
        f"{result['date']}.*\n"
    )
    cells = {name: part for name, part in parts.items() if _is_cell(name, part)}
    shares = [
        (name, *_gaps(name, cells), *(_percent(cells[name][d]) for d in domains)) for name in cells
    ]
    shares.append(("real text", "–", "–", *(_percent(parts["real"][d]) for d in domains)))
    prompts = (f"{parts['real'][d]['prompts']:.0%}" for d in domains)
    shares.append(("the prompts themselves", "–", "–", *prompts))
    weights = [
        (name, *(f"{part[d]['weight'][0]:.2f} → {part[d]['weight'][-1]:.2f}" for d in domains))
        for name, part in cells.items()
        if "weight" in part[domains[0]]
    ]
    bits = [
        (name, *(f"{part[d]['bits']:.2f}" for d in domains))
        for name, part in {**cells, "real text": parts["real"]}.items()
    ]
    recognition = [
        (n, *(f"{share:.0%}" for share in row.values()), _recognised(int(n), cells))
        for n, row in parts.get("recognition", {}).items()
    ]
    attacks = [
        (
            *(name, *_taken(part["plain"]), *_taken(part["triggered"])),
            _path(part["triggered"]["weight"]),
            _path(part["given"]["weight"]),
        )
        for name, part in parts.items()
        if "triggered" in part
    ]
    turns = [
        (
            name,
            str(v["turns"]),
            f"{v['median']:.0f}",
            f"{v['ninth_decile']:.0f}",
            f"{v['within_32']:.1%}",
        )
        for name, v in parts.get("turns", {}).items()
    ]
    leads = [
        (n, f"{v['composed']:.1%}", f"{v['alone']:.1%}", f"{v['weight']:.2f}")
        for n, v in parts.get("leads", {}).items()
    ]
    tables = {
        "shares": _table(("written by", "gap", "recognised", *domains), shares) + "\n" + stamp,
        "weights": _table(("written by", *domains), weights),
        "bits": _table(("written by", *domains), bits),
        "recognition": _table(
            ("tokens of prompt", "classifier", "experts alone", "router"), recognition
        ),
        "turns": _table(
            ("before the turn", "turns", "median bytes", "nine in ten", "within 32"), turns
        ),
        "leads": _table(("bytes of lead", "composed", "expert alone", "expert's weight"), leads),
        "attacks": _table(
            (
                *("attack", "no trigger: carries", "held", "trigger: carries", "held"),
                *("weight, written", "weight, given"),
            ),
            attacks,
        ),
    }
    prefix = "" if result["backbone"] == TINY else result["backbone"] + "-"
    return {prefix + name: table for name, table in tables.items()}


def _is_cell(name: str, part: Mapping[str, Any]) -> bool:
    return name.split()[0] in _METHODS and PUBLIC in part


def _later(row: Mapping[str, Any]) -> float:
    return float(np.mean(row["share"][first_later(len(row["share"])) :]))


def _percent(row: Mapping[str, Any]) -> str:
    return f"{_later(row):.0%}"


def _gaps(name: str, cells: Mapping[str, Any]) -> tuple[str, str]:
    """Return the difference to the own expert alone in points: over all prompts, and recognised.

    Each with the standard error over prompts.
    """
    method, rest = name.split(" ", 1)
    reference = cells.get(f"alone {rest}")
    if method == "alone" or reference is None:
        return "–", "–"
    rows = [cells[name][domain] for domain in cells[name]]
    own = np.concatenate([row["later"] for row in rows])
    alone = np.concatenate(
        [reference[d]["later"][: len(cells[name][d]["later"])] for d in cells[name]]
    )
    is_recognised = np.concatenate([row["recognised"] for row in rows])
    gap, known = 100 * (own - alone), 100 * (own - alone)[is_recognised]
    shown = [f"{g.mean():+.1f} ± {g.std() / np.sqrt(len(g)):.1f}" for g in (gap, known)]
    return shown[0], f"{shown[1]} ({is_recognised.mean():.0%})"


def _recognised(n_tokens: int, cells: Mapping[str, Any]) -> str:
    """Return after how many prompts the own expert has most of the weight in mix mode."""
    for name, cell in cells.items():
        if name.startswith("mix") and name.split()[-1].split("+")[0] == str(n_tokens):
            return f"{np.mean([row['recognised'] for row in cell.values()]):.0%}"
    return "–"


def _taken(texts: Mapping[str, Any]) -> tuple[str, str]:
    """Return how many texts carry an attack, and how many it holds."""
    carrying, held = (f"{texts[name]} of {texts['samples']:,}" for name in ("carrying", "held"))
    return carrying, held


def _path(values: Sequence[float]) -> str:
    return " → ".join(f"{value:.2f}" for value in values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Not measured in this run.\n"
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def plot_weights(result: Mapping[str, Any], path: Path) -> None:
    """Draw, at both temperatures, the share of windows in the prompt's domain along the text."""
    parts = result["parts"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    styles = {"alone": ("0.5", "own expert alone"), "mix": ("tab:blue", "composed, mix mode")}
    styles |= {"safe": ("tab:green", "composed, safe mode")}
    styles |= {"evidence": ("tab:red", "written text as evidence (before)")}
    for axis, drawn in zip(axes, ("t0.7 p1", "t1 p1"), strict=True):
        for method, (colour, label) in styles.items():
            part = parts.get(f"{method} {drawn} 64+512")
            if part is None:
                continue
            share_W = np.mean([part[domain]["share"] for domain in part if domain != PUBLIC], 0)
            axis.plot(64 * (1 + np.arange(len(share_W))), share_W, color=colour, label=label)
        real_W = np.mean([row["share"] for name, row in parts["real"].items() if name != PUBLIC], 0)
        axis.plot(64 * (1 + np.arange(len(real_W))), real_W, ":", color="black", label="real text")
        axis.set_title(f"temperature {drawn.split()[0][1:]}", fontsize=10)
        axis.set_xlabel("bytes written")
        axis.set_ylim(0, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("windows in the prompt's domain")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle("Prompts of 64 bytes, four unseen and four other domains", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
