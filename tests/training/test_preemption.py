"""SIGTERM: the step is finished, a checkpoint written, and the run resumes where it stopped.

Two processes are stopped in `test_survival.py`.
"""

import os
import signal

import numpy as np
import pytest

from composable.errors import PreemptedError
from composable.training.loop import fit
from tests.training.line_program import CFG, objective, parts

pytestmark = pytest.mark.slow

STOPPED = 75


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
