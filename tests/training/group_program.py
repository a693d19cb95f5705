"""Fit the line of `line_program` as one of several processes, slowly, and print where it ended.

    python group_program.py DIRECTORY HOST:PORT N_PROCESSES PROCESS

Exits as the command line does: 75 if it was asked to stop.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from composable.errors import PreemptedError
from composable.parallel import start_processes
from composable.training.config import TrainConfig
from composable.training.data import batches
from composable.training.loop import fit
from tests.training.line_program import objective, parts

CFG = TrainConfig(
    steps=30, batch_size=4, window=7, learning_rate=1e-2, checkpoint_every=10, log_every=1
)
STEP_SECONDS = 0.05


def fit_line(directory, progress=None):
    """Fit the line, and return its weights."""
    trained, frozen, _ = parts()
    data = batches(
        np.random.default_rng(0).integers(0, 100, 500),
        window=CFG.window,
        batch_size=CFG.batch_size,
        seed=0,
        process=jax.process_index(),
        n_processes=jax.process_count(),
    )
    fitted = fit(objective, trained, frozen, data, CFG, directory=directory, progress=progress)
    return {name: np.asarray(x).tolist() for name, x in fitted.trained.items()}


def main(directory, coordinator, n_processes, process):
    start_processes(coordinator, int(n_processes), int(process), init_timeout=60)
    done = []

    def progress(step, steps, figures):
        done.append(step)
        (Path(directory) / f"seen-{process}").write_text(str(step))
        time.sleep(STEP_SECONDS)

    try:
        weights = fit_line(Path(directory), progress)
    except PreemptedError as error:
        print(json.dumps({"first": done[0], "last": done[-1], "error": error.message}))
        sys.exit(error.exit_code)
    print(json.dumps({"first": done[0], "last": done[-1], "weights": weights}))


if __name__ == "__main__":
    main(*sys.argv[1:])
