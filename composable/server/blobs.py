"""Remove blobs that nothing lists any more: of takedowns, and of publications that came to nothing.

A blob may be shared by releases, and be wanted by a publication that is under way. Whoever adds a
blob has a publication in the database first, and all changes of the database wait for each other,
so what is removed within a transaction is missed by nobody.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import or_, select

from composable.files.blobs import blob_path
from composable.packaging.registry.storage import WritableStorage
from composable.server.database import Database
from composable.server.documents import REMOVED
from composable.server.tables import File, Publication, Release


def drop_unlisted(database: Database, storage: WritableStorage, digests: Iterable[str]) -> set[str]:
    """Remove those blobs that no release and no open publication has.

    Call it when the change that made them unneeded is durable.

    Args:
        database: The database.
        storage: Where the bytes are.
        digests: Digests of blobs that may be unneeded.

    Returns:
        The digests of those that are removed.
    """
    doomed = set(digests)
    with database.write() as session:
        kept = session.scalars(
            select(File.digest)
            .join(Release, File.release_id == Release.id)
            .where(File.digest.in_(doomed), Release.state != REMOVED)
        )
        doomed -= set(kept)
        if doomed:
            names_one = or_(
                Publication.manifest_digest.in_(doomed),
                *(Publication.manifest.contains(digest) for digest in doomed),
            )
            for publication in session.scalars(select(Publication).where(names_one)):
                named = f"{publication.manifest_digest} {publication.manifest}"
                doomed = {digest for digest in doomed if digest not in named}
        for digest in doomed:
            storage.remove(blob_path(digest))
    return doomed
