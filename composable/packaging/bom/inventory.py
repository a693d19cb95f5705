"""What a lock consists of: the backbone and the experts, with licences, digests, data and figures.

Manifests and cards are read by the digests in the lock, so the same lock gives the same inventory,
installed or not. What a card states is what its author wrote; only typed fields are taken from it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from composable.errors import IntegrityError, ManifestError, PackagingError
from composable.files.reading import read_bytes
from composable.files.records import parse_table
from composable.interface.digest import digest_bytes
from composable.packaging.install.agreement import check_manifest
from composable.packaging.install.lock import Lock, LockedExpert
from composable.packaging.install.store import Store
from composable.packaging.manifests.backbone_folder import find_backbone, read_listed
from composable.packaging.manifests.licenses import parse_license
from composable.packaging.manifests.manifest import (
    EXPERT_FILE,
    BackbonePackage,
    Manifest,
    PackageFile,
)
from composable.packaging.manifests.packing import fit_interface, pack_named
from composable.packaging.manifests.toml import MAX_TOML_BYTES
from composable.packaging.project.locking import check_lock
from composable.packaging.project.project import Project
from composable.packaging.project.queries import MAX_CARD_BYTES
from composable.packaging.registry.registry import Registry, parse_manifest
from composable.packaging.registry.release import TIME_FORMAT

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

CARD_FILE: Final = "card.json"
MAX_FIGURE: Final = 1e300
# Identifies the documents of a lock, by its digest.
_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "https://composable.invalid/bom")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a card.

    Args:
        name: What was measured, such as `bits per byte`.
        value: The figure.
        slice: On which text, and how; empty if the card does not say.
    """

    name: str
    value: float
    slice: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Data that a package was made from or measured on, as its author names it.

    Args:
        name: Its use: `training text`, `held-out text` or `sample`.
        description: The author's words; empty if there are none.
        digest: Its digest, if it is stated.
    """

    name: str
    description: str = ""
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One package of a model: the backbone or an expert.

    Args:
        name: Package name.
        version: Its version.
        kind: What it is, in words.
        license: Its licence as stated; empty if it states none.
        description: One line.
        authors: Names.
        manifest: Digest of its manifest; None for a folder in use as it is.
        files: Its files except the manifest.
        needs: Names of the packages that it needs, sorted.
        ancestors: What it was made from: releases as `NAME@VERSION`, or names of other models.
        data: What it was made from and measured on.
        metrics: Figures of its card.
        facts: Further facts by name: registry, checks, interface.
    """

    name: str
    version: str
    kind: str
    license: str
    description: str
    authors: tuple[str, ...]
    manifest: str | None
    files: tuple[PackageFile, ...]
    needs: tuple[str, ...]
    ancestors: tuple[str, ...] = ()
    data: tuple[DataSet, ...] = ()
    metrics: tuple[Metric, ...] = ()
    facts: Mapping[str, str]

    @property
    def expression(self) -> str | None:
        """Its licence as an SPDX expression; None if it states none, or something else."""
        with contextlib.suppress(ManifestError):
            return parse_license(self.license)
        return None

    @property
    def purl(self) -> str:
        """Its package URL, of the type `generic`: experts have no type of their own."""
        checksum = f"?checksum={self.manifest}" if self.manifest else ""
        return f"pkg:generic/composable/{self.name}@{quote(self.version, safe='')}{checksum}"


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a locked project consists of.

    Args:
        backbone: The backbone.
        experts: The experts, sorted by name.
        required: Names of the experts that the project itself requires, sorted.
        id: Identifies the content: the same for the same lock and backbone.
    """

    backbone: Part
    experts: tuple[Part, ...]
    required: tuple[str, ...]
    id: uuid.UUID

    @property
    def parts(self) -> tuple[Part, ...]:
        """The backbone, then the experts."""
        return (self.backbone, *self.experts)


def take_inventory(
    project: Project, lock: Lock, store: Store, interface: RouterInterface | None = None
) -> Inventory:
    """Return what a locked project consists of.

    Manifests and cards come from the store, or else from the registries; both are verified.

    Args:
        project: The project.
        lock: Its lock.
        store: The store.
        interface: The backbone's router interface, for experts that come from folders.

    Raises:
        LockError: When the lock no longer fits the project, or a manifest does not match it.
        IntegrityError: When a file does not match its digest.
        RegistryError: When a registry cannot be read.
    """
    check_lock(project, lock, interface)
    backbone = _describe_backbone(find_backbone(project.backbone, project.root))
    registries: dict[str, Registry] = {}
    experts = []
    for expert in lock.experts:
        if expert.registry is not None and expert.registry not in registries:
            registries[expert.registry] = project.open_registry(expert.registry)
        reader = _Reader(project, expert, store, registries.get(expert.registry or ""), interface)
        manifest = reader.manifest()
        check_manifest(manifest, expert, lock)
        experts.append(_describe_expert(lock, expert, manifest, reader.card(), backbone))
    identity = f"{backbone.manifest}\n{digest_bytes(lock.to_toml().encode())}"
    return Inventory(
        backbone=backbone,
        experts=tuple(experts),
        required=tuple(sorted(name for name in project.experts if name in lock)),
        id=uuid.uuid5(_NAMESPACE, identity),
    )


def read_source_date() -> str | None:
    """Return the time in `SOURCE_DATE_EPOCH`, as RFC 3339 in UTC; None if it is not set.

    Builds set it so that documents with a time are reproducible; see
    https://reproducible-builds.org/specs/source-date-epoch.

    Raises:
        PackagingError: When it is not a whole number of seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    try:
        if not text.isascii() or not text.isdigit():
            raise ValueError("not a whole number")
        time = datetime.datetime.fromtimestamp(int(text), datetime.UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise PackagingError(
            f"{text[:40]!r} is not a time in seconds since 1970",
            where="SOURCE_DATE_EPOCH",
            hint="unset it, or set it to a whole number such as 1700000000",
        ) from error
    return time.strftime(TIME_FORMAT)


class _Reader:
    """Reads the manifest and the card of one locked expert."""

    def __init__(
        self,
        project: Project,
        expert: LockedExpert,
        store: Store,
        registry: Registry | None,
        interface: RouterInterface | None,
    ) -> None:
        self._folder = project.folder_of(expert.name)
        self._expert = expert
        self._store = store
        self._registry = registry
        self._interface = interface

    def manifest(self) -> Manifest:
        """Return the manifest, as the lock has it."""
        expert = self._expert
        if self._folder is not None and expert.is_editable:
            manifest = Manifest.read(self._folder)
            return manifest if self._interface is None else fit_interface(manifest, self._interface)
        if self._folder is not None:
            return pack_named(self._folder, expert.name, self._interface)
        data = self._read(EXPERT_FILE, str(expert.manifest), MAX_TOML_BYTES)
        return parse_manifest(data, f"{expert.name} {expert.version} {EXPERT_FILE}")

    def card(self) -> dict[str, Any]:
        """Return the content of the card; empty if there is none, or it is no JSON object."""
        digest = self._expert.digests.get(CARD_FILE)
        if self._expert.is_editable:
            with contextlib.suppress(FileNotFoundError, ManifestError):
                return parse_table(
                    read_bytes((self._folder or Path()) / CARD_FILE, MAX_CARD_BYTES),
                    CARD_FILE,
                    ManifestError,
                )
        if digest is None:
            return {}
        data = self._read(CARD_FILE, digest, MAX_CARD_BYTES)
        with contextlib.suppress(ManifestError):
            return parse_table(data, CARD_FILE, ManifestError)
        return {}

    def _read(self, file: str, digest: str, limit: int) -> bytes:
        """Return a file of the expert, verified."""
        label = f"{self._expert.name} {self._expert.version} {file}"
        data = self._store.read(digest)
        if data is None and self._folder is not None:
            data = read_bytes(self._folder / file, limit)
        if data is None:
            assert self._registry is not None  # an expert comes from a folder or a registry
            return self._registry.read_blob(digest, label, limit)
        if digest_bytes(data) != digest:
            raise IntegrityError(f"{label} does not match its digest {digest}")
        return data


def _describe_expert(
    lock: Lock, expert: LockedExpert, manifest: Manifest, card: Mapping[str, Any], backbone: Part
) -> Part:
    origin = manifest.origin.base if manifest.origin else None
    made_from = (manifest.derives_from, *manifest.merges, origin)
    rank = f" of rank {manifest.body.rank}" if manifest.body.rank else ""
    source = lock.registries.get(expert.registry or "", expert.path or "")
    return Part(
        name=expert.name,
        version=str(expert.version),
        kind=f"expert: a {manifest.body.kind} body{rank} and a scout of width "
        f"{manifest.scout_width}",
        license=manifest.license,
        description=manifest.description,
        authors=manifest.authors,
        manifest=expert.manifest,
        files=tuple(sorted(expert.files, key=lambda file: file.name)),
        needs=tuple(sorted({backbone.name, *(need.name for need in expert.needs)})),
        ancestors=tuple(name for name in made_from if name),
        data=tuple(_list_data(manifest, card)),
        metrics=tuple(_list_metrics(card)),
        facts={
            "registry" if expert.registry else "folder": source,
            **({"editable": "true"} if expert.is_editable else {}),
            "interface": f"{manifest.interface.name} {manifest.interface.requires}",
            **({"interface-digest": expert.interface} if expert.interface else {}),
            **_list_checks(card),
        },
    )


def _describe_backbone(folder: Path) -> Part:
    package = BackbonePackage.read(folder)
    card: dict[str, Any] = {}
    if any(file.name == CARD_FILE for file in package.files):
        with contextlib.suppress(ManifestError):
            card = parse_table(read_listed(folder, CARD_FILE), CARD_FILE, ManifestError)
    return Part(
        name=package.name,
        version=str(package.version),
        kind="backbone",
        license=package.license,
        description=package.description,
        authors=package.authors,
        manifest=package.digest,
        files=tuple(sorted(package.files, key=lambda file: file.name)),
        needs=(),
        data=tuple(_list_data(None, card)),
        metrics=tuple(_list_metrics(card)),
        facts={},
    )


def _list_data(manifest: Manifest | None, card: Mapping[str, Any]) -> Iterator[DataSet]:
    """Yield the data that a manifest and a card name."""
    if manifest is not None and manifest.training is not None and manifest.training.data:
        yield DataSet(name="training text", description=manifest.training.data)
    recipe = _find(card, "training", "recipe")
    if isinstance(recipe, str) and recipe:
        yield DataSet(name="training text", description=recipe)
    if manifest is not None and manifest.origin is not None:
        yield DataSet(name="sample", digest=manifest.origin.sample)
    held_out = _find(card, "measured", "documents", "own_digest")
    if isinstance(held_out, str):
        yield DataSet(name="held-out text", digest=held_out)


def _list_metrics(card: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield the figures of a card that have a name in common use."""
    bits = _find(card, "measured", "bits_per_byte")
    for slice_, value in sorted(bits.items()) if isinstance(bits, Mapping) else [("", bits)]:
        if _is_finite(value):
            yield Metric(name="bits per byte", value=value, slice=str(slice_).replace("_", " "))
    loss = _find(card, "measured", "anchor_loss")
    if _is_finite(loss):
        yield Metric(name="relative loss on public text", value=loss, slice="anchor")


def _list_checks(card: Mapping[str, Any]) -> dict[str, str]:
    """Return the outcome of each check of a card, by its name."""
    checks = _find(card, "checks")
    found = {}
    for check in checks if isinstance(checks, Sequence) and not isinstance(checks, str) else ():
        name, passed = (_find(check, field) for field in ("name", "passed"))
        if isinstance(name, str) and isinstance(passed, bool):
            found[f"check:{name}"] = "passed" if passed else "failed"
    return found


def _find(table: Any, *path: str) -> Any:
    """Return what is at a path of nested tables; None if there is nothing."""
    for field in path:
        table = table.get(field) if isinstance(table, Mapping) else None
    return table


def _is_finite(value: Any) -> bool:
    """Return whether a value of a card is a figure: a JSON number may have any size."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < MAX_FIGURE
