"""Several servers on one PostgreSQL database and one S3 bucket."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from composable.errors import RegistryError
from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from composable.packaging import Version
from composable.server import audit
from composable.server.backup import restore_backup, write_backup
from composable.server.database import Database
from composable.server.tables import Base
from tests.support.registries import fetch, make_vetted_expert, run_server

NewDatabase = Callable[[], str]


def test_what_one_replica_publishes_all_serve(
    new_database: NewDatabase, bucket: str, interface: RouterInterface, tmp_path: Path
) -> None:
    url = new_database()
    expert = make_vetted_expert(tmp_path / "german", interface)
    with run_server(bucket, url) as one, run_server(bucket, url) as two:
        token = one.account("ann")
        manifest = one.registry(token).publish(expert, interface=interface)
        for server in (one, two):
            assert server.registry(None).names() == ["german"]
            assert server.api("GET", "/search?q=german")[1]["total"] == 1
        for file in manifest.files:
            blob, data = f"{two.url}/{blob_path(file.digest)}", (expert / file.name).read_bytes()
            assert fetch(blob)[:2] == (200, data)
            assert fetch(blob, Range="bytes=5-")[:2] == (206, data[5:])
            assert fetch(blob, Range="bytes=5-6")[:2] == (206, data[5:7])
            assert fetch(blob, Range=f"bytes={file.size}-")[0] == 416
        two.registry(token).yank("german", Version("1.0.0"), "wrong")
        assert one.registry(None).versions("german")[0].is_yanked
        admin = one.account("root", is_admin=True, scopes=["admin"])
        status, _ = two.api("POST", "/packages/german/takedown", {"reason": "court"}, admin)
        assert status == 200
        assert fetch(f"{one.url}/{blob_path(manifest.digest)}")[0] == 404
        with one.services.database.read() as session:
            audit.verify_chain(session)


def test_an_upload_moves_to_another_replica(
    new_database: NewDatabase, bucket: str, interface: RouterInterface, tmp_path: Path
) -> None:
    """Chunks are in the bucket, so a publication can go on after its server was lost."""
    from composable.packaging.manifests.packing import pack_expert

    url = new_database()
    expert = make_vetted_expert(tmp_path / "german", interface)
    manifest = pack_expert(expert, interface=interface)
    with run_server(bucket, url) as one:
        token = one.account("ann")
        body = {"manifest": manifest.to_toml()}
        opened = one.api("POST", "/publications", body, token)[1]
        first = manifest.files[0]
        path = f"/publications/{opened['id']}/files/{first.digest}/0"
        one.api("PUT", path, (expert / first.name).read_bytes(), token)
    with run_server(bucket, url) as two:
        again = two.api("POST", "/publications", body, token)[1]
        missing = {entry["name"]: entry["missing"] for entry in again["files"]}
        assert again["id"] == opened["id"]
        assert [missing.pop(first.name), *missing.values()] == [[], [0], [0], [0]]
        two.registry(token).publish(expert, interface=interface)
        assert two.registry(None).names() == ["german"]


@pytest.mark.parametrize("round_", range(3))
def test_of_two_publishers_of_a_version_one_wins(
    new_database: NewDatabase, interface: RouterInterface, tmp_path: Path, round_: int
) -> None:
    """The other is refused, whichever server each asks, and what is served is the winner's."""
    experts = [make_vetted_expert(tmp_path / str(seed), interface, seed=seed) for seed in range(2)]
    url = new_database()
    with run_server(tmp_path / "blobs", url) as one, run_server(tmp_path / "blobs", url) as two:
        token = one.account("ann")
        barrier = threading.Barrier(2)

        def publish(server, expert):
            registry = server.registry(token)
            barrier.wait()
            try:
                return registry.publish(expert, interface=interface).digest
            except RegistryError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(publish, (one, two), experts))
        won = [answer for answer in answers if answer.startswith("sha256:")]
        lost = [answer for answer in answers if "published with other content" in answer]
        assert (len(won), len(lost)) == (1, 1), answers
        for server in (one, two):
            assert [r.manifest for r in server.registry(None).versions("german")] == won


def test_a_registry_moves_from_sqlite_to_postgres(
    new_database: NewDatabase, bucket: str, interface: RouterInterface, tmp_path: Path
) -> None:
    with run_server(tmp_path / "lab") as lab:
        token = lab.account("ann")
        expert = make_vetted_expert(tmp_path / "german", interface)
        lab.registry(token).publish(expert, interface=interface)
        before = fetch(lab.url + "/index/ge/german.jsonl")
        write_backup(lab.services, tmp_path / "backup")
    with run_server(bucket, new_database()) as world:
        restore_backup(world.services, tmp_path / "backup")
        assert fetch(world.url + "/index/ge/german.jsonl") == before
        later = make_vetted_expert(tmp_path / "later", interface, "french", seed=1)
        world.registry(token).publish(later, interface=interface)
        assert world.account("bob")
        with world.services.database.read() as session:
            audit.verify_chain(session)


def test_the_log_of_postgres_cannot_be_changed(new_database: NewDatabase) -> None:
    database = Database(new_database())
    database.migrate()
    with database.write() as session:
        audit.record(session, "ann", "test", "x")
    for statement in ("UPDATE audit SET account = 'eve'", "DELETE FROM audit", "TRUNCATE audit"):
        with pytest.raises(DatabaseError, match="append-only"), database.write() as session:
            session.execute(text(statement))
    database.close()


def test_replicas_that_start_together_migrate_once(new_database: NewDatabase) -> None:
    import alembic.autogenerate
    import alembic.migration

    url = new_database()
    databases = [Database(url) for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(Database.migrate, databases))
    with databases[0].engine.connect() as connection:
        context = alembic.migration.MigrationContext.configure(connection)
        assert alembic.autogenerate.compare_metadata(context, Base.metadata) == []
    for database in databases:
        database.close()
