"""The Ray driver on a local Ray with two workers: a process killed, and a failure of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile

import numpy as np
import pytest

from tests.launch.conftest import LAUNCH, TIMEOUT_SECONDS

pytestmark = pytest.mark.slow


def launch(tools, work, home):
    """Start the driver; its output goes to the log."""
    env = {
        **work.env,
        "PATH": f"{work.env['PATH']}{os.pathsep}{tools.parent}",
        "RAY_TMPDIR": home,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }
    del env["PYTHONPATH"]  # the packages of two environments do not mix
    command = [tools, LAUNCH / "ray_driver.py", "--workers", "2", "--work", work.folder]
    with work.log.open("ab") as log:
        return subprocess.Popen([*command, *work.options], env=env, stdout=log, stderr=log)


@pytest.fixture
def home():
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield folder


def test_a_killed_rank_is_started_again_and_training_ends_as_if_it_was_not(
    tools, work, home, straight
):
    driver = launch(tools, work, home)
    work.wait_for_checkpoint()
    killed = work.wait_for_process(1)
    other = work.find_process(0)
    os.kill(killed, signal.SIGKILL)
    assert driver.wait(TIMEOUT_SECONDS) == 0, work.said
    # The killed one's, or that of the other, which ends because of it.
    assert re.search(r"exit code (-9|76): starting again", work.log.read_text())
    assert work.find_process(0) != other
    for name, array in work.weights().items():
        np.testing.assert_array_equal(array, straight[name])


def test_a_run_that_was_asked_to_stop_is_started_again(tools, work, home, straight):
    driver = launch(tools, work, home)
    work.wait_for_start()
    os.kill(work.wait_for_process(1), signal.SIGTERM)
    assert driver.wait(TIMEOUT_SECONDS) == 0, work.said
    assert "exit code 75: starting again" in work.log.read_text()
    for name, array in work.weights().items():
        np.testing.assert_array_equal(array, straight[name])


def test_a_failure_of_its_own_ends_the_driver(tools, work, home):
    (work.folder / "expert" / "expert.toml").write_text("[expert]\n")
    driver = launch(tools, work, home)
    assert driver.wait(TIMEOUT_SECONDS) == 1, work.said
    assert "starting again" not in work.log.read_text()
