"""Whether disk and memory can hold a model, checked before it is read.

The check is against running out halfway; the figures are lower bounds.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import numpy as np

from composable.errors import InteropError
from composable.interop.checkpoint import Checkpoint
from composable.model.config import DTYPE_NAMES, BackboneConfig


def require_capacity(checkpoint: Checkpoint, out: Path, cfg: BackboneConfig) -> None:
    """Refuse a model that does not fit on disk or in memory, before its weights are read.

    Args:
        checkpoint: The model.
        out: Where its weights will be written; need not exist yet.
        cfg: The backbone that it becomes, with the type that it computes in.

    Raises:
        InteropError: If it does not fit, with the bytes needed and those available.
    """
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if checkpoint.n_bytes > free:
        raise InteropError(
            f"the weights take {checkpoint.n_bytes:,} bytes, but {free:,} are free on disk",
            where=str(out),
        )
    item = np.dtype(DTYPE_NAMES[cfg.dtype]).itemsize
    needed = sum(math.prod(spec.shape) for spec in checkpoint.specs.values()) * item
    # A model in use has its slots twice: in the backbone, and as the bank's first entry.
    needed += len(cfg.slots) * 3 * cfg.d_model * cfg.d_ff * item
    available = available_memory()
    if available is not None and needed > available:
        raise InteropError(
            f"the model takes {needed:,} bytes of memory in {cfg.dtype}, but {available:,} are "
            "available",
            where=checkpoint.source.name,
            hint="--compute-dtype BF16 halves it" if cfg.dtype == "F32" else None,
        )


def available_memory() -> int | None:
    """Return the bytes of memory that are available, or None if that is unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError):
        return None
