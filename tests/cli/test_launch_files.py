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

from composable.cli import contribute, train

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
    "check-slurm.sbatch": {
        *("--job-name", "--ntasks", "--cpus-per-task", "--time", "--requeue", "--open-mode"),
        *("--parsable", "--array", "--dependency"),
    },
    "check-job.yaml": {"--for", "--timeout"},
    "check_ray.py": {"--workers", "--work", "--address"},
    "ray_driver.py": {"--workers", "--work", "--gpus", "--restarts"},
}
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file() and path.name != "README.md")
CHECKS = [path for path in FILES if path.name.startswith("check")]
RUNS = [path for path in FILES if path not in CHECKS and path.name != "kueue.yaml"]
STOPPED = 75


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_option_of_the_command_exists(path):
    used = set(re.findall(r"(?<![\w-])--[a-z-]+", path.read_text()))
    assert {"--data", "--mesh", "--rows", "--window"} <= used
    assert used - OF_LAUNCHERS.get(path.name, set()) <= options_of_train()


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.name)
def test_every_option_of_a_check_exists(path):
    used = set(re.findall(r"(?<![\w-])--[a-z-]+", path.read_text()))
    assert {"--beside", "--registry", "--results"} <= used
    assert used - OF_LAUNCHERS[path.name] <= options_of(contribute.app, "check")


def run_check(path, tmp_path, **env):
    """Run a script with a `composable` that prints how it is called; return that."""
    program = tmp_path / "composable"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "WORK": "/work", **env}
    run = subprocess.run(path, env=env, check=True, capture_output=True, text=True)
    return run.stdout.splitlines()


def test_the_parts_of_an_array_are_all_parts_and_the_last_job_has_none(tmp_path):
    script = ["bash", FOLDER / "check-slurm.sbatch", "--jobs", "4"]
    array = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "4"}
    parts = [
        run_check(script, tmp_path, SLURM_ARRAY_TASK_ID=index, **array) for index in ("3", "4")
    ]
    last = run_check(script, tmp_path)
    assert last[:2] == ["check", "/work/expert"]
    assert last[-2:] == ["--jobs", "4"]
    assert "--shard" not in last
    for number, part in enumerate(parts, start=1):
        assert part == [*last[:-2], "--shard", f"{number}/2", *last[-2:]]


def test_every_index_of_the_job_is_a_part(tmp_path):
    job = yaml.safe_load((FOLDER / "check-job.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    found = []
    for index in range(job["completions"]):
        words = run_check(container["command"], tmp_path, JOB_COMPLETION_INDEX=str(index))
        found.append(words[words.index("--shard") + 1])
    assert found == [f"{part}/{len(found)}" for part in range(1, len(found) + 1)]
    rules = job["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "FailIndex"]
    assert rules[1]["onExitCodes"]["values"] == [1, 2]


def options_of_train():
    return options_of(train.app, "train")


def options_of(app, name):
    command = typer.main.get_command(app).commands[name]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_was_not_run_says_so(path):
    assert "not run on a pod" in path.read_text().lower()


def test_the_table_names_every_file():
    table = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)) == {path.name for path in FILES}


@pytest.mark.parametrize(
    "name", ["queued-resource.sh", "slurm.sbatch", "ssh.sh", "check-slurm.sbatch"]
)
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
