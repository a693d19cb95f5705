"""Vetting on a local Ray with two workers, one of which is killed: the card of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from composable.packaging.registry.locations import open_for_publishing
from composable.workflows.publish import publish_expert
from tests.launch.conftest import LAUNCH, REPOSITORY, TIMEOUT_SECONDS, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def vetting(new_work, trained_folder, loaded, tmp_path):
    """Return work whose expert is trained, and a registry with another one."""
    work = new_work(tmp_path / "work")
    folder, registry = work.folder / "expert", work.folder / "registry"
    shutil.rmtree(folder)
    shutil.copytree(trained_folder, folder)
    (folder / "card.json").unlink()
    manifest = folder / "expert.toml"
    # A relative: its scout is a copy, which is refused of any other.
    renamed = 'name = "newcomer"\nderives-from = "logic@1.0.0"'
    manifest.write_text(manifest.read_text().replace('name = "logic"', renamed))
    publish_expert(trained_folder, loaded.interface, open_for_publishing(str(registry)))
    return work


@pytest.fixture
def ray_path(tools, tmp_path):
    """Return a folder with Ray alone: the other packages of two environments do not mix."""
    (home,) = tools.parent.parent.glob("lib/python*/site-packages")
    folder = tmp_path / "ray"
    folder.mkdir()
    for name in ("ray", "msgpack"):
        (folder / name).symlink_to(home / name)
    return folder


def test_a_killed_worker_is_replaced_and_the_card_is_the_same(vetting, ray_path, loaded, tmp_path):
    folder, backbone = vetting.folder / "expert", ["--backbone", loaded.folder]
    straight = shutil.copytree(folder, tmp_path / "straight" / "newcomer")
    command = ["check", straight, "--beside", "all", "--registry", vetting.folder / "registry"]
    subprocess.run([vetting.program, *command, *backbone], env=vetting.env, check=True)

    env = {
        **vetting.env,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{ray_path}",
        "RAY_TMPDIR": str(Path("/tmp") / f"ray-{os.getpid()}"),  # paths of sockets are short
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, LAUNCH / "check_ray.py", "--work", vetting.folder, *backbone]
    with vetting.log.open("ab") as log:
        driver = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        claims = vetting.folder / "results" / "claims"
        killed = wait_until(lambda: find_worker(claims), lambda: vetting.said)
        os.kill(killed, signal.SIGKILL)
        assert driver.wait(TIMEOUT_SECONDS) == 0, vetting.said
    finally:
        driver.kill()
        driver.wait()
        shutil.rmtree(env["RAY_TMPDIR"], ignore_errors=True)
    cards = [json.loads((home / "card.json").read_text()) for home in (folder, straight)]
    assert cards[0] == cards[1]
    others = {json.loads(path.read_text())["pid"] for path in claims.rglob("*.*") if path.is_file()}
    assert others - {killed}


def find_worker(claims):
    """Return the number of a process that has begun a unit."""
    for path in claims.rglob("*.0"):
        if text := path.read_text():
            return json.loads(text)["pid"]
    return None
