"""SIGTERM: the step is finished, a checkpoint written, and the run resumes where it stopped."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from composable.errors import PreemptedError
from composable.training.loop import fit
from tests.training.group_program import fit_line
from tests.training.line_program import CFG, objective, parts

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("group_program.py")
STOPPED = 75
TIMEOUT_SECONDS = 300
# Rows are summed on two devices instead of on one.
SAME_WEIGHTS = 1e-5


def run(folder, n_processes, stop_at=None):
    """Run the program in a group; return exit codes and what each process printed."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PROGRAM.parents[2])}
    for seen in folder.glob("seen-*"):
        seen.unlink()
    started = []
    try:
        for index in range(n_processes):
            group = [address, str(n_processes), str(index)]
            command = [sys.executable, str(PROGRAM), str(folder), *group]
            started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        if stop_at is not None:
            wait_for_step(folder / "seen-1", stop_at)
            started[-1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    codes = [process.returncode for process in started]
    return codes, [json.loads(text.splitlines()[-1]) if text else None for text in said]


def wait_for_step(file, step):
    """Wait until a process has done a step."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (file.exists() and (text := file.read_text()) and int(text) >= step):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_process_stops_after_the_step_and_resumes_to_the_bit(tmp_path):
    whole = fit(objective, *parts(), CFG, directory=tmp_path / "whole")

    def stop_after(step):
        def progress(done, steps, figures):
            if done == step:
                os.kill(os.getpid(), signal.SIGTERM)

        return progress

    for step in (1, 3):  # twice: the second stop is of a run that was resumed
        with pytest.raises(PreemptedError, match=f"after step {step + 1} of 6") as caught:
            fit(objective, *parts(), CFG, directory=tmp_path / "cut", progress=stop_after(step))
        assert caught.value.exit_code == STOPPED
        assert f"resume from step {step + 1}" in caught.value.hint
    seen = []
    resumed = fit(
        objective,
        *parts(),
        CFG,
        directory=tmp_path / "cut",
        progress=lambda step, *_: seen.append(step),
    )
    assert seen == [5, 6]
    for name, array in whole.trained.items():
        np.testing.assert_array_equal(resumed.trained[name], array)


def test_without_checkpoints_it_stops_as_well():
    def progress(step, steps, figures):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError):
        fit(objective, *parts(), CFG, progress=progress)


def test_afterwards_the_signal_does_what_it_did_before():
    before = signal.getsignal(signal.SIGTERM)
    fit(objective, *parts(), CFG)
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_processes_stop_together_and_one_or_two_resume(tmp_path):
    """A signal to one of them stops both after the same step."""
    codes, said = run(tmp_path / "a", 2, stop_at=3)
    assert codes == [STOPPED, STOPPED], said
    assert said[0]["last"] == said[1]["last"] < 30
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    codes, resumed = run(tmp_path / "a", 2)
    assert codes == [0, 0], resumed
    assert [one["first"] for one in resumed] == [said[0]["last"] + 1] * 2, "no step is done twice"
    assert resumed[0]["weights"] == resumed[1]["weights"]
    straight, alone = fit_line(None), fit_line(tmp_path / "b")
    for weights in (resumed[0]["weights"], alone):
        for name, array in straight.items():
            np.testing.assert_allclose(weights[name], array, atol=SAME_WEIGHTS)
