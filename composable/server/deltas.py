"""Deltas on their way in, and on their way out with what they start from.

A publisher may send a delta in place of a file. The server makes the file, verifies it like any
other, and keeps it whole, so nothing that is served depends on another release. It keeps the delta
as well, for clients that have its base, but only where everybody may read that: together with the
file, a delta gives its base away.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import String, cast, or_, select
from sqlalchemy.orm import Session

from composable.files.atomic import Sink
from composable.files.delta import apply_delta
from composable.packaging.manifests.manifest import DELTA_SUFFIX, Delta, Manifest, PackageFile
from composable.packaging.manifests.packing import REQUIRED_FILES
from composable.packaging.manifests.toml import Table
from composable.packaging.registry.release import format_deltas, read_deltas
from composable.packaging.registry.storage import WritableStorage
from composable.server import documents, uploads
from composable.server.tables import Package, Release


def parse_offer(manifest: Manifest, offer: Mapping[str, Any], max_bytes: int) -> dict[str, Delta]:
    """Return the deltas that a publisher offers, by the file that they make.

    Those that are no smaller than their file, or not of a tensor file, are left out.

    Args:
        manifest: The manifest of the publication.
        offer: One delta for each file, as an index has them.
        max_bytes: The largest file that a delta may start from.

    Raises:
        ManifestError: For one that is malformed.
    """
    table = Table({name: {"deltas": rows} for name, rows in offer.items()}, "deltas")
    found = {}
    for file in manifest.files:
        if file.name in table and file.name in REQUIRED_FILES:
            (delta, *_) = read_deltas(table.table(file.name)) or (None,)
            if delta is not None and delta.size < file.size and delta.base_size <= max_bytes:
                found[file.name] = delta
    return found


def keep_offer(storage: WritableStorage, publication: str, deltas: Mapping[str, Delta]) -> None:
    """Keep the deltas that a publisher offers until the publication is committed."""
    path = _path(publication)
    if not deltas and storage.read(path) is None:
        return
    data = json.dumps({name: format_deltas([delta]) for name, delta in deltas.items()}).encode()
    seen = storage.read(path)
    while (seen is None or seen.data != data) and not storage.replace(path, data, seen):
        seen = storage.read(path)


def read_offer(
    storage: WritableStorage, publication: str, manifest: Manifest, max_bytes: int
) -> dict[str, Delta]:
    """Return the deltas that were kept for a publication."""
    document = storage.read(_path(publication))
    offer = {} if document is None else json.loads(document.data)
    return parse_offer(manifest, offer, max_bytes)


def drop_offer(storage: WritableStorage, publication: str, deltas: Mapping[str, Delta]) -> None:
    """Remove what was kept, and the chunks of the deltas."""
    uploads.drop_chunks(
        storage, publication, [delta.as_file(name) for name, delta in deltas.items()]
    )
    storage.remove(_path(publication))


def rebuild(
    storage: WritableStorage, publication: str, file: PackageFile, delta: Delta, folder: Path
) -> None:
    """Make a file in a folder from the chunks of its delta and the blob of its base.

    Args:
        storage: The storage of chunks and blobs.
        publication: Id of the publication.
        file: The file.
        delta: The delta, which is left beside it.
        folder: Where to write both.

    Raises:
        RefusedError: 409 when chunks are missing.
        IntegrityError: When delta, base or file do not match their digest.
    """
    sent = delta.as_file(file.name)
    base = PackageFile(name=f"{file.name}.base", size=delta.base_size, digest=delta.base)
    uploads.assemble(storage, publication, sent, folder / sent.name, is_known=False)
    uploads.assemble(storage, publication, base, folder / base.name, is_known=True)
    with Sink(folder / file.name, digest=file.digest, size=file.size) as sink:
        for data in apply_delta(folder / sent.name, folder / base.name, file.size):
            sink.write(data)
    (folder / base.name).unlink()


def forget_bases(session: Session, bases: Iterable[str]) -> tuple[set[str], set[Package]]:
    """Remove the deltas that start from files which are taken down; their releases are whole.

    Args:
        session: The transaction of the takedown.
        bases: Digests of the files.

    Returns:
        The digests of the deltas, which may be unneeded now; and the packages that changed.
    """
    doomed = set(bases)
    names_one = or_(*(cast(Release.row, String).contains(digest) for digest in doomed))
    rows = session.scalars(select(Release).where(names_one)).all() if doomed else []
    found: set[str] = set()
    changed: set[Package] = set()
    for release in rows:
        listed = documents.to_listed(release)
        gone = {n: d for n, d in listed.deltas.items() if d[0].base in doomed}
        if not gone:
            continue
        kept = {name: delta for name, delta in listed.deltas.items() if name not in gone}
        release.row = {**release.row, "files": listed.with_deltas(kept).to_row()["files"]}
        changed.add(release.package)
        for file in list(release.files):
            if file.name.removesuffix(DELTA_SUFFIX) in gone and file.name.endswith(DELTA_SUFFIX):
                found.add(file.digest)
                session.delete(file)
    return found, changed


def _path(publication: str) -> str:
    return f"{uploads.FOLDER}/{publication}/deltas.json"
