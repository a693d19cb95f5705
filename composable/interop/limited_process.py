"""Run programs of other people in a process with limits: chat templates, regular expressions.

What they compute cannot be bounded by reading them. The process bounds it: processor time and
memory where the system has such limits (not on Windows), and time on the clock everywhere.

Run as a program, this file reads a job from standard input and writes its result to standard
output. Neither it nor the functions that it runs import an array library, so that it starts fast.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

MAX_SECONDS: Final = 3  # of processor time, for the whole job
MAX_CLOCK_SECONDS: Final = 60.0  # also for the start of the process, on a busy machine
MAX_BYTES: Final = 1 << 29  # of address space


class StoppedError(Exception):
    """A process that was stopped at a limit; the message says at which."""


def run_limited(function: Callable[[Any], Any], job: Any) -> Any:
    """Return what a function returns, called in a process with limits.

    Args:
        function: A function at the top level of a file.
        job: Its argument, plain data; so must be what it returns.

    Raises:
        StoppedError: If the process had to be stopped.

    Example:
        >>> from composable.interop.patterns import match_all
        >>> run_limited(match_all, {"patterns": ["a+"], "names": ["a", "b"]})
        [{'a': {}}]
    """
    request = {"module": function.__module__, "function": function.__name__, "job": job}
    try:
        # -P: a file in the current folder is not imported in place of a library.
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=MAX_CLOCK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StoppedError(f"stopped after {MAX_CLOCK_SECONDS:.0f} s") from error
    if done.returncode != 0:
        raise StoppedError(
            f"stopped (exit status {done.returncode}); it may use {MAX_SECONDS} s of processor "
            f"time and {MAX_BYTES >> 20} MiB of memory"
        )
    return json.loads(done.stdout)


def _main() -> None:
    import importlib
    from pathlib import Path

    _limit_process()
    request = json.loads(sys.stdin.buffer.read())
    # The code that asked, which need not be the installed one.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    function = getattr(importlib.import_module(request["module"]), request["function"])
    sys.stdout.write(json.dumps(function(request["job"])))


def _limit_process() -> None:
    """Limit processor time and memory of this process, where the system can."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    except (ValueError, OSError):  # macOS has the name but not the limit
        return


if __name__ == "__main__":
    _main()
