"""From a lock to an installed environment."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from composable.errors import IntegrityError, MissingBlobError, PackagingError
from composable.packaging.install.download import (
    MAX_AT_ONCE,
    download_files,
    require_space,
    run_at_once,
)
from composable.packaging.install.environment import Environment
from composable.packaging.install.lock import Lock, LockedExpert
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.manifests.packing import describe_file
from composable.packaging.manifests.toml import MAX_TOML_BYTES
from composable.packaging.project.locking import check_lock
from composable.packaging.project.project import Project
from composable.packaging.registry.registry import Registry
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface


# How often a sync fetches again what others prune meanwhile.
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
    """Fetch what a lock names and the store lacks, and make it the environment in use.

    A synced project is left as it is: nothing is fetched and nothing is written.

    Args:
        project: The project.
        lock: Its lock; by default the one in its lock file.
        store: Where files are kept; by default the user's store.
        interface: The backbone's router interface, checked against every expert if it is known.
        source: Where files come from instead of the registries that the lock names: an export.
        progress: Called with a file, bytes done and bytes in all, and with `install` and experts.

    Returns:
        The environment.

    Raises:
        LockError: When there is no lock, or it no longer fits the project.
        IntegrityError: When a registry sends other bytes than the lock promises.
        UnreachableError: When a registry cannot be reached; what has arrived is kept.
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
        except MissingBlobError:  # pruned in between
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
    """Put every file of a lock into the store that is not there: manifests first, then the rest.

    What is there and not yet in use by the project is read again, for disks forget; damaged files
    are fetched anew.

    Raises:
        IntegrityError: When a registry sends other bytes than the lock promises.
        RegistryError: When a registry cannot answer.
    """
    for digest in lock.digests() - _digests_in_use(project):
        store.check(digest)
    registries: dict[str, Registry] = {}
    fetched: list[tuple[LockedExpert, Registry]] = []
    for expert in lock.experts:
        if all(store.has(digest) for digest in expert.digests.values()) and all(
            store.has(file.digest, file.size) for file in expert.files
        ):
            continue
        folder = project.folder_of(expert.name)
        if folder is not None and source is None:
            _copy_folder(folder, expert, store)
            continue
        name = expert.registry or ""
        if source is None and name not in registries:
            registries[name] = project.open_registry(name)
        fetched.append((expert, source or registries[name]))
    is_remote = any(registry.storage.is_remote for _, registry in fetched)
    manifests = run_at_once(
        [partial(_fetch_manifest, expert, registry, store) for expert, registry in fetched],
        n_at_once=MAX_AT_ONCE if is_remote else 1,
    )
    wanted = []
    for (expert, registry), manifest in zip(fetched, manifests, strict=True):
        if set(manifest.files) != set(expert.files):
            raise IntegrityError(
                f"the manifest of {expert.name} {expert.version} lists other files than the lock",
                where=registry.location,
                hint="the registry is damaged or dishonest; nothing was installed",
            )
        label = f"{expert.name} {expert.version}"
        wanted += [(registry, file, f"{label} {file.name}") for file in manifest.files]
    require_space(store, [file for _, file, _ in wanted])
    download_files(wanted, store, progress)


def _digests_in_use(project: Project) -> set[str]:
    try:
        return project.environment.lock.digests()
    except PackagingError:
        return set()  # a damaged pointer, which installing mends


def _fetch_manifest(expert: LockedExpert, registry: Registry, store: Store) -> Manifest:
    """Return the manifest of an expert from the store, where it is put if it is not there."""
    assert expert.manifest is not None  # editable ones are never fetched
    what = f"{expert.name} {expert.version} {EXPERT_FILE}"
    data = store.read(expert.manifest)
    if data is None:
        data = registry.read_blob(expert.manifest, what, MAX_TOML_BYTES)
        store.add(data, expert.manifest)
    return Manifest.loads(data.decode(errors="replace"), what)


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
