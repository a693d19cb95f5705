"""Backbone packages to models and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.errors import IntegrityError
from composable.interface import RouterInterface, TensorSpec, digest_bytes, digest_tensors
from composable.model.backbone import Backbone
from composable.model.config import BackboneConfig
from composable.model.tensors import from_tensors, shapes_of, to_tensors
from composable.model.tokenizer import ByteTokenizer
from composable.packaging import atomic
from composable.packaging.backbones import (
    ANCHOR_FILE,
    CONFIG_FILE,
    INTERFACE_FILE,
    WEIGHTS_FILE,
    find_backbone,
    read_interface,
    read_listed,
)
from composable.packaging.manifest import BACKBONE_FILE, BackbonePackage, PackageFile
from composable.packaging.tensors import read_tensors, write_tensors
from composable.packaging.version import Version
from composable.training.documents import Document, read_documents

_CLASS_MAP = "class_map"


@dataclass(frozen=True)
class BackboneRelease:
    """A backbone package in memory.

    Args:
        folder: Where it was read from.
        backbone: The frozen model.
        interface: The contract it publishes.
    """

    folder: Path
    backbone: Backbone
    interface: RouterInterface

    @property
    def anchor(self) -> list[Document]:
        """The public text that ships with it, on which vetting looks for regressions."""
        read_listed(self.folder, ANCHOR_FILE)
        return read_documents([self.folder / ANCHOR_FILE])


def load_backbone(name: str) -> BackboneRelease:
    """Load a backbone package and check that it is what its interface says.

    Args:
        name: Name of a shipped backbone, or a folder.

    Raises:
        PackagingError: If there is no such backbone, or its files are damaged.
        IntegrityError: If weights and interface do not belong together.
    """
    folder = find_backbone(name)
    interface = read_interface(folder)
    cfg = BackboneConfig.from_dict(json.loads(read_listed(folder, CONFIG_FILE)))
    read_listed(folder, WEIGHTS_FILE)
    make = partial(_make, cfg, interface.n_classes)
    expected = {name: _spec(name, shape) for name, shape in shapes_of(make).items()}
    tensors = read_tensors(folder / WEIGHTS_FILE, expected)
    for field, digest in digests(tensors, cfg).items():
        if getattr(interface, field) != digest:
            raise IntegrityError(
                f"the weights give {digest}, but the interface says {getattr(interface, field)}",
                where=f"{folder / INTERFACE_FILE}: {field}",
            )
    return BackboneRelease(folder, from_tensors(make, tensors), interface)


def save_backbone(
    folder: Path,
    backbone: Backbone,
    *,
    name: str,
    version: str,
    anchor: Sequence[Document],
    router: Mapping[str, Any],
    texts: Mapping[str, str],
    description: str,
    license_: str,
) -> RouterInterface:
    """Write a backbone package, weights rounded to bfloat16.

    Args:
        folder: Where to; made if missing.
        backbone: The trained model.
        name: Package name.
        version: Semantic version of package and interface.
        anchor: Public text for vetting.
        router: The interface's settings of the router: discount, top_k, backbone_prior,
            switch_rate, scout_max_width, lora_max_rank.
        texts: Further files by name, such as the card and README.
        description: One line for the manifest.
        license_: SPDX expression.

    Returns:
        The interface that the package publishes.
    """
    cfg = backbone.cfg
    tensors = to_tensors(backbone, "BF16")
    anchor_text = "".join(
        json.dumps({"id": doc.id, "text": doc.text}, ensure_ascii=False) + "\n" for doc in anchor
    )
    interface = RouterInterface(
        name=name,
        version=version,
        **digests(tensors, cfg),
        tokenizer=ByteTokenizer().digest,
        anchor=digest_bytes(anchor_text.encode()),
        vocab_size=cfg.vocab_size,
        n_classes=int(tensors["scout.b_out"].shape[0]),
        d_model=cfg.d_model,
        d_ff=cfg.d_ff,
        tap=cfg.tap,
        slots=cfg.slots,
        **router,
    )
    contents = {
        CONFIG_FILE: json.dumps(cfg.to_dict(), indent=2) + "\n",
        INTERFACE_FILE: interface.to_json(),
        ANCHOR_FILE: anchor_text,
        **texts,
    }
    for file, text in contents.items():
        atomic.write_text(folder / file, text)
    write_tensors(folder / WEIGHTS_FILE, tensors)
    listed = {file: (folder / file).read_bytes() for file in sorted([*contents, WEIGHTS_FILE])}
    package = BackbonePackage(
        name=name,
        version=Version(version),
        description=description,
        license=license_,
        files=tuple(
            PackageFile(name=file, size=len(data), digest=digest_bytes(data))
            for file, data in listed.items()
        ),
    )
    atomic.write_text(folder / BACKBONE_FILE, package.to_toml())
    return interface


def digests(tensors: Mapping[str, np.ndarray], cfg: BackboneConfig) -> dict[str, Any]:
    """Return the digests that an interface names: all weights, the trunk's, the class map's."""
    below = tuple(f"layers.{layer}." for layer in range(cfg.tap))
    trunk = {name: x for name, x in tensors.items() if name == "embed" or name.startswith(below)}
    class_map = np.asarray(tensors[_CLASS_MAP])
    return {
        "backbone": digest_tensors(tensors),
        "trunk": digest_tensors(trunk),
        "class_map": digest_tensors({_CLASS_MAP: class_map}),
    }


def _make(cfg: BackboneConfig, n_classes: int) -> Backbone:
    identity_V = jnp.zeros(cfg.vocab_size, jnp.int32)
    return Backbone(cfg, identity_V, n_classes, rngs=nnx.Rngs(0))


def _spec(name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(shape=shape, dtypes=("I32",) if name == _CLASS_MAP else ("BF16", "F32"))
