"""An expert to launch, `composable` as launched processes find it, and the weights to expect."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.servers import free_port

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "scripts" / "launch"
TOOLS = REPOSITORY / ".venv-launch" / "bin"
# Checkpoints are written every 400 steps; a process is killed after the first.
STEPS = 1200
FIRST_CHECKPOINT = 400
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Work:
    """The folder that all processes of a run see.

    Args:
        folder: Holds the expert and its text, as the launch files expect.
        options: What to add to the command.
        env: Environment with the `composable` of this checkout in the path.
        program: Path of that `composable`.
    """

    folder: Path
    options: list[str]
    env: dict[str, str]
    program: Path

    def wait_for_process(self, index: int) -> int:
        """Return the number of the process of an index, when it runs."""
        return wait_until(lambda: self.find_process(index), lambda: self.said)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def said(self) -> str:
        """The end of what was printed."""
        return self.log.read_text()[-3000:] if self.log.exists() else ""

    def wait_for_checkpoint(self) -> None:
        """Wait until a checkpoint is whole."""
        folder = self.folder / "expert" / ".work" / "checkpoints" / str(FIRST_CHECKPOINT)
        wait_until(folder.exists, lambda: self.said)

    def weights(self) -> dict[str, np.ndarray]:
        """Return the weights that training ended with."""
        return load_file(self.folder / "expert" / "body.safetensors")

    def wait_for_start(self) -> None:
        """Wait until the processes have met: until then SIGTERM just ends one."""
        folder = self.folder / "expert" / ".work" / "checkpoints"
        wait_until(folder.exists, lambda: self.said)

    def find_process(self, index: int) -> int | None:
        """Return the number of the running process of an index, if there is one."""
        own = str(self.folder / "expert").encode()
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if own in words and b"--process-id" in words and b"train" in words:
                at = words.index(b"--process-id")
                if words[at + 1] == str(index).encode() and Path(words[0].decode()).name != "sh":
                    return int(folder.name)
        return None


def wait_until(holds, describe):
    """Wait until a function returns something true, and return that."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while not (found := holds()):
        assert time.monotonic() < end, describe()
        time.sleep(0.1)
    return found


@pytest.fixture(scope="session")
def new_work(loaded, trained_folder):
    """Return a function that fills a folder with an untrained expert and its text."""

    def make(folder):
        (folder / "expert").mkdir(parents=True)
        (folder / "text").mkdir()
        (folder / "bin").mkdir()
        for name in ("expert.toml", "README.md"):
            shutil.copy(trained_folder / name, folder / "expert")
        shutil.copy(trained_folder.parent / "logic.jsonl", folder / "text")
        program = folder / "bin" / "composable"
        kept = ("PYTHONPATH", "JAX_PLATFORMS", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
        kept += tuple(name for name in os.environ if name.startswith("JAX_") and name not in kept)
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
        exports = "".join(f"export {name}='{env[name]}'\n" for name in kept if name in env)
        program.write_text(f'#!/bin/sh\n{exports}exec {sys.executable} -m composable.cli "$@"\n')
        program.chmod(0o755)
        env["PATH"] = f"{program.parent}{os.pathsep}{env['PATH']}"
        settings = ["--rows", "4", "--window", "32", "--steps", str(STEPS), "--mesh", "data=2"]
        return Work(folder, [*settings, "--backbone", str(loaded.folder)], env, program)

    return make


@pytest.fixture
def work(new_work, tmp_path):
    return new_work(tmp_path / "work")


@pytest.fixture(scope="session")
def straight(new_work, made_once):
    """Return the weights of a run of two processes that nothing interrupts."""
    folder = made_once("straight", lambda folder: train_straight(new_work(folder)))
    return load_file(folder / "expert" / "body.safetensors")


def train_straight(work):
    """Train in two processes, without a launcher."""
    group = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    command = [work.program, "train", work.folder / "expert", "--data", work.folder / "text"]
    command += [*work.options, *group, "--process-id"]
    started = [subprocess.Popen([*command, str(index)], env=work.env) for index in range(2)]
    try:
        assert [process.wait(TIMEOUT_SECONDS) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture
def tools():
    """Return the Python of the environment that has SkyPilot, Ray, xpk and the schemas."""
    if not (TOOLS / "python").exists():
        pytest.skip("no .venv-launch; `make test-launch` makes it")
    return TOOLS / "python"
