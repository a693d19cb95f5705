"""Operations on packages: search, read, yank, vet, take down, own, resolve."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import select

from composable.packaging.versions.version import Version
from composable.server import accounts, audit, basket, documents, identities, releases
from composable.server.access import can_see_release, find_package
from composable.server.api.operation import Call, Operation, read_number
from composable.server.refusal import RefusedError
from composable.server.search import FILTERS, PAGE, Query
from composable.server.tables import Audit, Publisher, Release

SORTS: Final = ("relevance", "gain", "newest", "name")
MAX_ENTRIES: Final = 1000


@dataclass(frozen=True)
class Reason:
    """Why a release is withdrawn."""

    reason: str


@dataclass(frozen=True)
class Vetting:
    """What vetting found."""

    passed: bool
    note: str = ""


@dataclass(frozen=True)
class Privacy:
    """Whether only owners see a package."""

    private: bool


@dataclass(frozen=True)
class TrustedPublisher:
    """A CI identity that may publish."""

    issuer: str
    subject: str
    claims: dict[str, str]


@dataclass(frozen=True)
class Wanted:
    """A backbone and the experts to plug into it."""

    backbone: str
    experts: list[str]
    version: str = ""


def search(call: Call) -> dict[str, Any]:
    """Search packages by words and filters."""
    with call.services.database.read() as session:
        found = call.services.search.search(session, call.caller, read_query(call))
    facets = {key: dict(values) for key, values in found.facets.items()}
    packages = [describe_summary(row) for row in found.rows]
    return {"total": found.total, "page_size": PAGE, "packages": packages, "facets": facets}


def read_query(call: Call) -> Query:
    """Return the query that a request's parameters state.

    Raises:
        RefusedError: 422 for a parameter that is not valid.
    """
    sort = call.query.get("sort", "relevance")
    if sort not in SORTS:
        raise RefusedError(422, f"{sort[:40]!r} is not one of {', '.join(SORTS)}", where="sort")
    percent = read_number(call, "gain", 0, largest=100)
    return Query(
        text=call.query.get("q", ""),
        filters={key: call.query[key] for key in FILTERS if call.query.get(key)},
        min_gain=percent / 100 if percent else None,
        sort=sort,
        page=read_number(call, "page", 1, largest=1000),
    )


def get_package(call: Call) -> dict[str, Any]:
    """Return a package with its releases and owners."""
    with call.services.database.read() as session:
        package = find_package(session, call.caller, call.path["name"])
        rows = session.scalars(
            select(Release).where(Release.package_id == package.id, can_see_release(call.caller))
        ).all()
        dependents = call.services.search.dependents(session, call.caller, package.name)
        return {
            "name": package.name,
            "private": package.is_private,
            "created": package.created,
            "removal": package.removal,
            "owners": sorted(owner.account.name for owner in package.owners),
            "dependents": dependents,
            "releases": [
                describe_release(row) for row in sorted(rows, key=lambda r: Version(r.version))
            ],
        }


def get_release(call: Call) -> dict[str, Any]:
    """Return a release with its card and files."""
    with call.services.database.read() as session:
        package = find_package(session, call.caller, call.path["name"])
        release = releases.find_release(session, package, call.path["version"])
        is_shown = session.scalar(
            select(Release.id).where(Release.id == release.id, can_see_release(call.caller))
        )
        if is_shown is None:
            raise RefusedError(404, f"no release {package.name} {release.version} here")
        return {
            **describe_release(release),
            "manifest_text": release.manifest,
            "card": json.loads(release.card) if release.card else None,
            "readme": release.readme,
        }


def describe_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a package of a search as data."""
    entry = summary["entry"]
    rest = {key: value for key, value in summary.items() if key != "entry"}
    return {**rest, "version": entry["version"], "description": entry["description"]}


def describe_release(release: Release) -> dict[str, Any]:
    """Return a release as data."""
    row = documents.to_listed(release).to_row()
    return {
        **row,
        "state": release.state,
        "reason": release.reason,
        "publisher": release.publisher,
        "signer": {"publisher": release.signer, "key": release.signer_key}
        if release.signer
        else None,
    }


def yank(call: Call) -> dict[str, Any]:
    """Exclude a release from new resolutions, with a reason."""
    name, version = call.path["name"], call.path["version"]
    releases.set_yanked(call.services.database, call.caller, name, version, call.body.reason)
    return {"yanked": True}


def unyank(call: Call) -> dict[str, Any]:
    """Undo a yank."""
    name, version = call.path["name"], call.path["version"]
    releases.set_yanked(call.services.database, call.caller, name, version, None)
    return {"yanked": False}


def vet(call: Call) -> None:
    """Show a quarantined release, or refuse it for good."""
    releases.record_vetting(
        call.services.database,
        call.caller,
        call.path["name"],
        call.path["version"],
        has_passed=call.body.passed,
        note=call.body.note,
    )


def take_down_package(call: Call) -> dict[str, Any]:
    """Remove a package for good; its name is not used again."""
    return _take_down(call, None)


def take_down_release(call: Call) -> dict[str, Any]:
    """Remove a release for good; its version is not used again."""
    return _take_down(call, call.path["version"])


def _take_down(call: Call, version: str | None) -> dict[str, Any]:
    database, storage = call.services.database, call.services.storage
    name, reason = call.path["name"], call.body.reason
    return {
        "deleted_files": releases.take_down(database, storage, call.caller, name, version, reason)
    }


def set_privacy(call: Call) -> None:
    """Hide a package from all but its owners, or show it."""
    name, is_private = call.path["name"], call.body.private
    releases.set_private(call.services.database, call.caller, name, is_private=is_private)


