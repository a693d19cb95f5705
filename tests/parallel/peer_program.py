"""One process of a group that sums over all devices until it, or another, is made to fail.

    python peer_program.py HOST:PORT N_PROCESSES PROCESS HOW

HOW is what the last process does after three steps: `die` (SIGKILL) or `bug` (an error that is not
ours); or `nan`, an error of ours in all processes.
"""

import os
import signal
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from composable.errors import ComposableError, TrainingError
from composable.parallel import leave_group, make_mesh, start_processes


def main(coordinator, n_processes, process, how):
    start_processes(coordinator, int(n_processes), int(process), init_timeout=60)
    is_last = int(process) == int(n_processes) - 1
    split = NamedSharding(make_mesh(), PartitionSpec("data"))
    add = jax.jit(lambda x_B: x_B.sum())
    for step in range(1000):
        rows_B = np.ones(4, np.float32)
        x_B = jax.make_array_from_process_local_data(split, rows_B)
        assert float(add(x_B)) == 4 * int(n_processes)
        if step == 3 and how == "nan":
            raise TrainingError("the loss is nan at step 3")
        if step == 3 and is_last:
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "bug":
                raise ZeroDivisionError("a bug")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ComposableError as error:
        print(f"error: {error}", file=sys.stderr)
        leave_group(error, error.exit_code)
        sys.exit(error.exit_code)
