"""From a lock to an installed environment."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from composable.errors import MissingBlobError, RegistryError, SignatureError
from composable.packaging.install.agreement import check_manifest
from composable.packaging.install.download import (
    MAX_THREADS,
    BlobRequest,
    download_files,
    require_space,
    run_concurrently,
)
from composable.packaging.install.environment import Environment
from composable.packaging.install.lock import Lock, LockedExpert
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import EXPERT_FILE, Delta, Manifest
from composable.packaging.manifests.packing import describe_file
from composable.packaging.manifests.toml import MAX_TOML_BYTES
from composable.packaging.project.locking import check_lock
from composable.packaging.project.project import Project
from composable.packaging.registry.registry import Registry, parse_manifest
from composable.packaging.registry.release import MIN_DELTA_BYTES
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface


# How often a sync starts over because another process pruned a file that it needs.
MAX_ATTEMPTS: Final = 20


def sync_project(
    project: Project,
    lock: Lock | None = None,
    store: Store | None = None,
    *,
    interface: RouterInterface | None = None,
    source: Registry | None = None,
    progress: ByteProgress | None = None,
) -> Environment:
    """Download the missing files of a lock and install them as the current environment.

    Nothing is downloaded or written if the environment already matches the lock.

    Args:
        project: The project.
        lock: Its lock; by default the one in its lock file.
        store: Where files are kept; by default the user's store.
        interface: The backbone's router interface, checked against every expert if it is known.
        source: An export to read files from, instead of the registries that the lock lists.
        progress: Called with a file, bytes done and total bytes; then with `install`, experts done
            and total experts.

    Returns:
        The environment.

    Raises:
        LockError: When there is no lock, or it no longer fits the project.
        IntegrityError: When a downloaded file does not match its digest in the lock.
        UnreachableError: When a registry cannot be reached; files downloaded so far are kept.

    Example:
        >>> import pathlib, tempfile
        >>> from composable.packaging import lock_project
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = pathlib.Path(folder)
        ...     project = Project.create(root / "project", "tiny-bytes")
        ...     environment = sync_project(project, lock_project(project), Store(root / "store"))
        ...     environment.manifests()
        []
    """
    if lock is None:
        lock = Lock.read(project.root)
    store = store or Store()
    check_lock(project, lock, interface)
    environment = project.environment
    if environment.holds(lock):
        environment.settle()
        return environment
    store.register(project.root)
    for attempt in range(MAX_ATTEMPTS):
        try:
            fetch_missing(project, lock, store, source=source, progress=progress)
            environment.install(lock, store, progress=progress)
            break
        except MissingBlobError:  # pruned by another process after it was fetched
            if attempt == MAX_ATTEMPTS - 1:
                raise
    return environment


def fetch_missing(
    project: Project,
    lock: Lock,
    store: Store,
    *,
    source: Registry | None = None,
    progress: ByteProgress | None = None,
) -> None:
    """Put the missing files of a lock into the store: manifests first, then the rest.

    Files that the project has installed and that are intact are not missing. Stored files are
    verified before they are used, and damaged ones are fetched again.

    Args:
        project: The project.
        lock: Its lock.
        store: Where files are kept.
        source: An export to read files from, instead of the registries that the lock lists.
        progress: Called with a file, bytes done and total bytes.

    Raises:
        IntegrityError: When a downloaded file does not match its digest in the lock.
        RegistryError: When a registry cannot be read.
    """
    intact = project.environment.intact_files()
    for digest in lock.digests() - intact.keys():
        store.check(digest)
    registries: dict[str, Registry] = {}
    missing: list[tuple[LockedExpert, Registry]] = []
    for expert in lock.experts:
        if all(digest in intact or store.has(digest) for digest in expert.digests.values()):
            continue
        folder = project.folder_of(expert.name)
        if folder is not None and source is None:
            _copy_folder(folder, expert, store)
            continue
        name = expert.registry or ""
        if source is None and name not in registries:
            registries[name] = project.open_registry(name, lock.registries.get(name))
        missing.append((expert, source or registries[name]))
    requests = [
        request
        for request in _fetch_manifests(missing, store, lock)
        if request[1].digest not in intact
    ]
    require_space(store, [file for _, file, _ in requests])
    download_files(requests, store, progress)


def _fetch_manifests(
    experts: Sequence[tuple[LockedExpert, Registry]], store: Store, lock: Lock
) -> list[BlobRequest]:
    """Put the manifests of experts into the store; return the files that they list."""
    is_remote = any(registry.storage.is_remote for _, registry in experts)
    manifests = run_concurrently(
        [partial(_fetch_manifest, expert, registry, store) for expert, registry in experts],
        n_threads=MAX_THREADS if is_remote else 1,
    )
    requests: list[BlobRequest] = []
    for (expert, registry), manifest in zip(experts, manifests, strict=True):
        check_manifest(manifest, expert, lock)
        label = f"{expert.name} {expert.version}"
        deltas = _find_deltas(expert, registry, manifest)
        for file in manifest.files:
            whole = dataclasses.replace(file, deltas=deltas.get(file.name, ()))
            requests.append((registry, whole, f"{label} {file.name}"))
    return requests


def _find_deltas(
    expert: LockedExpert, registry: Registry, manifest: Manifest
) -> Mapping[str, tuple[Delta, ...]]:
    """Return the deltas that make the files of an expert, by name; none if they are not known.

    They are in the index of a registry, since they are a matter of how it keeps a release. What
    they make is verified, so an index that cannot be read costs only bytes.
    """
    if not any(file.size >= MIN_DELTA_BYTES for file in manifest.files):
        return {}
    with contextlib.suppress(RegistryError, SignatureError):
        for release in registry.versions(expert.name):
            if release.version == expert.version and release.manifest == expert.manifest:
                return release.deltas
    return {}


def _fetch_manifest(expert: LockedExpert, registry: Registry, store: Store) -> Manifest:
    """Return the manifest of an expert, from the store if it is there."""
    assert expert.manifest is not None  # editable ones are never fetched
    what = f"{expert.name} {expert.version} {EXPERT_FILE}"
    data = store.read(expert.manifest)
    if data is None:
        _check_signature(expert, registry)
        data = registry.read_blob(expert.manifest, what, MAX_TOML_BYTES)
        store.add(data, expert.manifest)
    return parse_manifest(data, what)


def _check_signature(expert: LockedExpert, registry: Registry) -> None:
    """Check that a release which was signed when it was locked still is, by a key in charge.

    Raises:
        SignatureError: When it is not, for example since the key was revoked.
    """
    if expert.signer is None or registry.find_signatures() is None:
        return  # an export has no signatures; the lock has the digests that were signed
    for release in registry.versions(expert.name):
        if release.version == expert.version and release.manifest == expert.manifest:
            registry.verify_release(release)
            return
    raise SignatureError(
        f"{expert.name} {expert.version} is locked, but its publisher no longer signs it",
        kind="unsigned",
        where=registry.location,
        hint=f"find out why, and choose another release: `composable upgrade {expert.name}`",
    )


def _copy_folder(folder: Path, expert: LockedExpert, store: Store) -> None:
    """Put the files of an expert that comes from a folder into the store."""
    for file in expert.files:
        store.add(folder / file.name, file.digest, file.size)
    assert expert.manifest is not None
    packed = dataclasses.replace(
        Manifest.read(folder),
        files=tuple(describe_file(folder / file.name) for file in expert.files),
    )
    need = dataclasses.replace(packed.interface, digest=expert.interface)
    store.add(dataclasses.replace(packed, interface=need).to_toml().encode(), expert.manifest)
