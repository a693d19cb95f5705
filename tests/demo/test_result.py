"""Results of the demo: what is written, and that earlier results are still read."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from composable.demo.measure import list_claims, mean_recovery
from composable.demo.result import DemoResult, Property, write_result
from composable.files.records import parse_record

RUNS = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "demo_seeds.json").read_text()
)["runs"]


@pytest.mark.parametrize("run", RUNS, ids=[f"seed {run['seed']}" for run in RUNS])
def test_a_result_is_written_as_it_was_read(run: dict, tmp_path: Path) -> None:
    result = parse_record(DemoResult, json.dumps(run), "demo_seeds.json")
    write_result(tmp_path / "new" / "result.json", result)
    again = json.loads((tmp_path / "new" / "result.json").read_text())
    assert again == run
    assert list(again) == list(run)
    assert list(again["experts"]["legal"]) == list(run["experts"]["legal"])


def test_a_figure_that_is_not_finite_stays_null() -> None:
    run = json.loads(json.dumps(RUNS[0]))
    run["experts"]["legal"]["measured"]["gain"] = None
    result = parse_record(DemoResult, json.dumps(run), "demo_seeds.json")
    assert json.loads(json.dumps(result.to_json())) == run


@pytest.mark.parametrize("run", RUNS, ids=[f"seed {run['seed']}" for run in RUNS])
def test_recovery_and_claims_follow_from_the_figures(run: dict) -> None:
    result = parse_record(DemoResult, json.dumps(run), "demo_seeds.json")
    assert mean_recovery(list(result.domains.values())) == result.recovery
    claims = list_claims(result, result.properties)
    assert [(claim.found, claim.holds) for claim in claims] == [
        (claim.found, claim.holds) for claim in result.claims
    ]


def test_a_claim_can_fail() -> None:
    result = parse_record(DemoResult, json.dumps(RUNS[0]), "demo_seeds.json")
    failed = Property(name="remove", passed=False, found="logits differ")
    claims = list_claims(result, [failed])
    assert [claim.claim for claim in claims if not claim.holds] == ["remove"]


@pytest.mark.parametrize("name", ["page.html", "trace.html", "page.css"])
def test_the_page_is_packaged(name: str) -> None:
    assert resources.files("composable.demo").joinpath(name).is_file()
