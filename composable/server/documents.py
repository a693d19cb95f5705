"""The documents of the static layout, derived from the releases, as a folder has them.

A release that is quarantined is in none of them. A yanked one is in the index, for existing locks,
and so is one that was taken down, without its words: clients take an index that has lost a line for
an old copy.
"""

from __future__ import annotations

import json
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from composable.interface.digest import canonical_json, digest_bytes
from composable.packaging.registry.index import describe_newest, format_catalog
from composable.packaging.registry.lines import format_document
from composable.packaging.registry.registry import SCHEMA, parse_manifest
from composable.packaging.registry.release import Release as Listed
from composable.packaging.registry.release import choose_newest
from composable.server.cards import read_figure
from composable.server.tables import Package, Release

CONFIG: Final = canonical_json({"kind": "composable-registry", "schema": SCHEMA}) + b"\n"
ENTRY: Final = ("name", "version", "interface", "description", "tags")
PUBLISHED: Final = "published"
QUARANTINED: Final = "quarantined"
REMOVED: Final = "removed"


def to_listed(release: Release) -> Listed:
    """Return a release as the index lists it.

    Args:
        release: A row of the database.
    """
    row = dict(release.row)
    row["yanked"] = release.is_yanked or release.state == REMOVED
    if release.state == REMOVED:
        row |= {"description": "", "tags": []}
    return Listed.from_row(row, row["name"])


def refresh_package(session: Session, package: Package, revision: int) -> None:
    """Derive a package's index and summary from its releases.

    Args:
        session: The transaction that changed a release.
        package: The package.
        revision: The number of the audit entry of the change.
    """
    session.flush()
    shown = session.scalars(
        select(Release).where(Release.package_id == package.id, Release.state != QUARANTINED)
    ).all()
    listed = sorted(map(to_listed, shown), key=lambda release: release.version)
    package.index = format_document([release.to_row() for release in listed])
    package.index_digest = digest_bytes(package.index)
    package.revision = revision
    package.summary = {}
    if listed:
        newest = choose_newest(listed)
        rows = {row.row["version"]: row for row in shown}
        package.summary = _summarize(newest, rows[str(newest.version)], len(listed))
    session.flush()


def _summarize(newest: Listed, release: Release, n_releases: int) -> dict[str, Any]:
    """Return what search and the catalogue need of a package's newest release."""
    manifest = parse_manifest(release.manifest.encode(), newest.name)
    is_removed = release.state == REMOVED
    entry = json.loads(format_catalog([describe_newest(newest)]))
    card = json.loads(release.card) if release.card else {}
    return {
        "entry": {
            key: entry[key] for key in ("name", "version", "interface", "description", "tags")
        },
        "languages": [] if is_removed else list(manifest.languages),
        "domains": [] if is_removed else list(manifest.domains),
        "provides": [] if is_removed else list(manifest.provides),
        "license": manifest.license,
        "backbone": manifest.backbone,
        "interface": manifest.interface.name,
        "gain": read_figure(card, "gain"),
        "anchor_loss": read_figure(card, "anchor_loss"),
        "requires": sorted(newest.requires),
        "published": newest.published,
        "releases": n_releases,
        "yanked": newest.is_yanked,
        "signer": release.signer,
    }


def compile_catalog(summaries: list[dict[str, Any]]) -> bytes:
    """Return the catalogue of these packages, as a folder has it."""
    rows = [summary["entry"] for summary in summaries if summary]
    return format_document(sorted(rows, key=lambda row: str(row["name"])))
