"""Power cuts after some operations of each command; `python -m benchmarks.faults` does all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.faults import scenarios
from tests.support.faults.kills import Bench
from tests.support.faults.power_loss import cut_after_kills, cut_everywhere, omens
from tests.support.faults.scenarios import Scenario
from tests.support.faults.worlds import Inputs


@pytest.mark.parametrize("scenario", scenarios.ALL, ids=lambda scenario: scenario.name)
def test_nothing_acknowledged_is_lost(scenario: Scenario, inputs: Inputs, scratch: Path) -> None:
    bench = Bench(scenario, inputs, scratch)
    for found in (
        cut_everywhere(bench, omens(1), every=11, offset=3),
        cut_after_kills(bench, every=13, offset=2),
    ):
        assert found.failures == []
        assert found.images > 0


def test_a_history(inputs: Inputs, scratch: Path) -> None:
    bench = Bench(scenarios.HISTORY, inputs, scratch)
    found = cut_everywhere(bench, omens(0)[:2], every=40, offset=17)
    assert found.failures == []
    assert found.images > 10
