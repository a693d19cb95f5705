"""A process of a group that fails or dies ends the others, which name it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from composable.errors import PeerError
from composable.parallel import exchange, leave_group, peers

PROGRAM = Path(__file__).with_name("peer_program.py")
PEER_FAILED = 76
# Well below the 100 seconds after which jax would end them.
SOON_SECONDS = 30


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run(n_processes, how):
    """Run the program in a group; return exit codes and what each wrote to standard error."""
    address = free_address()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PROGRAM.parents[2])}
    started = []
    try:
        for index in range(n_processes):
            command = [sys.executable, str(PROGRAM), address, str(n_processes), str(index), how]
            started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        said = [process.communicate(timeout=SOON_SECONDS * 4)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [process.returncode for process in started], said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "codes", "why"),
    [
        ("die", [PEER_FAILED, -signal.SIGKILL], "process 1 died without a message"),
        ("bug", [PEER_FAILED, 1], "process 1 failed: ZeroDivisionError: a bug"),
        ("nan", [1, 1], "process 1 failed: the loss is nan at step 3"),
    ],
)
def test_process_0_names_what_the_other_one_failed_with(how, codes, why):
    found, said = run(2, how)
    assert found == codes, said
    assert why in said[0]


class Exited(BaseException):
    """Stands for the end of a process."""


@pytest.fixture
def watched(monkeypatch):
    """Return a watch of process 0 over processes 1 and 2, their ends, and how it ended."""
    ends, connections, outcome = {}, {}, {"errors": []}

    def stop(code):
        outcome["code"] = code
        raise Exited

    monkeypatch.setattr(peers, "_exit", stop)
    monkeypatch.setattr(peers, "_COLLECT_SECONDS", 0.2)
    monkeypatch.setattr(peers, "_FAREWELL_SECONDS", 0.2)
    for index in (1, 2):
        ends[index], connections[index] = socket.socketpair()
    yield (
        lambda: peers.Peers(0, connections, lambda error: outcome["errors"].append(error)),
        ends,
        outcome,
    )
    for end in ends.values():
        end.close()


def wait_for(outcome):
    deadline = time.monotonic() + 10
    while "code" not in outcome and time.monotonic() < deadline:
        time.sleep(0.02)
    (error,) = outcome["errors"]
    assert isinstance(error, PeerError)
    assert outcome["code"] == error.exit_code == PEER_FAILED
    return error.message


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_all_failures_of_a_moment_are_collected_and_told_to_the_others(watched):
    start, ends, outcome = watched
    start()
    ends[2].sendall(b'["failed", "no room"]\n')
    ends[1].sendall(b'["failed", "no text"]\n')
    assert wait_for(outcome) == "process 1 failed: no text; process 2 failed: no room"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_left_is_no_failure_and_hears_of_later_ones(watched):
    start, ends, outcome = watched
    start()
    ends[1].sendall(b'["left", ""]\n')
    ends[1].shutdown(socket.SHUT_WR)
    time.sleep(0.5)
    assert "code" not in outcome
    ends[2].shutdown(socket.SHUT_WR)
    assert wait_for(outcome) == "process 2 died without a message (killed, or out of memory?)"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_hangs_is_not_waited_for(watched, monkeypatch):
    start, _, outcome = watched
    monkeypatch.setattr(peers, "SILENCE_SECONDS", 0.3)
    start()
    assert "process 1 has not been heard of" in wait_for(outcome)


def test_a_process_alone_has_nobody_to_tell():
    leave_group(ValueError("a bug"))
    assert exchange("text") == ["text"]
