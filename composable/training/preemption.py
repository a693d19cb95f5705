"""SIGTERM, by which a cluster announces that it takes a machine back, noticed between two steps."""

from __future__ import annotations

import signal
import threading
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Notices SIGTERM while in use, in any process of the run, so that all stop at the same step.

    Outside of the main thread, which alone receives signals, it notices nothing.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._earlier: Any = None

    def __enter__(self) -> Self:
        # With many processes jax listens, and agrees on a step.
        is_main = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and is_main:
            self._earlier = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)

    def stops_after(self, step: int) -> bool:
        """Return whether the run is to stop after this step; the same in all processes.

        Args:
            step: The step that was done.
        """
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._is_asked

    def _notice(self, number: int, frame: Any) -> None:
        self._is_asked = True
