"""Where and when a benchmark ran, in the words that all pages use."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform


def describe_environment() -> dict[str, str]:
    """Return the date, the machine, and the versions of Python and jax."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
    }
