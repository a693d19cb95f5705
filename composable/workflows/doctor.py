"""What a run would use here: versions, devices, group, mesh, compiled programs, kernels."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import jax

from composable.assembly.compile_cache import use_compile_cache
from composable.kernels import describe_attention, describe_products
from composable.kernels.blocks import describe_implementation
from composable.kernels.dispatch import describe_dispatch
from composable.parallel import make_mesh

_PACKAGES: Final = (
    "composable",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
)


def describe_environment(mesh: Mapping[str, int]) -> dict[str, str]:
    """Return what a run would use here, one line for each.

    Args:
        mesh: Devices along each axis.

    Raises:
        TrainingError: If the mesh does not fit the devices.

    Example:
        >>> describe_environment({})["processes"]
        '1, this is 0'
    """
    devices, folder = jax.devices(), use_compile_cache()
    sizes = make_mesh(**mesh).shape
    return {
        "python": f"{platform.python_version()}, {platform.machine()}",
        **{name: found for name in _PACKAGES if (found := _find_version(name))},
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": f"{jax.process_count()}, this is {jax.process_index()}",
        "mesh": ", ".join(f"{axis}={size}" for axis, size in sizes.items()),
        "compiled programs": str(folder) if folder else "not kept",
        "attention": describe_attention(devices[0].platform),
        "expert bodies": describe_implementation(devices[0].platform),
        "dispatch": describe_dispatch(devices[0].platform),
        "quantized weights": describe_products(devices[0].platform),
    }


def _find_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
