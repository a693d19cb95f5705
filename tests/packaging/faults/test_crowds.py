"""Small crowds, a few rounds; `python -m benchmarks.faults` lets 32 processes go, 50 times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.faults import crowds
from tests.support.faults.crowds import Crowd, crowd_together
from tests.support.faults.worlds import Inputs


@pytest.mark.parametrize("crowd", crowds.ALL, ids=lambda crowd: crowd.name)
def test_crowd(crowd: Crowd, inputs: Inputs, scratch: Path) -> None:
    found = crowd_together(crowd, inputs, scratch, processes=8, rounds=2)
    assert found.without_locks == 1
    assert found.failures == []
