import os
import subprocess
import sys

import pytest

from composable.assembly import compile_memory
from composable.assembly.compile_memory import schedule_for_memory

OURS = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
THEIRS = OURS.replace("false", "true")


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, OURS), ("", OURS), ("--xla_dump_to=x", f"--xla_dump_to=x {OURS}"), (THEIRS, THEIRS)],
    ids=["unset", "empty", "other", "chosen"],
)
def test_flags_of_the_user_are_kept(monkeypatch, before, after):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if before is not None:
        monkeypatch.setenv("XLA_FLAGS", before)
    schedule_for_memory()
    assert os.environ["XLA_FLAGS"] == after


def test_xla_knows_the_setting():
    """It ends a process that sets one it does not know."""
    program = (
        "from composable.assembly.compile_memory import schedule_for_memory\n"
        "schedule_for_memory()\n"
        "import jax\n"
        "print(jax.jit(lambda x: x + 1)(1))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_memory_is_returned_after_long_compilations_only(monkeypatch):
    trimmed = []

    class Library:
        malloc_trim = trimmed.append

    monkeypatch.setattr(compile_memory.ctypes, "CDLL", lambda name: Library)
    for event, seconds in (
        ("/jax/core/compile/backend_compile_duration", 0.1),
        ("/jax/core/compile/jaxpr_trace_duration", 9.0),
        ("/jax/core/compile/backend_compile_duration", 9.0),
    ):
        compile_memory._trim(event, seconds)
    assert trimmed == [0]
