"""The package as a whole: light to import, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import composable.packaging


def test_every_public_name() -> None:
    for name in composable.packaging.__all__:
        assert getattr(composable.packaging, name).__module__.startswith(
            ("composable.packaging.", "composable.files.")
        )
    with pytest.raises(AttributeError):
        _ = composable.packaging.nothing


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import composable.packaging", "numpy tomllib filelock nab_resolver"),
        (
            "from composable.packaging import Project, Lock, lock_project, sync_project, resolve",
            "numpy filelock platformdirs nab_resolver safetensors ml_dtypes",
        ),
        ("from composable.packaging import *", "numpy jax flax"),
    ],
)
def test_importing_loads_only_what_it_must(statement: str, absent: str) -> None:
    script = f"import sys\n{statement}\nprint(*[m for m in {absent.split()} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == ""
