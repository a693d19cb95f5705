"""Loads expert packages into pluggable parts and writes them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone
from composable.errors import IntegrityError
from composable.files.blobs import digest_file
from composable.files.safetensors import read_tensors, write_tensors
from composable.interface import body_signature, scout_signature
from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.model.model import Pluggable
from composable.model.tensors import from_tensors, to_tensors
from composable.packaging.manifests.manifest import BODY_FILE, SCOUT_FILE, Manifest
from composable.packaging.manifests.packing import fit_interface


def make_expert(backbone: Backbone, manifest: Manifest, seed: int | None = 0) -> Expert:
    """Return an untrained expert of the kind that a manifest describes.

    Args:
        backbone: Its backbone.
        manifest: Its manifest.
        seed: Seed of its weights; None where only shapes are needed.
    """
    return Expert(
        backbone,
        kind=manifest.body.kind,
        rank=manifest.body.rank,
        scout_width=manifest.scout_width,
        rngs=None if seed is None else nnx.Rngs(seed),
    )


def load_expert(loaded: LoadedBackbone, folder: Path) -> Pluggable:
    """Load an expert package for a backbone; every tensor is checked before it is used.

    Args:
        loaded: Its backbone.
        folder: The package.

    Raises:
        ManifestError: If its manifest is bad.
        InterfaceError: If it was trained against an interface that this backbone does not honour.
        IntegrityError: If its files do not match its manifest.
        TensorFileError: If its tensors do not match the interface.
    """
    manifest = Manifest.read(folder)
    fit_interface(manifest, loaded.interface)
    for file in manifest.files:
        _check_digest(folder / file.name, file.digest)
    body_spec = body_signature(loaded.interface, manifest.body.kind, manifest.body.rank)
    scout_spec = scout_signature(loaded.interface, manifest.scout_width)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        **_prefixed("body", read_tensors(folder / BODY_FILE, body_spec)),
        **_prefixed("scout", read_tensors(folder / SCOUT_FILE, scout_spec)),
    }
    make = partial(make_expert, loaded.backbone, manifest, None)
    expert = from_tensors(nnx.eval_shape(make), tensors)
    key = key_of(manifest.digest)
    return Pluggable(name=manifest.name, body=expert.body, scout=expert.scout, key=key)


def key_of(manifest: str) -> int:
    """Return the number of an expert that settles ties: the same for a release everywhere.

    Args:
        manifest: Digest of its manifest.

    Returns:
        32 bits of it, at least 1.

    Example:
        >>> key_of("sha256:00000102" + 56 * "0")
        258
    """
    return max(1, int(manifest.removeprefix("sha256:")[:8], 16))


def save_expert(folder: Path, expert: Expert, manifest: Manifest) -> None:
    """Write an expert's tensors: body in the manifest's dtype, scout in float32."""
    write_tensors(folder / BODY_FILE, to_tensors(expert.body, manifest.body.dtype))
    write_tensors(folder / SCOUT_FILE, to_tensors(expert.scout, "F32"))


def _check_digest(path: Path, digest: str) -> None:
    found = digest_file(path)
    if found != digest:
        raise IntegrityError(
            f"the bytes have digest {found}, but the manifest lists {digest}",
            where=str(path),
            hint="run `composable verify && composable sync`, which fetches damaged files again",
        )


def _prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": array for name, array in tensors.items()}
