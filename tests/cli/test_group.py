"""`composable train` and `composable check` as one run of two processes, over loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from composable.cli.app import app
from composable.errors import PreemptedError

pytestmark = pytest.mark.slow

# Rows are summed on two devices instead of on one; a few steps of Muon of at most 1e-2.
SAME_WEIGHTS = 5e-3
REPOSITORY = Path(__file__).parents[2]


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run_group(n_processes, *arguments):
    """Run a command in every process of a group; return what each printed."""
    address = free_address()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    started = []
    try:
        for index in range(n_processes):
            group = ["--coordinator", address, "--num-processes", str(n_processes)]
            command = [sys.executable, "-m", "composable.cli", *map(str, arguments)]
            started.append(
                subprocess.Popen(
                    [*command, *group, "--process-id", str(index)],
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [out for out, _ in said]


@pytest.fixture
def experts(trained_folder, loaded, tmp_path):
    """Return two folders of the same untrained expert, its text, and the backbone."""
    folders = []
    for name in ("one", "two"):
        folder = tmp_path / name / "logic"
        folder.mkdir(parents=True)
        for file in ("expert.toml", "README.md"):
            shutil.copy(trained_folder / file, folder)
        folders.append(folder)
    return *folders, trained_folder.parent / "logic.jsonl", loaded.folder


def test_two_processes_train_and_check_one_expert(experts):
    one, two, text, backbone = experts
    options = ["--backbone", backbone, "--json"]
    settings = ["--steps", 4, "--window", 32]
    command = ["train", one, "--data", text, *settings, *options]
    alone = CliRunner().invoke(app, [*map(str, command)]).stdout
    first, second = run_group(2, "train", two, "--data", text, *settings, *options)
    assert second == "", "only the first process prints"
    expected, found = json.loads(alone), json.loads(first)
    assert found["tokens"] == expected["tokens"]
    assert found["last"]["loss"] == pytest.approx(expected["last"]["loss"], abs=1e-3)
    body, same_body = (load_file(folder / "body.safetensors") for folder in (two, one))
    assert body.keys() == same_body.keys()
    for name, array in body.items():
        np.testing.assert_allclose(array, same_body[name], atol=SAME_WEIGHTS)
    first, second = run_group(2, "check", two, "--data", text, *options)
    assert second == ""
    assert {check["name"] for check in json.loads(first)["checks"]} > {"format"}


def test_sigterm_before_the_first_step_ends_with_its_own_exit_code(experts):
    """As soon as the command listens, which is before it imports jax."""
    expert, _, text, backbone = experts

    def send():
        while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    command = ["train", expert, "--data", text, "--backbone", backbone]
    stopped = CliRunner().invoke(app, [*map(str, command)])
    sender.join()
    assert stopped.exit_code == PreemptedError.exit_code == 75
    assert "while no step was running" in stopped.stderr
    assert not (expert / "body.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_report_adds_up_the_ledger_of_a_run_and_draws_it(trained_folder, tmp_path):
    folder = shutil.copytree(trained_folder, tmp_path / "logic")
    said = CliRunner().invoke(app, ["train", str(folder), "--report"])
    assert said.exit_code == 0, said.stderr
    page = folder / ".work" / "goodput.html"
    assert f"drawn in {page}" in said.stdout
    assert "<svg" in page.read_text()
    found = json.loads(CliRunner().invoke(app, ["train", str(folder), "--report", "--json"]).stdout)
    (start,) = found["starts"]
    assert (start["first_step"], start["last_step"], start["processes"]) == (0, 60, 1)
    seconds = found["seconds"]
    assert seconds["compile"] > 0 and seconds["startup"] > 0 and seconds["lost"] == 0
    assert sum(seconds.values()) == pytest.approx(found["wall_seconds"], abs=0.1)
    for kind in ("start-up", "compiling", "checkpoints", "1 starts"):
        assert kind in said.stdout


def test_report_without_a_ledger_says_where_it_looked(tmp_path):
    said = CliRunner().invoke(app, ["train", str(tmp_path), "--report"])
    assert said.exit_code == 1
    assert "no goodput.jsonl here nor in .work" in said.stderr
