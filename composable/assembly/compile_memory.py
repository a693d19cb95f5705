"""Memory of compiled programs, and of compiling them, on CPUs.

Neither function has an effect on what a program computes, nor on other devices.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Final

import jax

_SCHEDULER: Final = "--xla_cpu_enable_concurrency_optimized_scheduler"
_COMPILED: Final = "/jax/core/compile/backend_compile_duration"
# A program that took less to compile left little memory behind.
_LONG_SECONDS: Final = 1.0


def schedule_for_memory() -> None:
    """Let XLA order the operations of this process's programs for memory, not for parallelism.

    One step of training a large backbone's expert takes two thirds of the temporary memory then:
    the gradients of all layers no longer wait for each other. It has an effect only before jax
    uses its first device, and none where `XLA_FLAGS` names the setting. As an option of a single
    program it is ignored (jax 0.10.2).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _SCHEDULER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_SCHEDULER}=false".strip()


@cache
def return_compiler_memory() -> None:
    """Return memory to the system after every long compilation of this process.

    The C library keeps what the compiler freed, as much as the model itself takes, and the peak of
    training would be that much higher.
    """
    if sys.platform == "linux":
        jax.monitoring.register_event_duration_secs_listener(_trim)


def _trim(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED and duration_secs > _LONG_SECONDS:
        # Only glibc has it.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
        trim(0)
