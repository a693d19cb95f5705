"""Multi-process start-up and the device mesh.

Three axes, always present, so that the same program runs everywhere: `data` replicates parameters,
`fsdp` splits them along the model width and gathers them on use, `tensor` splits heads, hidden
units and vocabulary. On one device all three have size 1.
"""

from __future__ import annotations

import math
import os
from typing import Final

import jax
from jax.sharding import Mesh

from composable.errors import TrainingError

AXES: Final = ("data", "fsdp", "tensor")


def start_processes() -> None:
    """Join the other processes of a multi-host run, if this is one.

    On TPU pods and under Slurm jax finds its peers alone; elsewhere set COMPOSABLE_COORDINATOR
    (host:port), COMPOSABLE_PROCESSES and COMPOSABLE_PROCESS (index) for every process. Without
    them this does nothing. Call it before anything else touches jax.

    Raises:
        TrainingError: If only some of the three variables are set.

    Example:
        >>> start_processes()  # one process: nothing to join
    """
    names = ("COMPOSABLE_COORDINATOR", "COMPOSABLE_PROCESSES", "COMPOSABLE_PROCESS")
    values = [os.environ.get(name) for name in names]
    if not any(values):
        return
    coordinator, n_processes, process = values
    if coordinator is None or n_processes is None or process is None:
        missing = [name for name, value in zip(names, values, strict=True) if value is None]
        raise TrainingError(
            f"{', '.join(missing)} not set", hint=f"a multi-process run needs all of {names}"
        )
    jax.distributed.initialize(coordinator, int(n_processes), int(process))


def make_mesh(*, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Return a mesh over all devices; `data` takes what the other two axes leave.

    Args:
        fsdp: Devices that share one copy of the parameters.
        tensor: Devices that split one layer's heads and hidden units.

    Raises:
        TrainingError: If the devices do not divide evenly.

    Example:
        >>> mesh = make_mesh()
        >>> mesh.axis_names
        ('data', 'fsdp', 'tensor')
    """
    n_devices = jax.device_count()
    if min(fsdp, tensor) < 1 or n_devices % (fsdp * tensor):
        raise TrainingError(
            f"{n_devices} devices do not divide into fsdp={fsdp} times tensor={tensor}",
            where="mesh",
        )
    shape = (n_devices // (fsdp * tensor), fsdp, tensor)
    assert math.prod(shape) == n_devices
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
