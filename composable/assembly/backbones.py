"""Loads backbone packages into memory and writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from composable.assembly.compile_cache import use_compile_cache
from composable.assembly.compile_memory import return_compiler_memory
from composable.corpora.documents import Document, read_documents
from composable.errors import IntegrityError, ModelError
from composable.files import atomic
from composable.files.blobs import digest_file
from composable.files.records import parse_table
from composable.files.safetensors import TensorFile, write_tensors
from composable.files.text import decode_text
from composable.interface import (
    RouterInterface,
    RouterSettings,
    TensorSpec,
    digest_bytes,
    digest_tensors,
)
from composable.model.backbone import Backbone
from composable.model.config import BackboneConfig
from composable.model.model import Model, Pluggable
from composable.model.subwords import SubwordTokenizer
from composable.model.tensors import dtypes_of, from_tensors, shapes_of, to_tensors
from composable.model.tokenizer import ByteTokenizer, Tokenizer
from composable.packaging.manifests.backbone_folder import (
    ANCHOR_FILE,
    CONFIG_FILE,
    INTERFACE_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    check_listed,
    find_backbone,
    lists_file,
    read_interface,
    read_listed,
)
from composable.packaging.manifests.manifest import BACKBONE_FILE, BackbonePackage, PackageFile
from composable.packaging.versions.version import Version

_CLASS_MAP = "class_map"


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone package in memory.

    Args:
        folder: Where it was read from.
        backbone: The frozen model.
        interface: The contract it publishes.
        tokenizer: Its tokenizer.
    """

    folder: Path
    backbone: Backbone
    interface: RouterInterface
    tokenizer: Tokenizer

    @property
    def anchor(self) -> list[Document]:
        """The public text that ships with it, on which vetting checks for regressions."""
        read_listed(self.folder, ANCHOR_FILE)
        return read_documents([self.folder / ANCHOR_FILE])

    def plug(
        self,
        experts: Sequence[Pluggable] = (),
        capacity: int | None = None,
        *,
        factor_rank: int | None = None,
        mesh: Mesh | None = None,
    ) -> Model:
        """Return the model with experts plugged in; arguments as for `Model`."""
        return Model(
            self.backbone,
            self.interface,
            experts,
            capacity=capacity,
            factor_rank=factor_rank,
            tokenizer=self.tokenizer,
            mesh=mesh,
        )


def load_backbone(name: str) -> LoadedBackbone:
    """Load a backbone package and check it against the digests of its interface.

    What is compiled afterwards is kept on disk; see `compile_cache.py`.

    Args:
        name: Name of a shipped backbone, or a folder.

    Raises:
        PackagingError: If there is no such backbone, or its files are damaged.
        IntegrityError: If weights, tokenizer and interface do not belong together.
    """
    use_compile_cache()
    return_compiler_memory()
    folder = find_backbone(name)
    cfg, interface = _read_config(folder)
    check_listed(folder, WEIGHTS_FILE)
    blank = make_blank(cfg, interface.n_classes)
    dtypes = dtypes_of(blank)
    expected = {name: _spec(shape, dtypes[name]) for name, shape in shapes_of(blank).items()}
    tensors = TensorFile(folder / WEIGHTS_FILE, expected)
    tokenizer = _read_tokenizer(folder)
    for field, digest in {**digests(tensors, cfg), "tokenizer": tokenizer.digest}.items():
        if getattr(interface, field) != digest:
            raise IntegrityError(
                f"the files have {digest}, but the interface names {getattr(interface, field)}",
                where=f"{folder / INTERFACE_FILE}: {field}",
            )
    return LoadedBackbone(folder, from_tensors(blank, tensors), interface, tokenizer)


def read_config(name: str) -> tuple[BackboneConfig, RouterInterface]:
    """Return architecture and interface of a backbone package, without its weights.

    Args:
        name: Name of a shipped backbone, or a folder.

    Raises:
        PackagingError: If there is no such backbone, or these files are damaged.

    Example:
        >>> read_config("tiny-bytes")[0].n_layers
        6
    """
    return _read_config(find_backbone(name))


def _read_config(folder: Path) -> tuple[BackboneConfig, RouterInterface]:
    interface = read_interface(folder)
    config = parse_table(read_listed(folder, CONFIG_FILE), str(folder / CONFIG_FILE), ModelError)
    return BackboneConfig.from_dict(config), interface


def save_backbone(
    folder: Path,
    backbone: Backbone,
    *,
    name: str,
    version: str,
    anchor: Sequence[Document],
    router: RouterSettings,
    output_bounds: Sequence[float],
    honours: Sequence[str] = (),
    texts: Mapping[str, str],
    description: str,
    license_: str,
    tokenizer: Tokenizer | None = None,
) -> RouterInterface:
    """Write a backbone package, weights rounded to bfloat16.

    Args:
        folder: Folder to write to; created if missing.
        backbone: The trained model.
        name: Package name.
        version: Semantic version of package and interface.
        anchor: Public text for vetting.
        router: The interface's settings of the router.
        output_bounds: For every slot the largest root mean square of a body's output.
        honours: Digests of earlier interfaces whose experts plug in unchanged.
        texts: Further files by name, such as the card and README.
        description: One line for the manifest.
        license_: SPDX expression.
        tokenizer: Its tokenizer; the one for bytes by default.

    Returns:
        The interface that the package publishes.
    """
    tensors = to_tensors(backbone, "BF16")
    write_tensors(folder / WEIGHTS_FILE, tensors)
    tokenizer = tokenizer or ByteTokenizer()
    interface = make_interface(
        tensors,
        backbone.cfg,
        tokenizer,
        name=name,
        version=version,
        anchor=anchor,
        router=router,
        output_bounds=output_bounds,
        honours=honours,
    )
    describe_backbone(
        folder,
        interface,
        backbone.cfg,
        tokenizer,
        anchor=anchor,
        texts=texts,
        description=description,
        license_=license_,
    )
    return interface


