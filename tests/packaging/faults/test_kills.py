"""SIGKILL at some operations of each command; `python -m benchmarks.faults` does all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.faults import scenarios
from tests.support.faults.kills import Bench, crash_for_days, kill_everywhere
from tests.support.faults.scenarios import Scenario
from tests.support.faults.worlds import Inputs


@pytest.mark.parametrize("scenario", scenarios.ALL, ids=lambda scenario: scenario.name)
def test_killed_the_next_command_works(scenario: Scenario, inputs: Inputs, scratch: Path) -> None:
    found = kill_everywhere(Bench(scenario, inputs, scratch), every=9, offset=4, twice=3)
    assert found.failures == []
    assert found.points > 0


@pytest.mark.parametrize("scenario", [scenarios.YANK, scenarios.ROLLBACK], ids=lambda s: s.name)
def test_what_crashes_leave_is_swept(scenario: Scenario, inputs: Inputs, scratch: Path) -> None:
    once, twice = crash_for_days(Bench(scenario, inputs, scratch))
    assert len(twice) <= len(once)
