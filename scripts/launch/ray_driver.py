"""Train on a Ray cluster: one worker per node, which runs the command. Not run on a pod.

    pip install '.[ray]'
    python scripts/launch/ray_driver.py --workers 4 --work /mnt/work [OPTION...]

OPTIONs are added to the command, with absolute paths; of two of a kind the last counts. A run that
was asked to stop (exit code 75) or lost a process (76, or a signal) is started again, and resumes;
any other failure ends the driver. Written for Ray 2.60.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import ray
import ray.train
import ray.train.collective
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

PORT = 8476
STOPPED, PEER_DIED = 75, 76
PR_SET_PDEATHSIG = 1


def die_with_parent():
    """End the command when Ray ends its worker: the next run needs its devices and its port."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_command(config):
    """Run the command in one worker; the coordinator is the worker of rank 0."""
    context = ray.train.get_context()
    first = ray.train.collective.broadcast_from_rank_zero(ray.util.get_node_ip_address())
    work = config["work"]
    command = [
        *("composable", "train", f"{work}/expert", "--data", f"{work}/text"),
        *("--mesh", "data=-1", "--rows", "16", "--window", "2048"),
        *("--coordinator", f"{first}:{PORT}"),
        *("--num-processes", str(context.get_world_size())),
        *("--process-id", str(context.get_world_rank())),
        *config["options"],
    ]
    code = subprocess.call(command, preexec_fn=die_with_parent)
    if code not in (0, STOPPED):
        raise subprocess.CalledProcessError(code, command)  # Ray then ends the other workers
    return code  # as do the others, since all processes stop after the same step


def run_once(arguments, options):
    """Run the workers once; return the exit code of the command, a failure's before others."""
    trainer = DataParallelTrainer(
        run_command,
        train_loop_config={"work": str(arguments.work), "options": options},
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpus),
        run_config=RunConfig(storage_path=f"{arguments.work}/ray"),
    )
    try:
        return trainer.fit().return_value
    except WorkerGroupError as error:
        causes = [getattr(e, "_base_exc", e) for e in error.worker_failures.values()]
        codes = [getattr(cause, "returncode", PEER_DIED) for cause in causes]
        return next(filter(is_failure, codes), codes[0])


def is_failure(code):
    """Return whether a code is that of a failure which would come again."""
    return 0 < code < 128 and code not in (STOPPED, PEER_DIED)


def main():
    """Run the workers until they have trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", default="work", help="folder that all nodes see")
    parser.add_argument("--gpus", action="store_true", help="one GPU for each worker")
    parser.add_argument("--restarts", type=int, default=20)
    arguments, options = parser.parse_known_args()
    arguments.work = Path(arguments.work).absolute()
    for _ in range(arguments.restarts + 1):
        code = run_once(arguments, options)
        if code == 0 or is_failure(code):
            break
        print(f"exit code {code}: starting again", file=sys.stderr, flush=True)
    sys.exit(code % 256)


if __name__ == "__main__":
    main()