def make_interface(
    tensors: Mapping[str, np.ndarray],
    cfg: BackboneConfig,
    tokenizer: Tokenizer,
    *,
    name: str,
    version: str,
    anchor: Sequence[Document],
    router: RouterSettings,
    output_bounds: Sequence[float],
    honours: Sequence[str] = (),
) -> RouterInterface:
    """Return the interface of a backbone.

    Args:
        tensors: Its weights; each is read twice, one at a time.
        cfg: Architecture.
        tokenizer: Its tokenizer.
        name: Name of package and interface.
        version: Semantic version of both.
        anchor: Public text for vetting.
        router: The interface's settings of the router.
        output_bounds: For every slot the largest root mean square of a body's output.
        honours: Digests of earlier interfaces whose experts plug in unchanged.
    """
    return RouterInterface(
        name=name,
        version=version,
        **digests(tensors, cfg),
        tokenizer=tokenizer.digest,
        anchor=digest_bytes(_anchor_text(anchor).encode()),
        vocab_size=cfg.vocab_size,
        n_classes=int(tensors["scout.b_out"].shape[0]),
        d_model=cfg.d_model,
        d_ff=cfg.d_ff,
        tap=cfg.tap,
        slots=cfg.slots,
        output_bounds=tuple(output_bounds),
        honours=tuple(honours),
        **vars(router),
    )


def describe_backbone(
    folder: Path,
    interface: RouterInterface,
    cfg: BackboneConfig,
    tokenizer: Tokenizer,
    *,
    anchor: Sequence[Document],
    texts: Mapping[str, str],
    description: str,
    license_: str,
) -> None:
    """Write the other files of a backbone package, beside existing weights.

    Args:
        folder: The package, with its weights.
        interface: The contract of these weights.
        cfg: Architecture.
        tokenizer: The tokenizer.
        anchor: Public text for vetting.
        texts: Further files by name, such as the card and README.
        description: One line for the manifest.
        license_: SPDX expression.
    """
    contents = {
        CONFIG_FILE: json.dumps(cfg.to_dict(), indent=2) + "\n",
        INTERFACE_FILE: interface.to_json(),
        ANCHOR_FILE: _anchor_text(anchor),
        **texts,
    }
    if isinstance(tokenizer, SubwordTokenizer):
        contents[TOKENIZER_FILE], contents[SPECIAL_TOKENS_FILE] = tokenizer.to_files()
    for file, text in contents.items():
        atomic.write_text(folder / file, text)
    package = BackbonePackage(
        name=interface.name,
        version=Version(interface.version),
        description=description,
        license=license_,
        files=tuple(_describe(folder / file) for file in sorted([*contents, WEIGHTS_FILE])),
    )
    atomic.write_text(folder / BACKBONE_FILE, package.to_toml())


def _anchor_text(anchor: Sequence[Document]) -> str:
    lines = ({"id": doc.id, "text": doc.text} for doc in anchor)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def digests(tensors: Mapping[str, np.ndarray], cfg: BackboneConfig) -> dict[str, Any]:
    """Return the digests that an interface names: all weights, the trunk's, the class map's."""
    below = ("embed.", *(f"layers.{layer}." for layer in range(cfg.tap)))
    trunk = [name for name in tensors if f"{name}.".startswith(below)]
    return {
        "backbone": digest_tensors(tensors),
        "trunk": digest_tensors(_Selection(tensors, trunk)),
        "class_map": digest_tensors(_Selection(tensors, [_CLASS_MAP])),
    }


class _Selection(Mapping[str, np.ndarray]):
    """Some of the arrays of a mapping, read on access."""

    def __init__(self, tensors: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_tokenizer(folder: Path) -> Tokenizer:
    if not lists_file(folder, TOKENIZER_FILE):
        return ByteTokenizer()
    definition, special = (
        decode_text(read_listed(folder, file), str(folder / file), ModelError)
        for file in (TOKENIZER_FILE, SPECIAL_TOKENS_FILE)
    )
    return SubwordTokenizer.from_files(definition, special)


def _describe(path: Path) -> PackageFile:
    """Return the size and digest of a file, read in blocks."""
    return PackageFile(name=path.name, size=path.stat().st_size, digest=digest_file(path))


def make_blank(cfg: BackboneConfig, n_classes: int) -> Backbone:
    """Return a backbone without arrays, whose variables have shapes and dtypes only.

    Args:
        cfg: Architecture.
        n_classes: Number of classes C.

    Example:
        >>> cfg, interface = read_config("tiny-bytes")
        >>> make_blank(cfg, interface.n_classes).embed.get_value().shape
        (256, 192)
    """

    def make() -> Backbone:
        identity_V = jnp.zeros(cfg.vocab_size, jnp.int32)
        return Backbone(cfg, identity_V, n_classes, rngs=None)

    blank: Backbone = nnx.eval_shape(make)
    return blank


def _spec(shape: tuple[int, ...], dtype: np.dtype[Any]) -> TensorSpec:
    """Return what a file must hold for a variable; floating-point numbers may be rounded."""
    dtypes = {"int32": ("I32",), "int8": ("I8",), "uint16": ("BF16",)}.get(
        dtype.name, ("BF16", "F32")
    )
    return TensorSpec(shape=shape, dtypes=dtypes)
