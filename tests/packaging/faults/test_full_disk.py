"""Disks that refuse at some operations; `python -m benchmarks.faults` tries all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.faults import scenarios
from tests.support.faults.full_disk import (
    ERRORS,
    fill_tmpfs,
    limit_file_size,
    may_mount,
    refuse_everywhere,
)
from tests.support.faults.kills import Bench
from tests.support.faults.scenarios import Scenario
from tests.support.faults.worlds import Inputs

COMMANDS = [scenarios.PUBLISH, scenarios.INSTALL, scenarios.YANK, scenarios.PRUNE]


@pytest.mark.parametrize("scenario", COMMANDS, ids=lambda scenario: scenario.name)
def test_a_full_disk(scenario: Scenario, inputs: Inputs, scratch: Path) -> None:
    bench = Bench(scenario, inputs, scratch)
    for is_lasting in (False, True):
        found = refuse_everywhere(bench, "ENOSPC", is_lasting=is_lasting, every=9, offset=4)
        assert found.failures == []


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_other_errors(name: str, inputs: Inputs, scratch: Path) -> None:
    bench = Bench(scenarios.UPGRADE, inputs, scratch)
    found = refuse_everywhere(bench, name, is_lasting=True, every=17, offset=5)
    assert found.failures == []
    assert found.refused > 0


def test_files_that_may_not_grow(inputs: Inputs, scratch: Path) -> None:
    found = limit_file_size(Bench(scenarios.YANK, inputs, scratch))
    assert found.failures == []
    assert found.refused > 0


@pytest.mark.skipif(not may_mount(), reason="file systems may not be mounted here")
def test_a_file_system_that_is_really_full(inputs: Inputs, scratch: Path) -> None:
    found = fill_tmpfs(Bench(scenarios.SYNC, inputs, scratch), every=2)
    assert found.failures == []
    assert found.refused > 0
