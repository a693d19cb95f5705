"""Modules to named arrays and back: attribute paths are the on-disk names."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from composable.errors import ModelError

# Names of dtypes as tensor files spell them.
_NUMPY_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}


def to_tensors(module: nnx.Module, dtype: str = "F32") -> dict[str, np.ndarray]:
    """Return a module's variables by dotted attribute path.

    Args:
        module: Any module.
        dtype: "F32" or "BF16", what floating-point variables are rounded to; integers stay.
    """
    return {
        ".".join(map(str, path)): _to_host(np.asarray(variable[...]), dtype)
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }


def _to_host(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(_NUMPY_DTYPES[dtype]) if array.dtype.kind == "f" else array


def load_tensors(module: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Set a module's variables from named arrays, in float32.

    Args:
        module: Module with the structure that the names describe; changed in place.
        tensors: One array for every variable, and no others.

    Raises:
        ModelError: For a missing or unknown name, or another shape.
    """
    state = nnx.state(module)
    variables = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    for name in variables.keys() ^ tensors.keys():
        problem = "is missing" if name in variables else "is not a variable of this module"
        raise ModelError(f"tensor {name!r} {problem}")
    for name, variable in variables.items():
        array = tensors[name]
        if array.shape != variable[...].shape:
            raise ModelError(
                f"tensor {name!r} has shape {array.shape}, expected {variable[...].shape}"
            )
        is_integer = np.issubdtype(array.dtype, np.integer)
        variable[...] = jnp.asarray(array if is_integer else array.astype(np.float32))
    nnx.update(module, state)
