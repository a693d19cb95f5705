"""The ssh script on two hosts that are both this machine: a process killed, and a run stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.launch.conftest import LAUNCH, TIMEOUT_SECONDS
from tests.support.servers import free_port, wait_for

pytestmark = pytest.mark.slow

HOSTS = ("127.0.0.1", "localhost")
STOPPED = 75


@pytest.fixture(scope="module")
def ssh():
    """Run a server, and return the ssh command that reaches it."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("no sshd; apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sshd-") as home:
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{home}/{name}"], check=True
            )
        shutil.copy(f"{home}/user.pub", f"{home}/authorized")
        port = free_port()
        Path(f"{home}/conf").write_text(
            f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {home}/host\nPidFile {home}/pid\n"
            f"AuthorizedKeysFile {home}/authorized\nPasswordAuthentication no\nUsePAM no\n"
            "StrictModes no\nPermitRootLogin prohibit-password\n"
        )
        server = subprocess.Popen([program, "-D", "-e", "-f", f"{home}/conf"])
        try:
            wait_for(port, server)
            yield (
                f"ssh -F none -p {port} -i {home}/user -o IdentitiesOnly=yes -o BatchMode=yes "
                f"-o StrictHostKeyChecking=no -o UserKnownHostsFile={home}/known -o LogLevel=ERROR"
            )
        finally:
            server.terminate()
            server.wait()


def launch(ssh, work, *options):
    """Start the script with two hosts; its output goes to the log."""
    env = {**work.env, "WORK": str(work.folder), "SSH": ssh, "PORT": str(free_port())}
    env["COMPOSABLE"] = str(work.program)
    with work.log.open("ab") as log:
        command = [LAUNCH / "ssh.sh", *HOSTS, "--", *work.options, *options]
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def test_a_run_that_lost_a_process_is_started_again_and_ends_as_if_it_had_not(ssh, work, straight):
    script = launch(ssh, work)
    work.wait_for_checkpoint()
    killed = work.wait_for_process(1)
    os.kill(killed, signal.SIGKILL)
    assert script.wait(TIMEOUT_SECONDS) == 0, work.said
    for name, array in work.weights().items():
        np.testing.assert_array_equal(array, straight[name])


def test_ctrl_c_stops_the_run_after_a_checkpoint_and_the_same_command_resumes(ssh, work, straight):
    script = launch(ssh, work)
    work.wait_for_start()
    script.send_signal(signal.SIGINT)
    assert script.wait(TIMEOUT_SECONDS) == STOPPED, work.said
    assert "asked to stop (SIGTERM)" in work.log.read_text()
    assert launch(ssh, work).wait(TIMEOUT_SECONDS) == 0
    for name, array in work.weights().items():
        np.testing.assert_array_equal(array, straight[name])


def test_a_failure_of_its_own_ends_the_script(ssh, work):
    (work.folder / "expert" / "expert.toml").write_text("[expert]\n")
    assert launch(ssh, work).wait(TIMEOUT_SECONDS) == 1
