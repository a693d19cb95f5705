"""Two processes are stopped, resumed, killed, and resumed as one.

A restore that is broken on purpose is noticed, and a damaged checkpoint passed over.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_SECONDS = 600


def test_two_kills_of_one_run(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.survival", "--quick", "--work", str(tmp_path)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "--json", str(figures)],
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["kills"] == found["all kept"] == 2
    assert found["signal"] == {"SIGTERM": 1, "SIGKILL": 1}
    assert found["another count"] == 1
    # All that is promised was looked at.
    looked_at = {name for name, (kept, of) in found["promises"].items() if kept == of > 0}
    assert looked_at == {
        "ends",
        "exit codes",
        "kept",
        "same bits",
        "newest restored",
        "data order",
        "losses",
        "completes",
        "same end",
    }
    assert found["broken restores noticed"] == {"data": True}
    assert found["damaged checkpoint"] == {
        "completes": True,
        "named": True,
        "the one before": True,
        "same end": True,
    }
