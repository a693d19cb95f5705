"""Some tricks of a server; `python -m benchmarks.faults` plays all."""

from __future__ import annotations

from pathlib import Path

from tests.support.faults.wire import play_tricks
from tests.support.faults.worlds import Inputs


def test_tricks(inputs: Inputs, scratch: Path) -> None:
    found = play_tricks(inputs, scratch, every=11, offset=7)
    assert found.failures == []
    assert found.survived > 0
    assert found.refused > 0
