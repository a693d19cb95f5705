"""Results of the demo: what is written, and that earlier results are still read."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from composable.demo.measure import PUBLIC, SPLICED, bound_figures, list_claims, mean_recovery
from composable.demo.result import DemoResult, Property, write_result
from composable.files.records import parse_record
from composable.vetting.evaluation import Score

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


def scores_of(bits: dict[str, list[float]]) -> dict[str, Score]:
    """Return scores of documents of 100 bytes with these bits per byte, by method."""
    return {
        method: Score(100 * np.log(2) * np.array(values), np.full(len(values), 100))
        for method, values in bits.items()
    }


def test_a_claim_needs_the_whole_interval_of_its_figure() -> None:
    result = parse_record(DemoResult, json.dumps(RUNS[0]), "demo_seeds.json")
    alike = {"backbone": [4.0] * 8, "average": [3.0] * 8, "mix": [2.0] * 8, "safe": [2.0] * 8}
    domain = scores_of({**alike, "own_expert": [2.0] * 8})
    public = scores_of({method: [1.0] * 8 for method in alike})
    scores = {"legal": domain, PUBLIC: public, SPLICED: scores_of(alike)}
    assert bound_figures(scores, ["legal"]) == ((1, 1), (1, 1), (0, 0), (0, 0), (0.66667, 0.66667))

    # One document in eight loses 7 %: within 1 % of the text on average, but not surely.
    scores[PUBLIC] = scores_of({**dict.fromkeys(alike, [1.0] * 8), "mix": [1.0] * 7 + [1.07]})
    interval = bound_figures(scores, ["legal"])[2]
    assert interval[0] == 0 < 0.07 / 8 < 0.01 < interval[1]
    measured = dataclasses.replace(result, intervals=bound_figures(scores, ["legal"]))
    failed = [claim for claim in list_claims(measured, ()) if not claim.holds]
    assert [claim.claim for claim in failed] == ["public text loses at most 1 % in mix mode"]
    assert failed[0].interval == interval


@pytest.mark.parametrize("name", ["page.html", "trace.html", "page.css"])
def test_the_page_is_packaged(name: str) -> None:
    assert resources.files("composable.demo").joinpath(name).is_file()
