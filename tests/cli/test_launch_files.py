"""The launch files run commands that exist, and say that they were not run on a pod.

`make test-launch` runs those tests that need a launcher, in tests/launch.
"""

import os
import re
import shlex
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
        *("--format", "--worker", "--command", "--implicit-dirs", "--force", "--quiet"),
    },
    "jobset.yaml": {
        *("--cluster", "--workload", "--tpu-type", "--docker-image", "--command"),
        *("--max-restarts", "--restart-on-exit-codes"),
    },
    "slurm.sbatch": {
        *("--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--gpus-per-task"),
        *("--time", "--signal", "--requeue", "--open-mode", "--kill-on-bad-exit"),
    },
    "ray_driver.py": {"--workers", "--work", "--gpus", "--restarts"},
}
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file() and path.name != "README.md")
RUNS = [path for path in FILES if path.name != "kueue.yaml"]
STOPPED = 75


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_option_of_the_command_exists(path):
    used = set(re.findall(r"(?<![\w-])--[a-z-]+", path.read_text()))
    assert {"--data", "--mesh", "--rows", "--window"} <= used
    assert used - OF_LAUNCHERS.get(path.name, set()) <= options_of_train()


def options_of_train():
    command = typer.main.get_command(train.app).commands["train"]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_was_not_run_says_so(path):
    assert "not run on a pod" in path.read_text().lower()


def test_the_table_names_every_file():
    table = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)) == {path.name for path in FILES}


@pytest.mark.parametrize("name", ["queued-resource.sh", "slurm.sbatch", "ssh.sh"])
def test_shell_can_parse_it(name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)


def test_a_job_set_asks_the_queue_that_is_there_for_as_many_chips_as_it_has():
    jobs, *queue = [
        found
        for name in ("jobset.yaml", "kueue.yaml")
        for found in yaml.safe_load_all((FOLDER / name).read_text())
    ]
    flavor, cluster, local = queue
    job = jobs["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (group,) = cluster["spec"]["resourceGroups"]
    assert jobs["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    assert group["flavors"][0]["name"] == flavor["metadata"]["name"]
    assert flavor["spec"]["nodeLabels"] == pod["nodeSelector"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == group["flavors"][0]["resources"][0]["nominalQuota"] == 16


# Records how it is called, and answers as the test tells it to.
GCLOUD = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$RECORD"
echo >>"$RECORD"
case "$*" in
  *" describe "*) sed -n "$(grep -c ' describe ' "$RECORD")p" "$STATES" ;;
  *"composable train"*) exit "$(sed -n "$(grep -c 'composable.*train' "$RECORD")p" "$CODES")" ;;
esac
"""


def run_queued_resource(folder, states, codes):
    """Run the script with a gcloud that answers with states and exit codes; return its calls."""
    (folder / "gcloud").write_text(GCLOUD)
    (folder / "gcloud").chmod(0o755)
    env = {"PROJECT": "p", "ZONE": "z", "BUCKET": "b", "POLL_SECONDS": "0"}
    for name, lines in (("states", states), ("codes", codes), ("record", ())):
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
        env[name.upper()] = str(folder / name)
    env["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run([FOLDER / "queued-resource.sh", "--steps", "7"], env=env, check=False)
    calls = (folder / "record").read_text().splitlines()
    return run.returncode, [shlex.split(call) for call in calls]


def test_a_queued_resource_is_made_waited_for_and_trained_on(tmp_path):
    code, calls = run_queued_resource(tmp_path, ["ACCEPTED", "PROVISIONING", "ACTIVE"], [0])
    assert code == 0
    verbs = [call[call.index("tpus") + 2] for call in calls]
    assert verbs == ["create", "describe", "describe", "describe", "ssh", "ssh"]
    assert {"--spot", "--node-id", "v5litepod-16"} <= set(calls[0])
    command = shlex.split(calls[-1][calls[-1].index("--command") + 1])
    assert command[:2] == ["composable", "train"]
    assert command[-2:] == ["--steps", "7"]
    assert {word for word in command if word.startswith("--")} <= options_of_train()


@pytest.mark.parametrize(
    ("states", "codes", "expected", "verbs"),
    [
        (["ACTIVE"] * 2, [STOPPED, 0], 0, ["ssh", "describe", "ssh"]),
        (
            ["ACTIVE", "SUSPENDED", "ACTIVE"],
            [255, 0],
            0,
            ["ssh", "describe", "delete", "create", "describe", "ssh", "ssh"],
        ),
        (["ACTIVE"] * 2, [1], 1, ["ssh", "describe"]),
    ],
    ids=["stopped", "taken away", "failed"],
)
def test_a_queued_resource_is_trained_on_again_unless_the_run_failed(
    tmp_path, states, codes, expected, verbs
):
    code, calls = run_queued_resource(tmp_path, states, codes)
    assert code == expected
    assert [call[call.index("tpus") + 2] for call in calls[3:]] == verbs
