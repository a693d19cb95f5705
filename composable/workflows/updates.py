"""The factors of a low-rank update, kept in an expert's work folder until it is published.

An expert that was trained with `--update` is its parent plus products of factors. The factors are
not part of the release: they are what `publish` makes a small delta from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from composable.errors import TensorFileError
from composable.files import atomic
from composable.files.delta import Factors
from composable.files.safetensors import TensorFile, read_header, write_tensors
from composable.interface.contract import TensorSpec
from composable.packaging.manifests.packing import REQUIRED_FILES
from composable.workflows.workspace import WORK

if TYPE_CHECKING:
    import numpy as np

UPDATE_FILE: Final = "update.safetensors"


def write_factors(folder: Path, factors: Mapping[str, Factors]) -> None:
    """Write the factors of an update.

    Args:
        folder: The expert.
        factors: Factors by name of the tensor, by name of the file.
    """
    arrays: dict[str, np.ndarray] = {}
    for file, pairs in factors.items():
        for tensor, (a_DR, b_RF) in pairs.items():
            prefix = f"{file.partition('.')[0]}.{tensor}"
            arrays |= {f"{prefix}.a": a_DR, f"{prefix}.b": b_RF}
    write_tensors(folder / WORK / UPDATE_FILE, arrays)


def remove_factors(folder: Path) -> None:
    """Remove the factors of an earlier update, if there are any."""
    atomic.remove_file(folder / WORK / UPDATE_FILE)


def read_factors(folder: Path) -> dict[str, Factors]:
    """Return the factors of an update, by name of the file; none if there are none.

    Args:
        folder: The expert.
    """
    path = folder / WORK / UPDATE_FILE
    try:
        header = read_header(path)
    except TensorFileError:
        return {}  # without them, publishing sends more, and the same release
    specs = {n: TensorSpec(shape=info.shape, dtypes=(info.dtype,)) for n, info in header.items()}
    tensors = TensorFile(path, specs)
    factors: dict[str, Factors] = {}
    for file in REQUIRED_FILES:
        start = f"{file.partition('.')[0]}."
        names = {n[len(start) : -2] for n in tensors if n.startswith(start) and n.endswith(".a")}
        factors[file] = {n: (tensors[f"{start}{n}.a"], tensors[f"{start}{n}.b"]) for n in names}
    return factors
