"""The same three training steps on one device, on eight, and in two processes."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("train_program.py")
REPOSITORY = PROGRAM.parents[2]
# Alone on two cores all runs take about half a minute.
TIMEOUT_SECONDS = 600
# Sums over rows, heads and widths are taken in another order; losses are about 7 nats.
SAME_LOSS = 1e-4
# Three AdamW steps of at most 1e-2 each, whose direction hangs on such sums: a parameter with a
# gradient near zero may go another way, so all but a few agree to a small part of a step.
SAME_PARAMETER = 2e-3


def start(out, fsdp, tensor, **environment):
    """Start the program with some simulated CPU devices; what it says goes to a file."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, str(PROGRAM), str(out), str(fsdp), str(tensor)]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def devices(n):
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={n}"}


def read(out):
    """Return what was seen, and the parameters."""
    with np.load(out) as loaded:
        params = {name: loaded[name] for name in loaded.files}
    return json.loads(str(params.pop("seen"))), params


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the runs: "one" device, "eight" in a cube, and "process 0" and "process 1" of two."""
    folder = tmp_path_factory.mktemp("runs")
    coordinator = f"127.0.0.1:{free_port()}"
    jobs = {"eight": (2, 2, devices(8))}
    for process in range(2):
        together = {
            "COMPOSABLE_COORDINATOR": coordinator,
            "COMPOSABLE_PROCESSES": "2",
            "COMPOSABLE_PROCESS": str(process),
        }
        jobs[f"process {process}"] = (1, 1, devices(1) | together)
    outs = {name: folder / f"{name}.npz" for name in jobs}
    started = {name: start(outs[name], f, t, **env) for name, (f, t, env) in jobs.items()}
    try:
        one = runpy.run_path(str(PROGRAM))["train"](1, 1)  # here, where there is one device
        for name, process in started.items():
            code = process.wait(timeout=TIMEOUT_SECONDS)
            assert code == 0, outs[name].with_suffix(".log").read_text()[-3000:]
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    return {"one": one, **{name: read(out) for name, out in outs.items()}}


def assert_same_training(run, reference):
    (seen, params), (expected_seen, expected) = run, reference
    np.testing.assert_allclose(seen["losses"], expected_seen["losses"], atol=SAME_LOSS)
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        close = np.isclose(params[name], array, rtol=0, atol=SAME_PARAMETER)
        assert close.mean() > 0.999, name
    assert seen["frozen"] == list(range(256)), "the class map is frozen"


def test_the_reference_learns(runs):
    losses = runs["one"][0]["losses"]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.05


def test_data_takes_the_devices_that_the_other_axes_leave(runs):
    meshes = {(fsdp, tensor): shape for fsdp, tensor, shape in runs["eight"][0]["meshes"]}
    assert len(meshes) == 10
    assert meshes[1, 1] == {"data": 8, "fsdp": 1, "tensor": 1, "expert": 1}
    assert meshes[4, 2] == {"data": 1, "fsdp": 4, "tensor": 2, "expert": 1}
    assert meshes[1, 4] == {"data": 2, "fsdp": 1, "tensor": 4, "expert": 1}


def test_eight_devices_train_what_one_does(runs):
    assert runs["eight"][0]["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}
    assert_same_training(runs["eight"], runs["one"])


@pytest.mark.parametrize(
    ("name", "whole", "shard"),
    [
        ("layers.0.ffn.w_up", (32, 64), [16, 32]),
        ("layers.1.ffn.w_down", (64, 32), [32, 16]),
        ("layers.0.attention.w_q", (32, 4, 8), [16, 2, 8]),
        ("layers.0.attention.w_k", (32, 2, 8), [16, 1, 8]),
        ("embed", (256, 32), [128, 16]),
        ("scout.w_in", (32, 16), [16, 8]),
        ("scout.w_out", (16, 256), [8, 256]),
        ("norm", (32,), [16]),
    ],
)
def test_parameters_stay_split_through_training(runs, name, whole, shard):
    seen, params = runs["eight"]
    assert params[name].shape == whole
    assert seen["shards"][name] == shard


@pytest.mark.parametrize("process", ["process 0", "process 1"])
def test_two_processes_train_what_one_does(runs, process):
    assert runs[process][0]["mesh"]["data"] == 2
    assert_same_training(runs[process], runs["one"])


def test_both_processes_end_with_the_same_bits(runs):
    for name, array in runs["process 0"][1].items():
        np.testing.assert_array_equal(runs["process 1"][1][name], array)
