"""Does the demo hold for other seeds? Runs it for several and tabulates recovery and cost.

python -m benchmarks.demo_seeds --json docs/demo_seeds.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from composable.demo.run import STEPS, run_demo


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds of every bits-per-byte figure and recovery."""

    def spread(values: list[float]) -> dict[str, float]:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": round(statistics.mean(values), 5), "sd": round(deviation, 5)}

    rows = [*results[0]["domains"], "public", "spliced"]

    def row(result: dict[str, Any], name: str) -> dict[str, float]:
        return result["domains"].get(name) or result[name]

    return {
        "text": {
            name: {
                method: spread([row(result, name)[method] for result in results])
                for method in row(results[0], name)
            }
            for name in rows
        },
        "recovery": {
            mode: spread([result["recovery"][mode] for result in results])
            for mode in ("mix", "safe")
        },
        "seconds": spread([sum(result["seconds"].values()) for result in results]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results.append(run_demo(Path(folder) / "demo", seed=seed, steps=arguments.steps))
    summary = summarise(results)
    for name, methods in summary["text"].items():
        cells = "  ".join(f"{m} {v['mean']:.3f}±{v['sd']:.3f}" for m, v in methods.items())
        print(f"{name:12} {cells}")
    for mode, value in summary["recovery"].items():
        print(f"recovery {mode}: {value['mean']:.2%} ± {value['sd']:.2%}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
