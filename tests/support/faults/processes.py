"""Functions in forked processes of their own, alone or many at once.

The parent has imported what the commands need, so a process costs a fork, and thousands of kills
are affordable. Packaging never loads jax, which does not survive a fork.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final, NoReturn

# A child that takes longer hangs; SIGALRM shows where and ends it, which no fault expects.
MAX_SECONDS: Final = 600
CRASHED: Final = 70  # exit code of an exception that left the function
ACKNOWLEDGEMENTS: Final = 198  # a descriptor that nobody else has


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a process ended.

    Args:
        code: Its exit code; None when a signal ended it.
        signal: The signal that ended it; None when it exited.
        output: What it printed, standard error included.
    """

    code: int | None
    signal: int | None
    output: str

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.signal == signal.SIGKILL

    def __str__(self) -> str:
        how = f"exit {self.code}" if self.signal is None else f"signal {self.signal}"
        return f"{how}: {self.output.strip()}"


def acknowledge(text: str) -> None:
    """Note, in a traced process, that a call has returned: from here on its effect must last."""
    os.write(ACKNOWLEDGEMENTS, text.encode())


def run_forked(function: Callable[[], Any]) -> Ending:
    """Run a function in a forked process; an int that it returns is the exit code."""
    return run_together([function])[0]


def run_together(functions: Sequence[Callable[[], Any]]) -> list[Ending]:
    """Run functions in processes of their own that start at the same moment."""
    with contextlib.ExitStack() as stack:
        wait, start = os.pipe()
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in functions]
        pids = []
        for function, output in zip(functions, outputs, strict=True):
            pid = fork()
            if pid == 0:
                os.close(start)
                be_child(function, output.fileno(), lambda: os.read(wait, 1))
            pids.append(pid)
        os.close(wait)
        os.close(start)  # nobody holds it any more: all reads end at once
        return [
            end(os.waitpid(pid, 0)[1], output) for pid, output in zip(pids, outputs, strict=True)
        ]


def fork() -> int:
    """Fork this process, whose other threads, if it has any, hold nothing that a child needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def be_child(function: Callable[[], Any], output: int, prepare: Callable[[], Any]) -> NoReturn:
    """Run a function in a forked child, and leave without touching what the parent has open.

    Args:
        function: What to run.
        output: Descriptor that takes what it prints.
        prepare: Called right before.
    """
    code = CRASHED
    try:
        os.setpgid(0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGALRM, 2, chain=True)
        signal.alarm(MAX_SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), ACKNOWLEDGEMENTS)
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
        prepare()
        result = function()
        code = result if isinstance(result, int) else 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def end(status: int, output: IO[bytes]) -> Ending:
    """Return how a process ended, from its status and the file that took its output."""
    output.seek(0)
    exited = os.WIFEXITED(status)
    return Ending(
        code=os.WEXITSTATUS(status) if exited else None,
        signal=None if exited else os.WTERMSIG(status),
        output=output.read().decode(errors="replace"),
    )
