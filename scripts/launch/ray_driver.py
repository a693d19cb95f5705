"""Train on a Ray cluster: one worker per node, all of which run the same command. Not run on a pod.

    pip install 'ray[train]'
    RAY_TRAIN_V2_ENABLED=1 python scripts/launch/ray_driver.py --workers 4 --work /mnt/work

A worker that is asked to stop exits with 75, and one that fails with another code; both are errors
for Ray, which restarts the group, and the command resumes from its last checkpoint.
"""

import argparse
import socket
import subprocess

import ray.train
import ray.train.collective
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.data_parallel_trainer import DataParallelTrainer

PORT = 8476


def run_command(config):
    """Run the command in one worker; the coordinator is the worker of rank 0."""
    context = ray.train.get_context()
    own = socket.gethostbyname(socket.gethostname())
    first = ray.train.collective.broadcast_from_rank_zero(own)
    work = config["work"]
    subprocess.run(
        [
            *("composable", "train", f"{work}/expert", "--data", f"{work}/text"),
            *("--mesh", config["mesh"], "--rows", "16", "--window", "2048"),
            *("--coordinator", f"{first}:{PORT}"),
            *("--num-processes", str(context.get_world_size())),
            *("--process-id", str(context.get_world_rank())),
        ],
        check=True,
    )


def main():
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", default="work", help="folder that all nodes see")
    parser.add_argument("--mesh", default="data=-1")
    parser.add_argument("--gpus", action="store_true")
    arguments = parser.parse_args()
    DataParallelTrainer(
        run_command,
        train_loop_config={"work": arguments.work, "mesh": arguments.mesh},
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpus),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=20)),
    ).fit()


if __name__ == "__main__":
    main()
