"""What can happen to a release after it was published: vetting, yanks, takedowns, privacy."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from composable.packaging.registry.storage import WritableStorage
from composable.packaging.versions.version import Version
from composable.server import audit, documents
from composable.server.access import find_package
from composable.server.accounts import Caller, is_owner
from composable.server.blobs import drop_unlisted
from composable.server.database import Database
from composable.server.deltas import forget_bases
from composable.server.refusal import RefusedError, missing
from composable.server.signatures import ROOT
from composable.server.tables import Package, Release, SignedFile

MAX_REASON_LENGTH = 500


def find_owned(session: Session, caller: Caller, name: str, scope: str) -> Package:
    """Return a package that the caller may change.

    Raises:
        RefusedError: 401 or 403 when the caller may not; 404 when there is none, 410 after a
            takedown.
    """
    caller.require(scope, name)
    package = find_package(session, caller, name)
    if package.removal is not None:
        raise RefusedError(410, f"{name!r} was taken down: {package.removal}")
    if not caller.allows("admin") and not is_owner(session, caller.account, package):
        raise RefusedError(403, f"{name!r} belongs to somebody else")
    return package


def find_release(session: Session, package: Package, version: str) -> Release:
    """Return a release of a package.

    Raises:
        VersionError: For text that is not a version.
        RefusedError: 404 when there is none, 410 when it was taken down.
    """
    stem = str(Version(version)).partition("+")[0]
    release = session.scalar(
        select(Release).where(Release.package_id == package.id, Release.stem == stem)
    )
    if release is None:
        raise missing(f"release {package.name} {stem}")
    if release.state == documents.REMOVED:
        raise RefusedError(410, f"{package.name} {stem} was taken down: {release.reason}")
    return release


def set_yanked(
    database: Database, caller: Caller, name: str, version: str, reason: str | None
) -> None:
    """Yank a release, with a reason, or undo that.

    Args:
        database: The database.
        caller: Who does it.
        name: The package.
        version: The version.
        reason: Why it is yanked; None to undo.

    Raises:
        RefusedError: When there is no such release, or the caller may not.
    """
    with database.write() as session:
        package = find_owned(session, caller, name, "yank")
        release = find_release(session, package, version)
        is_yanked, text = reason is not None, (reason or "")[:MAX_REASON_LENGTH]
        if (release.is_yanked, release.reason) == (is_yanked, text):
            return
        release.is_yanked, release.reason = is_yanked, text
        action, subject = "yank" if is_yanked else "unyank", f"{name}@{release.version}"
        number = audit.record(session, caller.name, action, subject, {"reason": text})
        documents.refresh_package(session, package, number)


def record_vetting(
    database: Database, caller: Caller, name: str, version: str, *, has_passed: bool, note: str
) -> None:
    """Show a quarantined release, or remove it, as vetting found.

    Raises:
        RefusedError: When the caller may not vet, or the release is not quarantined.
    """
    with database.write() as session:
        caller.require("vet")
        package = find_package(session, caller, name)
        release = find_release(session, package, version)
        if release.state != documents.QUARANTINED:
            raise RefusedError(409, f"{name} {release.version} is not quarantined")
        release.state = documents.PUBLISHED if has_passed else documents.REMOVED
        release.reason = "" if has_passed else note[:MAX_REASON_LENGTH]
        detail = {"passed": has_passed, "note": note[:MAX_REASON_LENGTH]}
        subject = f"{name}@{release.version}"
        number = audit.record(session, caller.name, "vet", subject, detail)
        documents.refresh_package(session, package, number)


def take_down(
    database: Database,
    storage: WritableStorage,
    caller: Caller,
    name: str,
    version: str | None,
    reason: str,
) -> int:
    """Remove a release, or a package, for good: its bytes are deleted and its name stays taken.

    Deltas that start from its files go too, since they would give its bytes back. Releases that
    were published with them stay: the server has their files whole.

    Args:
        database: The database.
        storage: Where the bytes are.
        caller: An administrator.
        name: The package.
        version: The version; None for the package.
        reason: Why; it is shown in its place.

    Returns:
        How many files were deleted: those that no other release has.

    Raises:
        RefusedError: When the caller may not, or there is nothing to remove.
    """
    caller.require("admin")
    reason = reason[:MAX_REASON_LENGTH]
    with database.write() as session:
        package = find_owned(session, caller, name, "admin")
        if version is None:
            releases = list(
                session.scalars(select(Release).where(Release.package_id == package.id))
            )
            package.removal = reason
        else:
            releases = [find_release(session, package, version)]
        digests: set[str] = set()
        for release in releases:
            digests.update(file.digest for file in release.files)
            release.state, release.reason = documents.REMOVED, reason
            release.readme = release.card = ""
        session.flush()
        gone, changed = forget_bases(session, digests)
        subject = name if version is None else f"{name}@{version}"
        detail = {"reason": reason, "files": sorted(digests)}
        number = audit.record(session, caller.name, "takedown", subject, detail)
        for other in {package, *changed}:
            documents.refresh_package(session, other, number)
    return len(drop_unlisted(database, storage, digests | gone))


def set_private(database: Database, caller: Caller, name: str, *, is_private: bool) -> None:
    """Hide a package from all but its owners, or show it.

    Raises:
        RefusedError: When the caller may not.
    """
    with database.write() as session:
        package = find_owned(session, caller, name, "publish")
        if is_private and session.get(SignedFile, ROOT) is not None:
            raise RefusedError(
                422, "a signed registry has no private packages: its lists of names are public"
            )
        if package.is_private != is_private:
            package.is_private = is_private
            number = audit.record(
                session, caller.name, "package.private", name, {"private": is_private}
            )
            documents.refresh_package(session, package, number)
