"""Four contributors, four disjoint parts of one domain, one base: what does merging cost?

    python -m benchmarks.merging --json FILE --docs docs/results
    python -m benchmarks.merging --setting smollm2-135m --backbone FOLDER --seeds 0 --json FILE

The merged expert beside the best single one, all four installed, and one trained on all parts with
as many steps; every method; how well the statistics' choice agrees with the text's; which merges
are written, grouped or refused, and whether that holds on other text; and rounds of merging from a
moving base. What FILE has already is not measured again, and trainings in the
working folder are not repeated, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import time
from itertools import product
from pathlib import Path
from typing import Any, Final

import jax

from benchmarks.merging.community import SETTINGS
from benchmarks.merging.page import write_docs
from benchmarks.merging.run import measure_decisions, measure_one_merge, measure_rounds
from composable.assembly.backbones import load_backbone
from composable.files import atomic

# By the key in the file of results that each of them adds, with others.
MEASUREMENTS: Final = {
    "rows": measure_one_merge,
    "decisions": measure_decisions,
    "rounds": measure_rounds,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="tiny-bytes")
    parser.add_argument("--backbone", default="tiny-bytes", help="its folder, if it was imported")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/merging"))
    parser.add_argument("--json", type=Path, help="file of results, which is added to")
    parser.add_argument("--docs", type=Path, help="folder whose merging.md is filled in")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())
    setting = SETTINGS[arguments.setting]
    plain = dataclasses.asdict(setting)
    known = results.setdefault(arguments.setting, {"setting": plain, "seeds": {}})
    if known["setting"] != plain:
        parser.error(f"{arguments.json} has {arguments.setting} with another setting: remove it")
    loaded = load_backbone(arguments.backbone)
    start = time.perf_counter()
    for seed, (key, measure) in product(arguments.seeds, MEASUREMENTS.items()):
        found = known["seeds"].setdefault(str(seed), {})
        if key in found or (key == "rounds" and not setting.rounds):
            continue

        def log(line: str, seed: int = seed) -> None:
            print(f"{time.perf_counter() - start:6.0f} s  seed {seed}: {line}", flush=True)

        work = arguments.work / arguments.setting / str(seed)
        found |= measure(loaded, setting, seed, work, log)
        known |= {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, virtual machine, "
            f"{jax.devices()[0].platform}, jax {jax.__version__}, "
            f"Python {platform.python_version()}",
            "date": datetime.date.today().isoformat(),
        }
        if arguments.json:
            text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
            atomic.write_text(arguments.json, text)
    print(json.dumps(known, indent=1))
    if arguments.docs:
        write_docs(results, arguments.docs)


if __name__ == "__main__":
    main()
