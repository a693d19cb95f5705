"""The page of the composition benchmark: tables in Markdown and plots, from its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.composition.plots import plot_methods, plot_questions
from benchmarks.composition.questions import COPY_MODES
from benchmarks.demo_seeds import fill

if TYPE_CHECKING:
    from benchmarks.composition.run import Run


def write_docs(run: Run, result: Mapping[str, Any], folder: Path) -> None:
    """Write tables between the markers of `composition.md`, or of other presets than `cpu` a page
    of their own, and the figures beside it."""
    domains = list(run.preset.domains)
    preset = run.preset
    stamp = (
        f"*`python -m benchmarks.composition --preset {run.name}`, seeds "
        f"{', '.join(map(str, preset.seeds))}; "
        f"{preset.steps} steps per expert, {preset.documents} held-out documents of "
        f"{512 * 2:,} bytes per domain; {result['machine']}; {result['date']}; "
        f"{result['seconds'] / 60:.0f} minutes.*\n"
    )
    texts = {
        "methods": methods_table(result["methods"], domains) + "\n" + stamp,
        "ablations": _table(
            ("change", "mean", "recovery", "public", "spliced"),
            [
                (k, f"{v['mean']:.3f}", f"{v['recovery']:.1%}", *_three(v["public"], v["spliced"]))
                for k, v in result["ablations"].items()
            ],
        ),
        "peers": _table(
            ("added expert", *domains, "public", "spliced", "novel"),
            [
                (k, *(f"{v[g]:+.2%}" for g in (*domains, "public", "spliced", "novel")))
                for k, v in result["peers"].items()
            ],
        ),
        "switching": _table(
            ("mode", "switches", "median bytes", "nine in ten within"),
            [
                (k, str(v["switches"]), f"{v['median']:.0f}", f"{v['ninth_decile']:.0f}")
                for k, v in result["switching"].items()
            ],
        ),
        "hostile": _table(
            (
                *("adversarial expert", "share of public text", "public, mix", "worst domain, mix"),
                *("public, safe", "worst domain, safe"),
            ),
            [
                (k, f"{v['taken']:.4%}", *_percents(v["mix"]), *_percents(v["safe"]))
                for k, v in result["hostile"].items()
            ],
        ),
        "copies": _table(
            (
                *("copies", "their scouts"),
                *(f"{group}, {mode}" for mode in COPY_MODES for group in (domains[0], "public")),
            ),
            [
                (
                    count,
                    kind,
                    *(
                        f"{row[mode][group]:+.2%}"
                        for mode in COPY_MODES
                        for group in (domains[0], "public")
                    ),
                )
                for kind, by_count in result["copies"].items()
                for count, row in by_count.items()
            ],
        ),
        "unequal": _table(
            (f"{domains[0]} had", "own expert", "mix", "recovery", "worst change elsewhere"),
            [
                (
                    *(k, *_three(v["own"], v["mix"])),
                    *(f"{v['recovery']:.1%}", f"{v['worst_other']:+.3%}"),
                )
                for k, v in result["unequal"].items()
            ],
        ),
        "growth": _table(
            (
                *("experts", "domains known", "recovery", "public", "spliced"),
                *("bodies a token", "FLOPs of the backbone's", "router's share"),
                *("tokens/s", "MB"),
            ),
            [
                (
                    *(k, str(v["domains_known"]), f"{v['recovery']:.1%}"),
                    *_three(v["bits"]["public"], v["bits"]["spliced"]),
                    *(f"{v['bodies']:.2f}", f"{v['flops_of_backbone']:.2f}"),
                    f"{v['router_share']:.1%}",
                    *(f"{v['tokens_per_second']:,}", f"{v['megabytes']:,.0f}"),
                )
                for k, v in result["growth"].items()
            ],
        ),
        "generations": _table(
            (
                *("generation", "own expert", "mix", "safe", "dense †"),
                *(f"{text}, {m}" for text in ("public", "spliced") for m in ("mix", "dense †")),
            ),
            [
                (
                    k,
                    *_three(v["own"], *(v[m]["mean"] for m in ("mix", "safe", "dense"))),
                    *_three(
                        *(v[m][text] for text in ("public", "spliced") for m in ("mix", "dense"))
                    ),
                )
                for k, v in result["generations"].items()
            ],
        ),
        "adversarial": _table(
            (
                "inputs",
                "beyond the bound",
                "worst, nats",
                "bound, nats",
                "better than the backbone",
            ),
            [
                (
                    *(f"{v['inputs']:,}", str(v["beyond_bound"]), f"{v['worst_nats']:.5f}"),
                    *(f"{v['bound_nats']:.5f}", f"{v['better_than_backbone']:.1%}"),
                )
                for v in [result["adversarial"]]
                if v
            ],
        ),
    }
    if run.name == "cpu":
        fill(folder / "composition.md", {f"cpu-{name}": text for name, text in texts.items()})
    else:
        page = "".join(f"## {name.capitalize()}\n\n{text}\n" for name, text in texts.items())
        figures = "".join(f"![]({_figure(run, kind)})\n\n" for kind in ("", "_questions"))
        head = f"# The composition benchmark, preset {run.name}\n\n"
        (folder / f"composition_{run.name}.md").write_text(head + figures + page)
    plot_methods(result["methods"], folder / _figure(run, ""))
    plot_questions(result, folder / _figure(run, "_questions"))


def methods_table(summary: Mapping[str, Any], domains: Sequence[str]) -> str:
    """Return the main table in Markdown, best mean last."""
    order = sorted(summary, key=lambda name: -summary[name]["mean"])
    columns = [*domains, "public", "spliced", "novel"]
    head = "| method | mean | recovery (95 %) | " + " | ".join(columns) + " |\n|---|---"
    lines = [head + "|---" * (len(columns) + 1) + "|"]
    for name in order:
        row = summary[name]
        low, high = row["recovery_interval"]
        cells = [*(row["domains"][d] for d in domains), *(row[c] for c in columns[-3:])]
        shown = ["–" if x is None else f"{x:.3f}" for x in cells]
        label = f"**{name}**" if name in ("mix", "safe") else name
        label += "" if row["isolated"] else " †"
        setting = row["setting"].removeprefix(name).strip()
        label += f" ({setting})" if setting else ""
        lines.append(
            f"| {label} | {row['mean']:.3f} | {row['recovery']:.1%} [{low:.1%}, {high:.1%}] | "
            + " | ".join(shown)
            + " |"
        )
    return "\n".join(lines) + "\n"


def _figure(run: Run, kind: str) -> str:
    return f"composition_{run.name}{kind}.png"


def _three(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.3f}" for value in values)


def _percents(row: Mapping[str, float]) -> tuple[str, str]:
    return f"{row['public']:+.4%}", f"{row['worst_domain']:+.4%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Not measured in this run.\n"
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
