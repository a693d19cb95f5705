"""`composable train` and `composable check` as one run of two processes, over loopback."""

import contextlib
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
from composable.cli.group import stop_on_request
from composable.errors import PreemptedError

pytestmark = pytest.mark.slow

# Rows are summed on two devices instead of on one; a few steps of Muon of at most 1e-2.
SAME_WEIGHTS = 5e-3
REPOSITORY = Path(__file__).parents[2]


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def start_group(n_processes, *arguments, **environment):
    """Start a command in every process of a group."""
    address = free_address()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY), **environment}
    group = ["--coordinator", address, "--num-processes", str(n_processes)]
    command = [sys.executable, "-m", "composable.cli", *map(str, arguments), *group]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = []
    try:
        for index in range(n_processes):
            process = subprocess.Popen([*command, "--process-id", str(index)], env=env, **pipes)
            started.append(process)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def run_group(n_processes, *arguments):
    """Run a command in every process of a group; return what each printed."""
    with start_group(n_processes, *arguments) as started:
        said = [process.communicate(timeout=600) for process in started]
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


# Python's own words about a file that the signal found between being opened and being in use.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
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


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_sigterm_ends_code_that_makes_an_error_of_its_own_of_all_that_is_raised(caught):
    with pytest.raises(PreemptedError, match="while no step was running"), stop_on_request():
        try:
            signal.raise_signal(signal.SIGTERM)
        except caught as error:
            raise ValueError("damaged") from error


def test_errors_of_a_command_that_nobody_asked_to_stop_stay_as_they_are():
    with pytest.raises(ValueError, match="damaged"), stop_on_request():
        raise ValueError("damaged")


@pytest.mark.parametrize("asked", [0, 1], ids=["checks", "waits"])
def test_sigterm_ends_a_check_in_two_processes(trained_folder, loaded, tmp_path, asked):
    """At once, in the process that checks as in the one that waits for it."""
    folder = shutil.copytree(trained_folder, tmp_path / "logic")
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    command = ["check", folder, "--backbone", loaded.folder, "--data"]
    text = trained_folder.parent / "logic.jsonl"
    with start_group(2, *command, text, JAX_LOGGING_LEVEL="INFO") as started:
        # They have met. For a moment jax has a handler of its own, which ignores the signal.
        assert any("Connecting to JAX" in line for line in started[asked].stderr)
        time.sleep(0.5)
        while started[asked].poll() is None:
            started[asked].send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started[asked].wait(5)
        errors = [process.communicate(timeout=60)[1] for process in started]
    assert [started[i].returncode for i in (asked, 1 - asked)] == [75, 76], "".join(errors)
    assert "asked to stop (SIGTERM)" in errors[asked]
    assert f"process {asked} " in errors[1 - asked]
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


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
