"""A few flipped bits in each kind of file; `python -m benchmarks.faults` flips 10,000."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.faults import flips
from tests.support.faults.flips import Target, flip_everywhere
from tests.support.faults.worlds import Inputs


@pytest.mark.parametrize("target", flips.ALL, ids=lambda target: target.name)
def test_flipped_bits_are_noticed(target: Target, inputs: Inputs, scratch: Path) -> None:
    count = 4 if target is flips.PARTIAL else 25
    found = flip_everywhere(target, inputs, scratch, flips=count)
    assert found.failures == []
    assert found.flips == count
