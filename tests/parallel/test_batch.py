"""The batch split over four simulated devices: the same results, and nothing to wait for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from composable.parallel import make_mesh, split_batch, sum_over_batch

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("batch_program.py")
# A device multiplies fewer rows at a time, in blocks of another size, which rounds differently.
SAME = 1e-5


@pytest.fixture(scope="module")
def seen():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = {
        **os.environ,
        "PYTHONPATH": str(PROGRAM.parents[2]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
    }
    done = subprocess.run([sys.executable, PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["mix", "safe"])
def test_the_forward_pass_has_no_collective(seen, mode):
    assert seen[mode]["collectives"] == {}
    # What the compiler inserts when it is left alone: the count can tell the difference.
    assert seen["unsplit"]["collectives"].keys() == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("mode", ["mix", "safe", "slot_gradients"])
def test_four_devices_compute_what_one_does(seen, mode):
    assert seen[mode]["difference"] < SAME


def test_gradients_are_summed_and_nothing_else_is(seen):
    gradients = {"backbone", "expert"}
    for counts in (seen["slot_gradients"]["collectives"], *map(seen["training"].get, gradients)):
        assert counts.keys() == {"all-reduce"}


def test_isolation_holds_on_a_mesh_bit_for_bit(seen):
    assert seen["isolation"]["same_track"]
    assert seen["isolation"]["restored"]


@pytest.mark.parametrize(
    ("case", "on_a_device"), [("2 2", [1, 2]), ("2 1", [1, 4]), ("3 2", [3, 2])]
)
def test_every_device_attends_with_its_own_rows_and_heads(seen, case, on_a_device):
    """Dimensions that do not divide are whole on each, and gradients are then exchanged."""
    found = seen["heads"][case]
    assert found["difference"] < SAME
    assert found["collectives"].keys() == (set() if case == "2 2" else {"all-reduce"})
    rows, _, n_heads, _ = found["on_a_device"]
    assert [rows, n_heads] == on_a_device


def test_contributions_are_counted_over_all_devices(seen):
    n_slots, n_tokens, most = 2, 8 * 16, 2
    made = sum(seen["isolation"]["made"])
    assert n_slots * n_tokens < made <= n_slots * n_tokens * most


def test_without_a_mesh_it_is_a_plain_call(tiny):
    tokens_BT = tiny.tokens()
    assert split_batch(lambda shared, x_BT: (shared, x_BT), "any", tokens_BT) == ("any", tokens_BT)
    assert sum_over_batch(tokens_BT) is tokens_BT


def test_on_one_device_it_is_a_plain_call(tiny):
    tokens_BT = tiny.tokens()
    with jax.set_mesh(make_mesh()):
        assert split_batch(lambda shared, x_BT: x_BT, None, tokens_BT) is tokens_BT
