"""How a machine treats the signatures of a registry: where its keys are, and what it accepts."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SignatureSettings:
    """How this machine treats the signatures of a registry.

    Args:
        state: Folder of this machine for the pinned root keys and what was verified with them.
        keys: Folder of the keys to sign with; None for the user's.
        is_required: Whether an unsigned registry is refused.
        max_stale: How long after their end signatures are still accepted.
        is_offline: Whether only what was verified before is used, however old.
        now: The time; None for that of this machine.
    """

    state: Path
    keys: Path | None = None
    is_required: bool = False
    max_stale: datetime.timedelta = datetime.timedelta()
    is_offline: bool = False
    now: Callable[[], datetime.datetime] | None = None
