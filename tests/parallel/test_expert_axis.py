"""A bank split over four simulated devices: the same results, wherever an expert is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("expert_program.py")
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


@pytest.mark.parametrize("bank", ["full", "both"])
def test_a_split_bank_computes_what_one_device_does(seen, bank):
    """Bodies merged into full matrices; and factors of low-rank ones beside full ones."""
    assert max(seen[bank].values()) < SAME


def test_every_device_has_its_own_entries_only(seen):
    assert set(seen["held"]) == {8 // 4}
    assert set(seen["grown"]) == {16 // 4}


def test_isolation_holds_to_the_bit_wherever_an_expert_is(seen):
    isolation = seen["isolation"]
    assert isolation["entries"] == [
        ["backbone", "a", "b", None],
        ["backbone", None, "b", "a"],
    ]
    assert isolation["changed"], "the expert between them had an effect"
    assert isolation["restored"]
    assert isolation["moved"]


def test_parts_of_different_sizes_are_exchanged_as_jax_documents_it(seen):
    """XLA for CPUs has no such operation; its documented meaning is put in its place."""
    assert seen["uneven"] == 0
