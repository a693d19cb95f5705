"""The batch script on a Slurm of one node: two tasks, a preemption, and the job that resumes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from composable.packaging.registry.locations import open_for_publishing
from composable.workflows.references import find_peers
from composable.workflows.vet import check_expert
from tests.launch.conftest import LAUNCH, wait_until
from tests.support.slurm import find_missing, run_slurm

pytestmark = pytest.mark.slow

OPTIONS = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]


@pytest.fixture(scope="module")
def slurm():
    if missing := find_missing():
        pytest.skip(f"no {missing[0]}; apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("a node of Slurm runs as root")
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as home, run_slurm(Path(home)) as env:
        yield env


def submit(slurm, work):
    """Submit the script with two tasks, and return the number of the job."""
    env = {**slurm, **work.env, "PATH": f"{work.env['PATH']}:/usr/sbin"}
    env |= {"WORK": str(work.folder), "SLURM_CONF": slurm["SLURM_CONF"]}
    command = ["sbatch", "--parsable", f"--output={work.log}", *OPTIONS, LAUNCH / "slurm.sbatch"]
    run = subprocess.run(
        [*command, *work.options], env=env, check=True, capture_output=True, text=True
    )
    return run.stdout.strip()


def describe(slurm, job):
    """Return what Slurm knows of a job."""
    run = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job],
        env=slurm,
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(word.split("=", 1) for word in run.stdout.split() if "=" in word)


def wait_for_end(slurm, job, work):
    """Return what Slurm knows of a job when it ended."""
    ends = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}
    return wait_until(
        lambda: (found := describe(slurm, job))["JobState"] in ends and found,
        lambda: f"{describe(slurm, job)['JobState']}: {work.said}",
    )


def test_a_preempted_job_is_queued_again_and_ends_as_if_it_was_not(slurm, work, straight):
    job = submit(slurm, work)
    work.wait_for_start()
    subprocess.run(["scancel", "--signal=TERM", job], env=slurm, check=True)
    found = wait_for_end(slurm, job, work)
    log = work.log.read_text()
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "1"), (
        log
    )
    assert "asked to stop (SIGTERM)" in log
    for name, array in work.weights().items():
        np.testing.assert_array_equal(array, straight[name])


def test_a_failure_of_its_own_is_not_queued_again(slurm, work):
    (work.folder / "expert" / "expert.toml").write_text("[expert]\n")
    found = wait_for_end(slurm, submit(slurm, work), work)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "1:0", "0")


def test_each_task_sees_all_gpus_of_its_node(slurm, work):
    """jax takes the one of the task's own number out of them."""
    work.program.write_text('#!/bin/sh\necho "$SLURM_LOCALID sees $CUDA_VISIBLE_DEVICES"\n')
    wait_for_end(slurm, submit(slurm, work), work)
    assert sorted(work.log.read_text().splitlines()) == ["0 sees 0,1", "1 sees 0,1"]


def test_parts_of_an_array_and_the_job_after_it_make_the_card_of_one_process(
    slurm, new_work, loaded, trained_folder, tmp_path
):
    """Two tasks of an array measure a part each, beside two experts; a last job writes the card."""
    work = new_work(tmp_path / "work")
    registry = open_for_publishing(work.folder / "registry")
    own = work.folder / "expert"
    for folder, name in ((own, "newcomer"), (tmp_path / "a", "sets"), (tmp_path / "b", "lists")):
        shutil.copytree(trained_folder, folder, dirs_exist_ok=True)
        manifest = folder / "expert.toml"
        manifest.write_text(manifest.read_text().replace('name = "logic"', f'name = "{name}"'))
        if folder != own:
            registry.publish(folder, interface=loaded.interface)
    peers = find_peers(loaded, "newcomer", ["all"], {}, registry=str(work.folder / "registry"))
    check_expert(loaded, own, peers=peers)
    straight = (own / "card.json").read_bytes()
    (own / "card.json").unlink()
    env = {**slurm, **work.env, "PATH": f"{work.env['PATH']}:/usr/sbin", "WORK": str(work.folder)}
    command = ["sbatch", "--parsable", "--cpus-per-task=1", f"--output={work.log}"]
    options = [LAUNCH / "check-slurm.sbatch", "--backbone", loaded.folder]

    def run(*more):
        run = subprocess.run(
            [*command, *more, *options], env=env, check=True, capture_output=True, text=True
        )
        return run.stdout.strip()

    array = run("--array=1-2")
    last = run(f"--dependency=afterany:{array}")
    wait_for_end(slurm, last, work)
    assert (own / "card.json").read_bytes() == straight, work.said
    for part in (1, 2):
        assert f"shard {part}/2: " in work.log.read_text()
