"""Do the demo's claims hold for other seeds? Runs it for several; tabulates figures and cost.

    python -m benchmarks.demo_seeds --json benchmarks/results/demo_seeds.json \
        --docs docs/results/demo.md README.md

Fills documents between their markers: `figures` gets all tables, `table` that of the first seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from composable.demo.report import METHODS, text_rows
from composable.demo.result import DemoResult
from composable.demo.run import STEPS, run_demo


def summarise(results: list[DemoResult]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds of every bits-per-byte figure and recovery."""

    def spread(values: list[float]) -> dict[str, float]:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": round(statistics.mean(values), 5), "sd": round(deviation, 5)}

    rows = [dict(text_rows(result)) for result in results]
    return {
        "text": {
            name: {method: spread([row[name][method] for row in rows]) for method in first_row}
            for name, first_row in rows[0].items()
        },
        "recovery": {
            mode: spread([getattr(result.recovery, mode) for result in results])
            for mode in ("mix", "safe")
        },
        "seconds": spread([sum(result.seconds.values()) for result in results]),
    }


def tables(summary: dict[str, Any], results: list[DemoResult]) -> dict[str, str]:
    """Return Markdown by marker."""
    first = results[0]
    first_seconds = sum(first.seconds.values())
    head = (
        "| bits per byte | backbone | own expert | average of experts | **mix** | **safe** |\n"
        "|---|---|---|---|---|---|\n"
    )

    def cell(row: dict[str, Any], method: str) -> str:
        value = row.get(method)
        if isinstance(value, dict):
            return f"{value['mean']:.3f} ± {value['sd']:.3f}"
        return "–" if value is None else f"{value:.3f}"

    def line(name: str, row: dict[str, Any]) -> str:
        return f"| {name} | " + " | ".join(cell(row, method) for method in METHODS) + " |\n"

    names = {"public": "public text"}
    table = head + "".join(line(names.get(name, name), row) for name, row in text_rows(first))
    table += f"| *recovery* | 0 % | 100 % | | **{first.recovery.mix:.1%}** | "
    table += f"**{first.recovery.safe:.1%}** |\n"
    table += f"\n*{first.machine}; {first.date}; {first_seconds:.0f} s, "
    table += f"{first.peak_rss_bytes / 1e9:.1f} GB.*\n"

    seeds = ", ".join(str(result.seed) for result in results)
    figures = f"### One run (seed {first.seed})\n\n{table}\n"
    figures += "| step | seconds | peak memory until then, GB |\n|---|---|---|\n"
    figures += "".join(
        f"| {step} | {value:.1f} | {first.step_rss_bytes[step] / 1e9:.2f} |\n"
        for step, value in first.seconds.items()
    )
    figures += f"| **all** | **{first_seconds:.1f}** | **{first.peak_rss_bytes / 1e9:.2f}** |\n\n"
    figures += "".join(
        f"- {'holds' if claim.holds else '**does not hold**'}: {claim.claim} "
        f"({claim.describe_found()})\n"
        for claim in first.claims
    )
    figures += f"\n### Seeds {seeds}: mean ± standard deviation\n\n{head}"
    figures += "".join(line(name, row) for name, row in summary["text"].items())
    figures += "| *recovery* | 0 % | 100 % | | " + " | ".join(
        f"{summary['recovery'][mode]['mean']:.2%} ± {summary['recovery'][mode]['sd']:.2%}"
        for mode in ("mix", "safe")
    )
    figures += f" |\n\nOne run took {cell(summary, 'seconds')} s.\n"
    return {"table": table, "figures": figures}


def fill(path: Path, texts: dict[str, str]) -> None:
    """Replace the text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in a document."""
    document = path.read_text()
    for name, text in texts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in document:
            before, rest = document.split(begin, 1)
            document = f"{before}{begin}\n{text}{end}{rest.split(end, 1)[1]}"
    path.write_text(document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, nargs="*", default=[])
    parser.add_argument("--figure", type=Path, help="where to keep the first seed's figure")
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            demo = Path(folder) / "demo"
            results.append(run_demo(demo, seed=seed, steps=arguments.steps))
            if arguments.figure and len(results) == 1:
                shutil.copy(demo / "figure.png", arguments.figure)
    summary = summarise(results)
    for name, methods in summary["text"].items():
        cells = "  ".join(f"{m} {v['mean']:.3f}±{v['sd']:.3f}" for m, v in methods.items())
        print(f"{name:12} {cells}")
    for mode, value in summary["recovery"].items():
        print(f"recovery {mode}: {value['mean']:.2%} ± {value['sd']:.2%}")
    for path in arguments.docs:
        fill(path, tables(summary, results))
    if arguments.json:
        data = {"summary": summary, "runs": [result.to_json() for result in results]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
