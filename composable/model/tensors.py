"""Modules to named arrays and back: attribute paths are the on-disk names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.errors import ModelError
from composable.model.config import DTYPE_NAMES

M = TypeVar("M", bound=nnx.Module)


def to_tensors(module: nnx.Module, dtype: str = "F32") -> dict[str, np.ndarray]:
    """Return a module's variables by dotted attribute path.

    Args:
        module: Any module.
        dtype: "F32" or "BF16", the type to round floating-point variables to; integers stay.
    """

    def to_host(array: np.ndarray) -> np.ndarray:
        is_integer = np.issubdtype(array.dtype, np.integer)
        return array if is_integer else array.astype(jnp.dtype(DTYPE_NAMES[dtype]), copy=False)

    flat = nnx.to_flat_state(nnx.state(module))
    return {_name(path): to_host(np.asarray(variable[...])) for path, variable in flat}


def shapes_of(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's variables by name.

    Args:
        module: Any module, such as one without arrays, from `nnx.eval_shape`.
    """
    flat = nnx.to_flat_state(nnx.state(module))
    return {_name(path): tuple(variable.get_value().shape) for path, variable in flat}


def dtypes_of(module: nnx.Module) -> dict[str, np.dtype[Any]]:
    """Return the dtypes of a module's variables by name; its argument as for `shapes_of`."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {_name(path): np.dtype(variable.get_value().dtype) for path, variable in flat}


def from_tensors(module: M, tensors: Mapping[str, np.ndarray]) -> M:
    """Return a module whose variables are the given arrays, in the dtypes that it declares.

    Args:
        module: A module of the right structure, such as one without arrays, from
            `nnx.eval_shape`; only its shapes and dtypes are used.
        tensors: One array for every variable, and no others; each is read once, so a mapping that
            reads a file on demand holds one at a time.

    Raises:
        ModelError: For a missing or unknown name, or another shape.
    """
    graph, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    names = {_name(path) for path, _ in flat}
    for name in names ^ tensors.keys():
        problem = "is missing" if name in names else "is not a variable of this module"
        raise ModelError(f"tensor {name!r} {problem}")
    filled = []
    for path, variable in flat:
        array, shape = tensors[_name(path)], tuple(variable.get_value().shape)
        if array.shape != shape:
            raise ModelError(f"tensor {_name(path)!r} has shape {array.shape}, expected {shape}")
        # Converted on the host: on the device every shape would need a program of its own.
        dtype = variable.get_value().dtype
        # Bits of bfloat16, as quantized matrices are kept.
        is_bits = dtype == np.uint16
        host = np.asarray(array, jnp.bfloat16).view(dtype) if is_bits else np.asarray(array, dtype)
        value = jax.device_put(host, may_alias=False)
        filled.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _name(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path))
