"""Start-up of groups of processes, over loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from composable.errors import ComposableWarning, PeerError, TrainingError
from composable.parallel import processes, start_processes
from composable.parallel.rendezvous import meet

NAMES = ("COMPOSABLE_COORDINATOR", "COMPOSABLE_PROCESSES", "COMPOSABLE_PROCESS")


@pytest.fixture(autouse=True)
def no_group(monkeypatch):
    for name in (*NAMES, "JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def joined(monkeypatch):
    """Record what jax would be started with, and return it."""
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *args, **_: calls.append(args))
    monkeypatch.setattr(processes, "meet", lambda *args: {})
    monkeypatch.setattr(processes, "_peers", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return calls


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_alone_there_is_nothing_to_join(joined):
    start_processes()
    assert joined == []


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"COMPOSABLE_COORDINATOR": "localhost:1"}, "COMPOSABLE_PROCESSES, COMPOSABLE_PROCESS"),
        ({"COMPOSABLE_PROCESS": "0"}, "COMPOSABLE_COORDINATOR, COMPOSABLE_PROCESSES"),
    ],
)
def test_half_of_the_variables_are_refused(monkeypatch, given, missing):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=f"{missing} not set"):
        start_processes()


def test_half_of_the_arguments_are_refused():
    with pytest.raises(TrainingError, match="--num-processes not set"):
        start_processes("localhost:1", process=0)


def test_variables_of_an_earlier_run_are_overridden_and_named(monkeypatch, joined):
    for name, value in zip(NAMES, ("old:1", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "old:1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start_processes("new:2", 2, 1)
    assert joined == [("new:2", 2, 1, None)]
    assert {warning.category for warning in caught} == {ComposableWarning}
    said = [str(warning.message).partition("=")[0] for warning in caught]
    assert said == [*NAMES, "JAX_COORDINATOR_ADDRESS"]
    assert "JAX_COORDINATOR_ADDRESS" not in os.environ, "jax would prefer it"


def test_a_cluster_that_jax_detects_wins_over_a_stale_address(monkeypatch, joined):
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
    }
    for name, value in {**slurm, "JAX_COORDINATOR_ADDRESS": "old:1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(ComposableWarning, match="JAX_COORDINATOR_ADDRESS=old:1 is not used"):
        start_processes()
    ((coordinator, *rest),) = joined
    assert coordinator.startswith("127.0.0.1:")
    assert rest == [2, 1, [1]]


@pytest.mark.parametrize(("n_processes", "process"), [(2, 2), (2, -1)])
def test_an_index_out_of_range_is_refused(n_processes, process):
    with pytest.raises(TrainingError, match="is not one of 0 to 1"):
        start_processes("localhost:1", n_processes, process)


@pytest.mark.parametrize("address", ["localhost", "localhost:x", ":1"])
def test_an_address_without_host_or_port_is_refused(address):
    with pytest.raises(TrainingError, match="is not an address"):
        meet(address, 2, 1, 1)


def test_all_processes_meet_and_free_the_address():
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(2) as threads, contextlib.ExitStack() as stack:
        others = [threads.submit(meet, address, 3, index, 10) for index in (1, 2)]
        mine = meet(address, 3, 0, 10)
        theirs = [other.result(timeout=10)[0] for other in others]
        for connection in (*mine.values(), *theirs):
            stack.enter_context(connection)
        assert sorted(mine) == [1, 2]
        for index, connection in mine.items():
            connection.sendall(b"%d" % index)
        assert [connection.recv(1) for connection in theirs] == [b"1", b"2"]
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        pass


def test_missing_processes_are_named():
    address = f"127.0.0.1:{free_port()}"

    def arrive_alone():
        with pytest.raises(PeerError, match="process 2 did not find all others"):
            meet(address, 4, 2, 1.0)

    present = threading.Thread(target=arrive_alone)
    present.start()
    with pytest.raises(PeerError, match="2 of 4 processes did not start within 1 s: 1, 3"):
        meet(address, 4, 0, 1.0)
    present.join(timeout=10)
    assert not present.is_alive()


def test_a_missing_coordinator_is_named():
    start = time.monotonic()
    with pytest.raises(PeerError, match="process 1 did not find all others"):
        meet(f"127.0.0.1:{free_port()}", 2, 1, 0.3)
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_two_processes_form_a_group():
    """jax starts at the address where they met, and only one of them is the first."""
    program = (
        "import sys, jax; from composable.parallel import is_first_process, start_processes;"
        "start_processes(sys.argv[1], 2, int(sys.argv[2]), init_timeout=60);"
        "print(jax.process_count(), jax.device_count(), is_first_process())"
    )
    address = f"127.0.0.1:{free_port()}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(index)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in started]
    assert said == [["2", "2", "True"], ["2", "2", "False"]]
