"""The kernels compiled for an H100 by CUDA's own compiler, where its folder is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cuda_compiler import FOLDER, find_missing

MISSING = find_missing(FOLDER)
PROGRAM = Path(__file__).with_name("gpu_program.py")


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_trained_body_compiles_without_copies_of_weights():
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["kernels"] == 6
    assert not any(seen["copies"])
    # Kept between kernels: at most six arrays as wide as the hidden activations, and the sums.
    assert seen["temporary"] < 6 * seen["hidden"] + seen["sums"] + 2**20
