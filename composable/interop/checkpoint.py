"""A checkpoint of another project as the tensors of a backbone, read one at a time.

Names and shapes are compared with the family's table before anything is read: each must be as
expected, and no tensor may be left over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import einops
import ml_dtypes  # noqa: F401 -- teaches NumPy the name bfloat16
import numpy as np

from composable.errors import InteropError
from composable.interface import TensorSpec
from composable.interop.families import (
    IGNORED_TENSORS,
    UNEMBED,
    find_family,
    read_config,
    rows_of,
    shape_of_axes,
    sizes_of,
)
from composable.interop.source import CheckpointSource, StoredTensor
from composable.model.config import DTYPE_NAMES, BackboneConfig


@dataclass(frozen=True)
class _Place:
    """The stored tensor that one of ours is read from, and how its axes are rearranged."""

    stored: StoredTensor
    layout: str
    sizes: dict[str, int]


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a backbone by our names, each read on access.

    Args:
        source: The files.
        tap: Number of trunk layers; by default a quarter, rounded up.
        scout_width: Hidden width of the scout that the backbone will get.
        dtype: Dtype that tensors are rounded to, "F32" or "BF16"; by default BF16 if the whole
            source is BF16, and F32 otherwise, which is exact.

    Raises:
        InteropError: For a config, name or shape that is not the family's.
    """

    def __init__(
        self,
        source: CheckpointSource,
        *,
        tap: int | None = None,
        scout_width: int = 64,
        dtype: str | None = None,
    ) -> None:
        self.source = source
        self.family = find_family(source.config.get("model_type"))
        self.cfg: BackboneConfig = read_config(
            self.family, source.config, tap=tap, scout_width=scout_width
        )
        if dtype is None:
            is_bf16 = all(stored.dtype == "BF16" for stored in source.tensors.values())
            dtype = "BF16" if is_bf16 else "F32"
        if dtype not in DTYPE_NAMES:
            raise InteropError(f"{dtype!r} is not one of {', '.join(DTYPE_NAMES)}", where="dtype")
        self.dtype = dtype
        self._places = self._match()
        sizes = sizes_of(self.cfg)
        self.specs = {
            name: TensorSpec(
                shape=shape_of_axes(place.layout.split("->")[-1], sizes), dtypes=(dtype,)
            )
            for name, place in self._places.items()
        }

    @property
    def n_bytes(self) -> int:
        """Size of the tensors as they are returned, in bytes."""
        item = {"F32": 4, "BF16": 2}[self.dtype]
        return sum(int(np.prod(spec.shape)) * item for spec in self.specs.values())

    def _match(self) -> dict[str, _Place]:
        """Find every tensor of the table in the source, and reject others."""
        sizes, left = sizes_of(self.cfg), dict(self.source.tensors)
        places = {}
        for row in rows_of(self.family, self.cfg):
            name = row.gguf if self.source.is_gguf else row.theirs
            layout = (self.source.is_gguf and row.gguf_layout) or row.layout
            expected = shape_of_axes(layout.split("->")[0], sizes)
            if name not in left:
                raise InteropError(
                    f"tensor {name!r} is missing, expected shape {list(expected)}",
                    where=self.source.name,
                )
            stored = left.pop(name)
            if stored.shape != expected:
                raise InteropError(
                    f"tensor {name!r} has shape {list(stored.shape)}, expected {list(expected)}",
                    where=self.source.name,
                )
            places[row.ours] = _Place(stored, layout, sizes)
        self._drop_copy_of_embedding(left)
        for name in sorted(left):
            if not IGNORED_TENSORS.fullmatch(name):
                raise InteropError(
                    f"tensor {name!r} of shape {list(left[name].shape)} is unknown to the family "
                    f"{self.family.name!r}",
                    where=self.source.name,
                )
        return places

    def _drop_copy_of_embedding(self, left: dict[str, StoredTensor]) -> None:
        """Accept a tied model that stores its embeddings twice, if both copies are equal."""
        embed = rows_of(self.family, self.cfg)[0]
        names = [(r.gguf if self.source.is_gguf else r.theirs) for r in (UNEMBED, embed)]
        if not self.cfg.is_tied or names[0] not in left:
            return
        output, embedding = left.pop(names[0]).read(), self.source.tensors[names[1]].read()
        if not np.array_equal(output, embedding):
            raise InteropError(
                f"tensor {names[0]!r} differs from the embeddings, though the config ties them",
                where=self.source.name,
            )

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        array = place.stored.read()
        array = array.astype(np.dtype(DTYPE_NAMES[self.dtype]), copy=False)
        if "->" not in place.layout:
            return array
        axes = set(re.findall(r"\w+", place.layout))
        sizes = {axis: size for axis, size in place.sizes.items() if axis in axes}
        return np.asarray(einops.rearrange(array, place.layout, **sizes))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_source(path: Path) -> CheckpointSource:
    """Open a checkpoint: a folder of Hugging Face files, or a GGUF file.

    Raises:
        InteropError: If it is neither, or cannot be read.
    """
    from composable.interop.gguf import open_gguf
    from composable.interop.huggingface import open_folder

    if path.is_dir():
        return open_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return open_gguf(path)
    if not path.exists():
        raise InteropError("no such file or folder", where=str(path))
    raise InteropError(
        "expected a folder with config.json and safetensors, or a .gguf file", where=str(path)
    )
