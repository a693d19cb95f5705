import subprocess
import sys

import pytest

HEAVY = ("jax", "flax", "optax", "orbax", "grain", "torch")


@pytest.mark.parametrize("modules", ["composable", "composable.interface", "composable.packaging"])
def test_importing_loads_no_jax(modules):
    program = f"import {modules}, sys; print(sorted(set({HEAVY}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_interface_needs_only_the_standard_library_until_tensors_are_hashed():
    program = "import composable.interface, sys; print('numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"
