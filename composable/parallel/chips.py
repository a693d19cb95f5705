"""TPUs that need not be here: their devices to compile for, their memory and their peak.

Compiling needs the package `libtpu`, and no TPU.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Final

from jax.experimental import topologies

from composable.errors import TrainingError, did_you_mean

# Keeps libtpu from asking the network which TPU this machine belongs to.
_ALONE: Final = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    # Two processes may compile at a time: neither has a TPU to lock.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of TPU.

    Args:
        name: Its name in a topology.
        memory: Bytes that a program may use.
        peak_flops: Floating-point operations per second, bfloat16.
        link_bytes: Bytes per second that it exchanges with other chips.

    References:
        https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
    """

    name: str
    memory: int
    peak_flops: float
    link_bytes: float


CHIPS: Final = {
    chip.name: chip
    for chip in (
        Chip(name="v4", memory=32 << 30, peak_flops=275e12, link_bytes=300e9),
        Chip(name="v5e", memory=round(15.75 * 2**30), peak_flops=197e12, link_bytes=200e9),
        Chip(name="v5p", memory=95 << 30, peak_flops=459e12, link_bytes=600e9),
        Chip(name="v6e", memory=round(31.25 * 2**30), peak_flops=918e12, link_bytes=448e9),
    )
}


def find_chip(topology: str) -> Chip:
    """Return the kind of chip of a topology.

    Args:
        topology: Kind and shape, such as `v5e:4x4`.

    Raises:
        TrainingError: If the kind is unknown.

    Example:
        >>> find_chip("v5e:4x4").peak_flops
        197000000000000.0
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise TrainingError(
            f"{name!r} is not one of {', '.join(CHIPS)}",
            where="topology",
            hint=did_you_mean(name, CHIPS) or "give kind and shape, such as v5e:4x4",
        )
    return CHIPS[name]


def tpu_devices(topology: str) -> list[Any]:
    """Return the devices of a topology, to compile for.

    Args:
        topology: Kind and shape, such as `v5e:4x4`.

    Raises:
        TrainingError: If it is unknown, or the compiler is not installed.
    """
    find_chip(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise TrainingError(
            "the compiler for TPUs is not installed",
            where=topology,
            hint="pip install 'libtpu==0.0.42.*'",
        )
    os.environ |= {name: value for name, value in _ALONE.items() if name not in os.environ}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # libtpu raises what it likes for a shape that does not exist
        raise TrainingError(
            f"no such topology: {str(error).partition(chr(10))[0][:200]}",
            where=topology,
            hint="shapes are those of Google Cloud, such as v5e:4x4 or v5p:4x4x4",
        ) from error
    return list(found.devices)
