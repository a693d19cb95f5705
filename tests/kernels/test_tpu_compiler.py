"""The kernels compiled for TPUs, by the TPU's own compiler: `make parity` installs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

PROGRAM = Path(__file__).with_name("tpu_program.py")


@pytest.fixture(scope="module")
def seen():
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_bodies_compile_whole_and_in_pieces(seen, chip):
    """Forward and backward: fused, and for a body that is too large for the chip's memory.

    Forward alone, such a body is one kernel.
    """
    assert seen[chip]["fused"]["kernels"] == 2
    assert seen[chip]["in pieces"]["kernels"] == 5
    assert seen[chip]["forward"]["kernels"] == 1
    for name in ("forward", "by columns"):
        assert seen[chip][name]["copies"] == 0, "matrices are copied before the kernel"


@pytest.mark.parametrize("body", ["fused", "in pieces", "forward"])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_compiled_program_multiplies_each_row_by_its_own_expert_only(seen, chip, body):
    """Blocks not in use are in XLA's count and not in the kernel's work."""
    assert 1 <= seen[chip][body]["flops"] < 1.1


def test_the_forward_pass_on_four_chips_has_no_collective(seen):
    assert seen["v5e"]["mix on four"] == {}


def test_rows_travel_to_a_shared_bank_and_nothing_else_does(seen):
    """There and back in each of two slots; all devices get two tables of four numbers."""
    found = seen["v5e"]["shared bank"]
    n_slots, n_rows, width = 2, 16, 32
    assert found.pop("ragged-all-to-all") == [2 * n_slots, 2 * n_slots * n_rows * width * 4]
    assert sum(size for _, size in found.values()) == 2 * 4 * 4


def test_attention_of_a_training_step_is_a_kernel_that_is_not_run_again(seen):
    """Three layers in two loops, trunk and slots, with rows and heads split over four chips."""
    found = seen["v5e"]["splash"]
    assert found["kernels"] == ["dkv", "dkv", "fwd", "fwd"]
    assert found["scores"] == 0 < seen["v5e"]["scores"]  # those of the portable path
    # Two heads of a row on a chip; seven products over the pairs of three blocks of four.
    assert found["flops"] == 3 * 2 * 7 * 2 * 64 * (3 * 512 * 512)
