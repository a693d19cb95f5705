"""The pages that are made of compiled plans show what was compiled."""

import json
from pathlib import Path

from benchmarks.plans import guide_text, tables

ROOT = Path(__file__).parents[1]
CASES = json.loads((ROOT / "benchmarks" / "results" / "plans.json").read_text())["cases"]


def test_the_results_have_the_plans_that_were_compiled():
    page = (ROOT / "docs" / "results" / "pods.md").read_text()
    for name, table in tables(CASES).items():
        assert f"<!-- {name}:begin -->\n{table}<!-- {name}:end -->" in page, name


def test_the_guide_shows_what_the_command_prints():
    page = (ROOT / "docs" / "guides" / "pods.md").read_text()
    assert f"<!-- plan:begin -->\n{guide_text(CASES)}<!-- plan:end -->" in page
