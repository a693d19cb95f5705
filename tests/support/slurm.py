"""A Slurm of one node on this machine, with everything it writes in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.servers import free_port

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
START_SECONDS = 60.0
STOP_SECONDS = 10.0
# A job that is queued again waits until its credentials of before have expired.
CREDENTIAL_SECONDS = 5
CONF = """
ClusterName=composable
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire={credential_seconds}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def find_missing() -> list[str]:
    """Return the programs of Slurm and munge that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@contextlib.contextmanager
def run_slurm(home: Path) -> Iterator[dict[str, str]]:
    """Run a controller and a node of two CPUs and two GPUs that are not there.

    Yields:
        The environment in which the commands of Slurm reach it.
    """
    for folder in ("state", "spool"):
        (home / folder).mkdir(parents=True)
    conf = home / "slurm.conf"
    conf.write_text(
        CONF.format(
            home=home,
            host=socket.gethostname().partition(".")[0],
            controller_port=free_port(),
            node_port=free_port(),
            credential_seconds=CREDENTIAL_SECONDS,
        ).lstrip()
    )
    for index in range(2):
        # What stands for the device is another /dev/null.
        os.mknod(home / f"gpu{index}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (home / "gres.conf").write_text(f"Name=gpu File={home}/gpu[0-1] Flags=nvidia_gpu_env\n")
    env = {
        **os.environ,
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "SLURM_CONF": str(conf),
    }
    key = home / "munge.key"
    subprocess.run(["mungekey", "--create", "--keyfile", str(key)], env=env, check=True)
    files = [f"--socket={home}/munge.socket", f"--pid-file={home}/munge.pid", f"--key-file={key}"]
    files += [f"--log-file={home}/munge.log", f"--seed-file={home}/munge.seed"]
    commands = (
        ["munged", "--foreground", "--force", *files],
        ["slurmctld", "-D", "-i", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf)],
    )
    started = []
    try:
        for command in commands:
            log = (home / f"{command[0]}.out").open("wb")
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            log.close()
        _wait_until_idle(env, started)
        try:
            yield env
        finally:
            _end_jobs(env)
    finally:
        # One after the other: each needs those before it until it has ended.
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_idle(env: dict[str, str], started: list[subprocess.Popen[bytes]]) -> None:
    """Wait until the node takes jobs."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and all(process.poll() is None for process in started):
        run = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"], env=env, capture_output=True, text=True
        )
        if run.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    raise RuntimeError("Slurm did not start")


def _end_jobs(env: dict[str, str]) -> None:
    """Cancel the jobs that a failed test has left, and wait until their processes have ended."""
    subprocess.run(["scancel", "--user=root"], env=env, check=False)
    end = time.monotonic() + STOP_SECONDS
    while time.monotonic() < end:
        run = subprocess.run(["squeue", "--noheader"], env=env, capture_output=True, text=True)
        if not run.stdout.strip():
            return
        time.sleep(0.2)
