"""The launch files run commands that exist, and say that they were not run on a pod."""

import re
import subprocess
from pathlib import Path

import pytest
import typer.main
import yaml

from composable.cli import train

FOLDER = Path(__file__).parents[2] / "scripts" / "launch"
# Options of the launchers themselves.
OF_LAUNCHERS = {
    "queued-resource.sh": {
        *("--project", "--zone", "--node-id", "--accelerator-type", "--runtime-version", "--spot"),
        *("--format", "--worker", "--command", "--implicit-dirs"),
    },
    "jobset.yaml": {"--cluster", "--workload", "--tpu-type", "--docker-image", "--command"},
    "slurm.sbatch": {
        *("--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-task", "--time", "--signal"),
        *("--requeue", "--kill-on-bad-exit"),
    },
    "ray_driver.py": {"--workers", "--work", "--gpus"},
}
FILES = sorted(path for path in FOLDER.iterdir() if path.name != "README.md")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_option_of_the_command_exists(path):
    command = typer.main.get_command(train.app).commands["train"]
    known = {option for parameter in command.params for option in parameter.opts}
    used = set(re.findall(r"(?<![\w-])--[a-z-]+", path.read_text()))
    assert {"--data", "--mesh", "--rows", "--window"} <= used
    assert used - OF_LAUNCHERS.get(path.name, set()) <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_was_not_run_says_so(path):
    assert "not run on a pod" in path.read_text().lower()


@pytest.mark.parametrize("name", ["queued-resource.sh", "slurm.sbatch", "ssh.sh"])
def test_shell_can_parse_it(name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)


def test_a_job_set_goes_on_after_75_and_ends_after_its_own_failure():
    spec = yaml.safe_load((FOLDER / "jobset.yaml").read_text())["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    actions = {
        (codes["operator"], *codes["values"]): rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if (codes := rule.get("onExitCodes"))
    }
    assert actions == {("In", 75): "Ignore", ("NotIn", 75): "FailJob"}
