"""Fit a small linear map; as a program, be killed in the middle of it.

    python line_program.py DIRECTORY STEP

trains with checkpoints in DIRECTORY and dies by SIGKILL at STEP, once a checkpoint is on disk.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from composable.training.config import TrainConfig
from composable.training.data import batches
from composable.training.loop import fit

CFG = TrainConfig(
    steps=6,
    batch_size=4,
    window=7,
    learning_rate=1e-2,
    checkpoint_every=3,
    log_every=1,
)


def objective(trained, frozen, tokens_BT):
    """Predict a fixed linear image of the tokens; `frozen` holds it, and an integer."""
    x_BT = tokens_BT / 100 + frozen["shift"]
    error_BT = x_BT @ trained["w"] + trained["b"] - x_BT @ frozen["target"]
    return jnp.square(error_BT).mean(), {"largest": jnp.abs(error_BT).max()}


def parts():
    """Return fresh (trained, frozen, data)."""
    rng = np.random.default_rng(0)
    trained = {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)}
    frozen = {"target": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32), "shift": jnp.int32(1)}
    data = batches(rng.integers(0, 100, 500), window=7, batch_size=4, seed=0)
    return trained, frozen, data


def wait_for_checkpoint(directory, step):
    """Wait until a checkpoint is whole: the folder gets its name when it is."""
    path = Path(directory) / "checkpoints" / str(step)
    for _ in range(600):
        if path.is_dir():
            return
        time.sleep(0.05)
    raise TimeoutError(path)


def die_at(directory, at):
    """Return a progress function that kills this process."""

    def progress(step, steps, figures):
        if step == at:
            wait_for_checkpoint(directory, CFG.checkpoint_every)
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


if __name__ == "__main__":
    directory, at = sys.argv[1], int(sys.argv[2])
    assert jax.process_count() == 1
    fit(objective, *parts(), CFG, directory=Path(directory), progress=die_at(directory, at))
