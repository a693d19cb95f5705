"""Whether a name and a version are the caller's to publish, and what was published before."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from composable.interface import RouterInterface
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.registry.compatibility import choose_previous
from composable.packaging.registry.registry import parse_manifest
from composable.packaging.versions.names import confusable_key
from composable.packaging.versions.version import Version
from composable.server import documents, rules
from composable.server.accounts import Caller, is_owner
from composable.server.refusal import RefusedError
from composable.server.tables import Backbone, Owner, Package, Release


def check_claim(session: Session, caller: Caller, manifest: Manifest) -> None:
    """Refuse what the caller may not publish under this name and version."""
    package = session.scalar(select(Package).where(Package.name == manifest.name))
    if package is None:
        theirs = select(Owner.package_id).where(Owner.account_id == caller.account)
        others = session.scalars(select(Package.name).where(Package.id.not_in(theirs)))
        rules.check_new_name(manifest.name, others)
        key = confusable_key(manifest.name)
        same = session.scalar(select(Package.name).where(Package.key == key))
        if same is not None:
            raise RefusedError(409, f"{manifest.name!r} looks like {same!r}, which is taken")
        return
    if package.removal is not None:
        raise RefusedError(410, f"{manifest.name!r} was taken down; the name is not used again")
    if not is_owner(session, caller.account, package):
        raise RefusedError(403, f"{manifest.name!r} belongs to somebody else")
    release = _find_release(session, package, manifest.version)
    if release is not None and release.row["manifest"] != manifest.digest:
        raise RefusedError(
            409,
            f"{manifest.name} {manifest.version} is already published with other content",
            hint="published releases cannot change: increase the version",
        )
    if release is not None and release.state == documents.REMOVED:
        raise RefusedError(410, f"{manifest.name} {manifest.version} was taken down")


def find_published(session: Session, caller: Caller, manifest: Manifest) -> Release | None:
    """Return the release if the caller owns it and it has the same content."""
    package = session.scalar(select(Package).where(Package.name == manifest.name))
    if package is None or not is_owner(session, caller.account, package):
        return None
    release = _find_release(session, package, manifest.version)
    if release is None or release.state == documents.REMOVED:
        return None
    return release if release.row["manifest"] == manifest.digest else None


def find_previous(session: Session, manifest: Manifest) -> Manifest | None:
    """Return the manifest of the release before, to compare with."""
    rows = session.scalars(
        select(Release)
        .join(Package)
        .where(Package.name == manifest.name, Release.state != documents.REMOVED)
    ).all()
    listed = {row.id: documents.to_listed(row) for row in rows}
    before = choose_previous(listed.values(), manifest.version)
    if before is None or any(r.version == manifest.version for r in listed.values()):
        return None
    row = next(row for row in rows if listed[row.id] is before)
    return parse_manifest(row.manifest.encode(), EXPERT_FILE)


def find_interface(session: Session, manifest: Manifest) -> RouterInterface | None:
    """Return an interface that honours the manifest's digest, if the registry knows one."""
    rows = session.scalars(select(Backbone).where(Backbone.name == manifest.interface.name))
    for row in rows:
        interface = RouterInterface.from_json(row.interface, f"{row.name} {row.version}")
        if interface.digest == manifest.interface.digest:
            return interface
    return None


def stem_of(version: Version) -> str:
    """Return a version without build metadata, which does not distinguish two."""
    return str(version).partition("+")[0]


def _find_release(session: Session, package: Package, version: Version) -> Release | None:
    return session.scalar(
        select(Release).where(Release.package_id == package.id, Release.stem == stem_of(version))
    )
