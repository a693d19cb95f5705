"""Rate limits: how many requests an address or a token may send.

Each replica counts its own. A bucket of tokens refills steadily, so short bursts pass.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from typing import Final

# Callers that are remembered; the one that was quiet for longest is forgotten first.
MAX_CALLERS: Final = 100_000


class RateLimit:
    """A limit on requests per minute for each caller.

    Args:
        per_minute: The limit, which is also the largest burst.

    Example:
        >>> limit = RateLimit(2)
        >>> [limit.wait_seconds("one", now=0.0) for _ in range(3)]
        [0, 0, 30]
        >>> limit.wait_seconds("other", now=0.0), limit.wait_seconds("one", now=30.0)
        (0, 0)
    """

    def __init__(self, per_minute: int) -> None:
        self._burst = float(per_minute)
        self._rate = per_minute / 60.0
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_seconds(self, caller: str, now: float | None = None) -> int:
        """Count a request; return 0 if it may pass, or else the seconds to wait.

        Args:
            caller: Who sends it: an address or the digest of a token.
            now: The time in seconds; by default that of a clock.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            left, at = self._left.pop(caller, (self._burst, now))
            left = min(self._burst, left + (now - at) * self._rate)
            passes = left >= 1.0
            self._left[caller] = (left - 1.0 if passes else left, now)
            if len(self._left) > MAX_CALLERS:
                self._left.popitem(last=False)
        return 0 if passes else math.ceil((1.0 - left) / self._rate)
