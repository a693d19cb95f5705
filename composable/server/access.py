"""Who may see which package and which bytes.

What somebody may not see does not exist for them: the answer is 404, not 403.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, or_, select, true
from sqlalchemy.orm import Session

from composable.server import documents
from composable.server.accounts import Caller
from composable.server.refusal import missing
from composable.server.tables import File, Owner, Package, Release


def can_see(caller: Caller) -> ColumnElement[bool]:
    """Return the condition on packages that the caller may see."""
    if caller.allows("admin"):
        return true()
    if caller.account is None or "read" not in caller.scopes:
        return Package.is_private.is_(False)
    theirs: ColumnElement[bool] = Package.id.in_(
        select(Owner.package_id).where(Owner.account_id == caller.account)
    )
    if caller.packages:
        theirs = and_(theirs, Package.name.in_(caller.packages))
    return or_(Package.is_private.is_(False), theirs)


def find_package(session: Session, caller: Caller, name: str) -> Package:
    """Return a package that the caller may see.

    Raises:
        RefusedError: 404 when there is none.
    """
    package = session.scalar(select(Package).where(Package.name == name, can_see(caller)))
    if package is None:
        raise missing(f"package {name[:64]!r}")
    return package


def can_see_release(caller: Caller) -> ColumnElement[bool]:
    """Return the condition on releases, joined with packages, that the caller may see."""
    shown = Release.state == documents.PUBLISHED
    if caller.allows("admin") or caller.allows("vet"):
        return Release.state != documents.REMOVED
    if caller.account is not None and "read" in caller.scopes:
        theirs = select(Owner.package_id).where(Owner.account_id == caller.account)
        is_pending = Release.state == documents.QUARANTINED
        shown |= is_pending & Release.package_id.in_(theirs)
    return shown


def can_read_blob(session: Session, caller: Caller, digest: str) -> bool:
    """Return whether a release that the caller may see has a file of this digest."""
    found = (
        select(File.digest)
        .join(Release, File.release_id == Release.id)
        .join(Package, Release.package_id == Package.id)
        .where(File.digest == digest, can_see(caller), can_see_release(caller))
        .limit(1)
    )
    return session.scalar(found) is not None


def is_blob_public(session: Session, digest: str) -> bool:
    """Return whether anybody may read a blob, so that shared caches may keep it."""
    found = (
        select(File.digest)
        .join(Release, File.release_id == Release.id)
        .join(Package, Release.package_id == Package.id)
        .where(
            File.digest == digest,
            Package.is_private.is_(False),
            Release.state == documents.PUBLISHED,
        )
        .limit(1)
    )
    return session.scalar(found) is not None
