"""What tests of faults share: a folder in memory, and inputs that commands are warmed up on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults.scenarios import warm_up
from tests.support.faults.tracer import is_supported
from tests.support.faults.worlds import Inputs

TRACED = ("test_tracer", "test_kills", "test_power_loss", "test_full_disk", "test_mutations")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all as slow. Skip what needs ptrace where there is none; on CI, run it and fail."""
    is_run = is_supported() or os.environ.get("CI")
    for item in items:
        if item.path.parent.name != "faults":
            continue
        item.add_marker(pytest.mark.slow)
        if item.path.stem in TRACED and not is_run:
            item.add_marker(pytest.mark.skip(reason="needs ptrace and seccomp: Linux on x86_64"))


@pytest.fixture(scope="session")
def inputs() -> Iterator[Inputs]:
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=home))
    made = Inputs(root / "inputs")
    warm_up(root / "warm", made)
    yield made
    shutil.rmtree(root)


@pytest.fixture
def scratch(inputs: Inputs) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir=inputs.root.parent))
    yield path
    shutil.rmtree(path)
