"""Servers and publishers that are killed: nothing acknowledged is lost, nothing half is visible."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# In a process without threads, since it forks.
CODE = """
import pathlib, sys
from tests.packaging.conftest import make_interface
from tests.support.killed_registries import kill_in_mid_publish
found = kill_in_mid_publish(pathlib.Path(sys.argv[1]), make_interface(), server=6, client=3)
assert found.acknowledged > 0 and found.lost == found.half_visible == 0, found
assert found.listed >= found.acknowledged, found
"""


def test_nothing_is_lost_and_nothing_half_is_visible(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, timeout=300)
