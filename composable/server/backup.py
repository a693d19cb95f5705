"""Backups: all rows of the database, and the blobs that releases have.

A backup is a folder with `database.jsonl`, one row per line, and `blobs/`. It does not depend on
the kind of database or storage, so a registry can also move from one kind to another with it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import delete, insert, select, text
from sqlalchemy.orm import Session

from composable.errors import IntegrityError, RegistryError
from composable.files import atomic
from composable.files.blobs import blob_path, digest_file
from composable.files.reading import is_regular, open_file
from composable.packaging.manifests.manifest import PackageFile
from composable.packaging.registry.storage import LocalFile
from composable.server import audit
from composable.server.documents import REMOVED
from composable.server.services import Services
from composable.server.tables import Account, Base, File, Head, Release

ROWS_FILE: Final = "database.jsonl"
SCHEMA: Final = 1
# Not worth keeping: chunks of unfinished uploads are not in a backup, nor are files of proposals.
_SKIPPED: Final = ("publications", "proposals")


def write_backup(services: Services, folder: Path) -> tuple[int, int]:
    """Write a backup of a running registry; one that exists in the folder is brought up to date.

    Blobs are written first and verified, the rows last, so an interrupted backup keeps the rows
    of the one before.

    Args:
        services: The registry.
        folder: Where to write.

    Returns:
        The numbers of rows and of blobs.

    Raises:
        IntegrityError: When a blob of the registry is damaged.
    """
    with services.database.read() as session:
        files = session.execute(
            select(File.digest, File.size)
            .join(Release, File.release_id == Release.id)
            .where(Release.state != REMOVED)
            .distinct()
        ).all()
        rows = list(_read_rows(session))
    for digest, size in files:
        target = folder / blob_path(digest)
        if is_regular(target) and digest_file(target) == digest:
            continue
        with atomic.Sink(target, digest=digest, size=size) as sink:
            for piece in services.storage.stream(blob_path(digest)):
                sink.write(piece)
    head = {"kind": "composable-registry-backup", "schema": SCHEMA}
    lines = "".join(json.dumps(row) + "\n" for row in (head, *rows))
    atomic.write_bytes(folder / ROWS_FILE, lines.encode())
    return len(rows), len(files)


def restore_backup(services: Services, folder: Path) -> tuple[int, int]:
    """Restore a backup into an empty registry, and verify it.

    Args:
        services: The registry, which must have no accounts.
        folder: The backup.

    Returns:
        The numbers of rows and of blobs.

    Raises:
        RegistryError: When the registry is not empty, or the folder has no backup.
        IntegrityError: When the backup is damaged.
    """
    tables = {table.name: table for table in Base.metadata.sorted_tables}
    try:
        with open_file(folder / ROWS_FILE) as file:
            lines = [json.loads(line) for line in file]
    except (FileNotFoundError, ValueError) as error:
        raise RegistryError("has no backup", where=str(folder)) from error
    if not lines or lines[0].get("kind") != "composable-registry-backup":
        raise RegistryError("has no backup", where=str(folder))
    if lines[0]["schema"] != SCHEMA:
        raise RegistryError(f"schema {lines[0]['schema']}, expected {SCHEMA}", where=str(folder))
    blobs = _copy_blobs(services, folder, lines[1:])
    with services.database.write() as session:
        if session.scalar(select(Account.id).limit(1)) is not None:
            raise RegistryError(
                "is not empty", where=services.database.location, hint="restore into a new one"
            )
        session.execute(delete(Head))
        for line in lines[1:]:
            session.execute(insert(tables[line["table"]]).values(_decode(line["row"])))
        audit.verify_chain(session)
        if not services.database.is_sqlite:
            _restart_numbers(session)
    return len(lines) - 1, blobs


def _copy_blobs(services: Services, folder: Path, lines: list[dict[str, Any]]) -> int:
    removed = {
        line["row"]["id"]
        for line in lines
        if line["table"] == "releases" and line["row"]["state"] == REMOVED
    }
    copied: set[str] = set()
    for line in lines:
        row = line["row"]
        if line["table"] != "files" or row["release_id"] in removed or row["digest"] in copied:
            continue
        source = folder / blob_path(row["digest"])
        if not is_regular(source) or digest_file(source) != row["digest"]:
            raise IntegrityError("is missing or damaged", where=str(source))
        file = PackageFile(name=row["name"], size=row["size"], digest=row["digest"])
        services.storage.upload(blob_path(row["digest"]), LocalFile(source), file, None)
        copied.add(row["digest"])
    return len(copied)


def _read_rows(session: Session) -> Iterator[dict[str, Any]]:
    """Yield all rows, each after those that it refers to."""
    for table in Base.metadata.sorted_tables:
        if table.name in _SKIPPED:
            continue
        order = list(table.primary_key.columns)
        for row in session.execute(select(table).order_by(*order)).mappings():
            yield {"table": table.name, "row": {key: _encode(row[key]) for key in row}}


def _encode(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return value


def _decode(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: base64.b64decode(value["base64"])
        if isinstance(value, dict) and value.keys() == {"base64"}
        else value
        for key, value in row.items()
    }


def _restart_numbers(session: Session) -> None:
    """Let PostgreSQL count on from the largest id of each table."""
    for table in Base.metadata.sorted_tables:
        column = table.primary_key.columns.values()[0]
        if table.name != "head" and column.name == "id" and column.autoincrement == "auto":
            if column.type.python_type is not int:
                continue
            session.execute(
                text(
                    f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), "
                    f"coalesce(max(id), 0) + 1, false) FROM {table.name}"
                )
            )
