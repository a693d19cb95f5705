"""From a project to its lock: resolve it, or check that an existing lock still fits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from composable.errors import IntegrityError, LockError, ResolutionError, SignatureError
from composable.packaging.install.agreement import find_differences
from composable.packaging.install.lock import LOCK_FILE, Lock, LockedExpert, LockedInterface
from composable.packaging.install.salvage import read_lock_to_keep
from composable.packaging.manifests.manifest import EXPERT_FILE, BackbonePackage, Manifest
from composable.packaging.manifests.packing import fit_interface, pack_named
from composable.packaging.project.project import PROJECT_FILE, Project, Wanted
from composable.packaging.project.sources import ProjectSource, shorten_digest
from composable.packaging.registry.locations import unpin
from composable.packaging.registry.release import Release, Signer
from composable.packaging.versions.version import Version

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface
    from composable.packaging.resolution.resolver import Resolution
    from composable.packaging.resolution.solver import Solver


def lock_project(
    project: Project,
    interface: RouterInterface | None = None,
    *,
    upgrade: bool | Collection[str] = False,
    forget: Collection[str] = (),
    exclude_newer: str | None = None,
    must_exist: Iterable[str] = (),
    solver: Solver | None = None,
    is_dry_run: bool = False,
) -> Lock:
    """Choose a version of every expert that a project needs and write `composable.lock`.

    Args:
        project: The project.
        interface: The backbone's router interface. With None, the experts' interfaces are recorded
            but not checked; callers that use the lock must check them.
        upgrade: Whether to ignore the versions in the current lock: of all packages, or of those
            named. A version that is chosen again keeps its digests.
        forget: Names whose entries in the current lock are ignored: versions and digests.
        exclude_newer: Ignore releases published after this time (RFC 3339 in UTC).
        must_exist: Names to look up first, so that a misspelled one is reported with suggestions.
        solver: The search; PubGrub by default.
        is_dry_run: Whether to leave the lock file unchanged.

    Returns:
        The lock. The file is written only if its content changes.

    Raises:
        UnknownExpertError: When one of `must_exist` does not exist.
        ResolutionError: When no versions satisfy all requirements and the policy, or the policy
            refuses the backbone; the message explains why and suggests changes.
        RegistryError: When a registry cannot be read.
        LockError: When a newer version of composable wrote the current lock.
        IntegrityError: When a registry has other content for a locked release, or lost it.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     project = Project.create(pathlib.Path(folder), "tiny-bytes")
        ...     lock_project(project).experts
        ()
    """
    if refused := find_backbone_refusal(project):
        raise ResolutionError(
            refused,
            where=PROJECT_FILE,
            hint="choose another backbone, or change [policy]",
        )
    source = ProjectSource(project, interface, exclude_newer=exclude_newer)
    before = (read_lock_to_keep(project.lock_path) or Lock()).without(forget)
    kept = {} if upgrade is True else before.versions
    source.prefetch_releases([*project.experts, *kept])
    for name in must_exist:
        source.require_releases(name)
    if not isinstance(upgrade, bool):
        kept = {name: version for name, version in kept.items() if name not in upgrade}
    lock = _resolve_lock(project, source, interface, kept, solver)
    check_unchanged(project, before, lock, source)
    if not is_dry_run:
        lock.write(project.lock_path)
    return lock


def check_unchanged(project: Project, before: Lock, after: Lock, source: ProjectSource) -> None:
    """Check that a new lock agrees with the previous one on every release that both could have.

    Published releases do not change and do not disappear. A registry that has other content for a
    locked version, or no longer lists it and offers an older one, is damaged, restored from an old
    copy or malicious. An expert that is to come from another source than before is not compared.

    Raises:
        IntegrityError: With the digests of both, and how to accept what the registry has now.
    """
    changes: dict[str, str] = {}
    unsigned: list[str] = []
    for old in before.experts:
        if old.registry is None or old.name not in after:
            continue
        new = after[old.name]
        place = unpin(before.registries[old.registry])
        if new.registry is None or (
            new.registry != old.registry and unpin(after.registries[new.registry]) != place
        ):
            continue
        if old.signer is not None and new.signer is None:
            unsigned.append(old.name)
        if new.version == old.version:
            for file in sorted(old.digests.keys() | new.digests.keys(), key=_manifest_first):
                locked, found = old.digests.get(file), new.digests.get(file)
                if locked != found:
                    changes[old.name] = (
                        f"{old.name} {old.version} has other content than when it was locked: "
                        f"the digest of {file} was {locked}, is {found}"
                    )
                    break
        elif new.version < old.version and _is_lost(project, old, source):
            changes[old.name] = (
                f"{old.name} {old.version} is locked, but its registry no longer lists it; the "
                f"newest release that fits is {new.version}"
            )
    is_project = project.path.is_file()
    if unsigned:
        raise SignatureError(
            f"{', '.join(unsigned)}: signed when it was locked, and its registry is unsigned now",
            kind="unsigned",
            where=LOCK_FILE if is_project else str(project.lock_path),
            hint="somebody removed the signatures: ask the operator of the registry; to accept it, "
            + f"run `composable lock {' '.join(f'--forget {name}' for name in unsigned)}`",
        )
    if changes:
        names = " ".join(f"--forget {name}" for name in changes)
        raise IntegrityError(
            "; ".join(changes.values()) + ". Published releases cannot change: the registry was "
            "restored from an old copy, damaged or tampered with",
            where=LOCK_FILE if is_project else str(project.lock_path),
            hint="find out why; to accept what the registry has now, "
            + (f"run `composable lock {names}`" if is_project else "remove that lock file"),
        )


def _manifest_first(file: str) -> tuple[bool, str]:
    return (file != EXPERT_FILE, file)


def _is_lost(project: Project, old: LockedExpert, source: ProjectSource) -> bool:
    """Return whether a locked release that the project still allows is gone from its registry."""
    wanted = project.experts.get(old.name, Wanted())
    listed = {release.version for release in source.releases(old.name)}
    return old.version not in listed and wanted.constraint.contains(old.version)


def _resolve_lock(
    project: Project,
    source: ProjectSource,
    interface: RouterInterface | None,
    kept: Mapping[str, Version],
    solver: Solver | None,
) -> Lock:
    """Return the lock of a project; of the versions that satisfy it, those in `kept` come first."""
    from composable.packaging.resolution.resolver import (
        resolve_from,  # here: a project in sync needs no resolver
    )

    resolution = resolve_from(
        source,
        project.requirements,
        interface=None if interface is None else {interface.name: Version(interface.version)},
        locked=kept,
        solver=solver,
    )
    releases = [source.release(name, version) for name, version in resolution.packages.items()]
    signers = source.verify_releases(releases)
    experts = [
        _lock_expert(project, source, release, resolution, signers.get(release.name))
        for release in releases
    ]
    used = sorted({expert.registry for expert in experts if expert.registry is not None})
    return Lock(
        interface=None if interface is None else _lock_interface(interface),
        registries={name: source.locate_registry(name) for name in used},
        experts=tuple(experts),
    )


def _lock_expert(
    project: Project,
    source: ProjectSource,
    release: Release,
    resolution: Resolution,
    signer: Signer | None,
) -> LockedExpert:
    wanted = project.experts.get(release.name, Wanted())
    wanted_by = []
    for dependent, range_ in resolution.wanted_by[release.name]:
        version = resolution.packages[dependent.partition("[")[0]] if dependent else None
        wanted_by.append(f"{f'{dependent} {version}' if dependent else PROJECT_FILE}: {range_}")
    extras = resolution.extras.get(release.name, ())
    return LockedExpert(
        name=release.name,
        version=release.version,
        registry=None if wanted.path else project.registry_of(release.name),
        path=wanted.path,
        is_editable=wanted.is_editable,
        manifest=None if wanted.is_editable else release.manifest,
        interface=release.interface.digest,
        requires=release.requires,
        extras={extra: release.extras[extra] for extra in extras},
        license=source.find_license(release),
        wanted_by=tuple(wanted_by),
        files=() if wanted.is_editable else release.files,
        signer=signer,
        release=None if wanted.path else release,
    )


def check_lock(project: Project, lock: Lock, interface: RouterInterface | None = None) -> None:
    """Check that a lock still satisfies its project.

    Args:
        project: The project.
        lock: Its lock.
        interface: The backbone's router interface, if it is known.

    Raises:
        LockError: With the first difference.
    """

    def refuse(message: str) -> None:
        raise LockError(message, where=LOCK_FILE, hint="run `composable lock`")

    versions = lock.versions
    for requirement in project.requirements:
        version = versions.get(requirement.name)
        if version is None:
            refuse(f"{requirement.name} is required but not locked")
        elif not requirement.constraint.contains(version):
            refuse(f"{requirement} is required, but {version} is locked")
        elif set(lock[requirement.name].extras) != set(requirement.extras):
            refuse(f"the required extras of {requirement.name} are not those that are locked")
    for expert in lock.experts:
        for need in expert.needs:
            if need.name not in versions or not need.constraint.contains(versions[need.name]):
                refuse(f"{expert.name} {expert.version} requires {need}: not in the lock")
        wanted = project.experts.get(expert.name, Wanted())
        if (wanted.path, wanted.is_editable) != (expert.path, expert.is_editable):
            refuse(f"{expert.name} no longer comes from {expert.origin}")
        if expert.path is not None:
            if not _is_as_locked(project, expert, lock, interface):
                refuse(f"{expert.name} in {expert.path} has changed since it was locked")
        elif project.registry_of(expert.name) != expert.registry:
            refuse(f"{expert.name} is no longer bound to registry {expert.registry!r}")
        if interface is not None and not interface.honours_digest(expert.interface or ""):
            refuse(
                f"{expert.name} {expert.version} was trained against router interface "
                f"{shorten_digest(expert.interface)}, which {interface.name} {interface.version} "
                "does not honour"
            )
        if project.policy.must_be_signed and expert.registry and expert.signer is None:
            refuse(
                f"{expert.name} {expert.version} is not signed, as [policy] in {PROJECT_FILE} "
                "requires"
            )
        if refused := project.policy.find_refusal(expert.license):
            refuse(f"{expert.name} {expert.version} {refused.reason}")
    if backbone_refused := find_backbone_refusal(project):
        refuse(backbone_refused)
    needed = list(project.experts)
    for name in needed:
        needed.extend(need.name for need in lock[name].needs if need.name not in needed)
    for name in versions:
        if name not in needed:
            refuse(f"{name} is locked but no longer required")
    for name, location in lock.registries.items():
        if project.registries.get(name) not in (location, unpin(location)):
            refuse(f"registry {name!r} is no longer at {location!r}")


def describe_signers(before: Lock | None, after: Lock) -> list[str]:
    """Return, as sentences, who signs what in a new lock that nobody or another signed before.

    A registry is named once, when the first lock with it is written.

    Args:
        before: The previous lock, if there was one.
        after: The new lock.
    """
    old = before or Lock()
    lines = []
    for name in sorted(after.registries.keys() - old.registries.keys()):
        experts = [expert for expert in after.experts if expert.registry == name]
        if not any(expert.signer for expert in experts):
            lines.append(
                f"registry {name!r} is unsigned: whoever can write to it can change what it offers"
            )
    for expert in after.experts:
        if expert.name not in old or expert.signer is None:
            continue
        signed = old[expert.name].signer
        if signed is not None and signed != expert.signer:
            new_key = expert.signer.publisher == signed.publisher
            lines.append(
                f"{expert.name} {expert.version} is signed by {expert.signer.publisher}"
                + (" with another key" * new_key)
                + f" ({expert.signer.key}); {old[expert.name].version} was signed by "
                + (f"{signed.key}" if new_key else f"{signed.publisher} ({signed.key})")
            )
    return lines


def find_backbone_refusal(project: Project) -> str | None:
    """Return why the policy of a project refuses its backbone, as a sentence; None if it does not.

    Raises:
        PackagingError: When the backbone cannot be read.
    """
    if project.policy.licenses is None:
        return None
    from composable.packaging.manifests.backbone_folder import (
        find_backbone,  # here: only a policy asks for the licence of a backbone
    )

    package = BackbonePackage.read(find_backbone(project.backbone, project.root))
    refusal = project.policy.find_refusal(package.license)
    return refusal and f"the backbone {package.name} {package.version} {refusal.reason}"


def _is_as_locked(
    project: Project, expert: LockedExpert, lock: Lock, interface: RouterInterface | None
) -> bool:
    """Return whether an expert's folder matches the lock; of an editable one, only its manifest."""
    folder = project.folder_of(expert.name)
    assert folder is not None
    if not expert.is_editable:
        return pack_named(folder, expert.name, interface).digest == expert.manifest
    manifest = Manifest.read(folder)
    if interface is not None:
        manifest = fit_interface(manifest, interface)
    return not any(find_differences(manifest, expert, lock))


def _lock_interface(interface: RouterInterface) -> LockedInterface:
    return LockedInterface(
        name=interface.name, version=Version(interface.version), digest=interface.digest
    )
