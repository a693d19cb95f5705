"""Verify the store, and every project that uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from composable.errors import PackagingError, SignatureError
from composable.files.blobs import digest_file
from composable.packaging.install.environment import FOLDER, Environment
from composable.packaging.install.lock import LOCK_FILE, Lock
from composable.packaging.install.store import CorruptBlob, Store
from composable.packaging.project.locking import find_backbone_refusal
from composable.packaging.project.project import PROJECT_FILE, Project
from composable.packaging.registry.locations import verify_kept_statement
from composable.packaging.registry.release import Signer
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress


@dataclass(frozen=True, kw_only=True)
class Use:
    """A file in the store that a project needs.

    Args:
        project: The folder of the project.
        file: For example `german 1.2.0 body.safetensors`.
        is_installed: Whether an installed generation has it, or else only the lock.
    """

    project: Path
    file: str
    is_installed: bool


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What `verify_everything` found; empty if nothing is damaged.

    Args:
        corrupt: The corrupt files of the store, now in quarantine.
        uses: For each digest of them, the projects whose locks list it.
        installed: The installed files that were damaged or missing, by project; now removed.
        unverified: Projects that could not be verified, with the reason.
        refused: What is installed though the project's policy refuses it, as sentences, by project.
    """

    corrupt: tuple[CorruptBlob, ...]
    uses: dict[str, list[Use]]
    installed: dict[Path, list[Path]]
    unverified: dict[Path, str]
    refused: dict[Path, list[str]]

    @property
    def projects(self) -> list[Path]:
        """The projects that need a sync, sorted."""
        used = {use.project for uses in self.uses.values() for use in uses}
        return sorted(used | self.installed.keys())


def verify_everything(
    store: Store, projects: Sequence[Path] = (), progress: ByteProgress | None = None
) -> Damage:
    """Verify every file of the store and of every project that uses it.

    Corrupt files of the store are moved to quarantine and damaged installed files are removed, so
    that the next sync of each project fetches them again. A file with several names is read once.

    Args:
        store: The store.
        projects: Further projects to verify.
        progress: Called with `verify`, files done and total files of the store or of a project.

    Raises:
        DiskError: When a file of the store cannot be read.
    """
    digests: dict[tuple[int, int], str] = {}

    def find_digest(path: Path) -> str:
        status = path.stat()
        key = status.st_dev, status.st_ino
        if key not in digests:
            digests[key] = digest_file(path)
        return digests[key]

    corrupt = store.verify(progress)
    installed: dict[Path, list[Path]] = {}
    unverified: dict[Path, str] = {}
    refused: dict[Path, list[str]] = {}
    for root in sorted({*store.projects(), *projects}):
        try:
            damaged = Environment(root / FOLDER).verify(progress, find_digest=find_digest)
            if not damaged and (found := list(find_refused(root))):
                refused[root] = found
        except PackagingError as error:
            unverified[root] = str(error).split("\n")[0]
        else:
            if damaged:
                installed[root] = damaged
    uses = find_uses(store)
    return Damage(
        corrupt=tuple(corrupt),
        uses={blob.digest: uses.get(blob.digest, []) for blob in corrupt},
        installed=installed,
        unverified=unverified,
        refused=refused,
    )


def find_refused(root: Path) -> Iterator[str]:
    """Yield what the policy of a project refuses of what it has installed, as sentences.

    Args:
        root: The folder of the project; one without a project file has no policy.

    Raises:
        PackagingError: When the project or its environment cannot be read.
    """
    if not (root / PROJECT_FILE).exists():
        return
    project = Project.read(root)
    lock = project.environment.lock
    if project.policy.must_be_signed and lock is not None:
        for expert in lock.experts:
            if expert.registry is not None and expert.signer is None:
                yield f"{expert.name} {expert.version} is not signed"
    if project.policy.licenses is None:
        return
    if refused := find_backbone_refusal(project):
        yield refused
    for manifest in project.environment.manifests():
        if refusal := project.policy.find_refusal(manifest.license):
            yield f"{manifest.name} {manifest.version} {refusal.reason}"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What `verify_signatures` found about one installed expert.

    Args:
        name: The expert.
        version: Its version.
        signer: Who signed it; None if its registry is unsigned, or if it is not signed validly.
        problem: What is wrong with its signature; None if nothing is.
    """

    name: str
    version: Version
    signer: Signer | None
    problem: PackagingError | None = None


def verify_signatures(root: Path) -> list[Checked]:
    """Verify the signed statements on what a project has installed, without a network.

    The statements and the keys are those that this machine verified and kept when it locked or
    fetched the releases. The files themselves are compared by `verify_everything`.

    Args:
        root: The folder of the project.

    Raises:
        PackagingError: When the project or its environment cannot be read.
    """
    project = Project.read(root)
    lock = project.environment.lock or Lock()
    found = []
    for expert in lock.experts:
        signer, problem = None, None
        if expert.registry is not None:
            location = lock.registries[expert.registry]
            try:
                signer = verify_kept_statement(
                    location, root, expert.name, expert.version, {**expert.digests}
                )
                if signer is None and expert.signer is not None:
                    raise SignatureError(
                        f"{expert.name} {expert.version} was signed when it was locked, and this "
                        "machine has no keys for its registry",
                        kind="incomplete",
                        where=location,
                        hint="run `composable lock`, which fetches them",
                    )
            except PackagingError as error:
                problem = error
        found.append(
            Checked(name=expert.name, version=expert.version, signer=signer, problem=problem)
        )
    return found


def find_uses(store: Store) -> dict[str, list[Use]]:
    """Return which projects need the files of a store, by digest.

    A project needs the files that its lock lists, and those of its installed generations.
    """
    uses: dict[str, list[Use]] = {}
    for root in store.projects():
        generations = [g.path for g in Environment(root / FOLDER).generations()]
        of_project: dict[str, Use] = {}
        for path in (root, *generations):
            with contextlib.suppress(PackagingError):
                for expert in Lock.read(path / LOCK_FILE).experts:
                    for file, digest in expert.digests.items():
                        name = f"{expert.name} {expert.version} {file}"
                        of_project[digest] = Use(project=root, file=name, is_installed=path != root)
        for digest, use in of_project.items():
            uses.setdefault(digest, []).append(use)
    return uses