def add_owner(call: Call) -> None:
    """Let another account publish a package."""
    with call.services.database.write() as session:
        package = releases.find_owned(session, call.caller, call.path["name"], "account")
        account = accounts.find_account(session, call.path["account"])
        accounts.add_owner(session, call.caller, package, account)


def remove_owner(call: Call) -> None:
    """Take a package from an owner."""
    with call.services.database.write() as session:
        package = releases.find_owned(session, call.caller, call.path["name"], "account")
        account = accounts.find_account(session, call.path["account"])
        accounts.remove_owner(session, call.caller, package, account)


def list_publishers(call: Call) -> dict[str, Any]:
    """List the CI identities that may publish a package."""
    with call.services.database.read() as session:
        package = releases.find_owned(session, call.caller, call.path["name"], "account")
        found = session.scalars(select(Publisher).where(Publisher.package_id == package.id))
        return {
            "publishers": [
                {"id": p.id, "issuer": p.issuer, "subject": p.subject, "claims": p.claims}
                for p in found
            ]
        }


def add_publisher(call: Call) -> dict[str, Any]:
    """Trust a CI identity to publish a package."""
    body = call.body
    database, name = call.services.database, call.path["name"]
    number = identities.add_publisher(
        database, call.caller, name, body.issuer, body.subject, body.claims
    )
    return {"id": number}


def remove_publisher(call: Call) -> None:
    """Trust a CI identity no longer."""
    text = call.path["publisher"]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RefusedError(404, "no such trusted publisher here")
    name = call.path["name"]
    identities.remove_publisher(call.services.database, call.caller, name, int(text))


def resolve(call: Call) -> dict[str, Any]:
    """Choose one version of every expert for a backbone, or explain the conflict."""
    wanted = call.body
    with call.services.database.read() as session:
        backbone = basket.find_backbone(session, wanted.backbone, wanted.version)
        found = basket.resolve_basket(session, call.caller, backbone, wanted.experts, call.url)
    return {
        "backbone": {"name": backbone.name, "version": backbone.version},
        "experts": [{"name": r.name, "version": str(r.version)} for r in found.experts],
        "conflict": found.conflict or None,
        "lock": found.lock or None,
    }


def list_backbones(call: Call) -> dict[str, Any]:
    """List the backbones that the registry knows, with their router interfaces."""
    with call.services.database.read() as session:
        return {
            "backbones": [
                {
                    "name": row.name,
                    "version": row.version,
                    "description": row.description,
                    "license": row.license,
                    "interface": basket.read_interface(row).digest,
                }
                for row in basket.list_backbones(session)
            ]
        }


def read_audit(call: Call) -> dict[str, Any]:
    """Return entries of the audit log, in order."""
    after = read_number(call, "after", 0)
    with call.services.database.read() as session:
        entries = session.scalars(
            select(Audit).where(Audit.number > after).order_by(Audit.number).limit(MAX_ENTRIES)
        )
        return {"entries": [audit.to_row(entry) for entry in entries]}


_TEXT: Final = {"type": "string", "maxLength": 200}
_QUERY: Final[dict[str, dict[str, Any]]] = {
    "q": _TEXT,
    **dict.fromkeys(FILTERS, _TEXT),
    "gain": {"type": "integer", "minimum": 0, "maximum": 100},
    "sort": {"type": "string", "enum": list(SORTS)},
    "page": {"type": "integer", "minimum": 0, "maximum": 1000},
}
_P: Final = "/packages/{name}"
_R: Final = "/packages/{name}/{version}"
OPERATIONS: Final = (
    Operation(method="GET", path="/search", run=search, query=_QUERY),
    Operation(method="GET", path="/backbones", run=list_backbones),
    Operation(method="POST", path="/resolve", run=resolve, body=Wanted),
    Operation(method="GET", path=_P, run=get_package),
    Operation(method="PATCH", path=_P, run=set_privacy, body=Privacy, scope="publish", status=204),
    Operation(
        method="POST", path=f"{_P}/takedown", run=take_down_package, body=Reason, scope="admin"
    ),
    Operation(
        method="PUT", path=f"{_P}/owners/{{account}}", run=add_owner, scope="account", status=204
    ),
    Operation(
        method="DELETE",
        path=f"{_P}/owners/{{account}}",
        run=remove_owner,
        scope="account",
        status=204,
    ),
    Operation(method="GET", path=f"{_P}/publishers", run=list_publishers, scope="account"),
    Operation(
        method="POST",
        path=f"{_P}/publishers",
        run=add_publisher,
        body=TrustedPublisher,
        scope="account",
        status=201,
    ),
    Operation(
        method="DELETE",
        path=f"{_P}/publishers/{{publisher}}",
        run=remove_publisher,
        scope="account",
        status=204,
    ),
    Operation(method="GET", path=_R, run=get_release),
    Operation(method="POST", path=f"{_R}/yank", run=yank, body=Reason, scope="yank"),
    Operation(method="POST", path=f"{_R}/unyank", run=unyank, scope="yank"),
    Operation(method="POST", path=f"{_R}/vetting", run=vet, body=Vetting, scope="vet", status=204),
    Operation(
        method="POST", path=f"{_R}/takedown", run=take_down_release, body=Reason, scope="admin"
    ),
    Operation(
        method="GET",
        path="/audit",
        run=read_audit,
        scope="admin",
        query={"after": {"type": "integer", "minimum": 0, "maximum": 1 << 31}},
    ),
)
