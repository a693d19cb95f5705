"""Running a server: limits, health, metrics, logs, migrations, backups, and its OpenAPI."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import alembic.autogenerate
import alembic.migration
import pytest

from composable.errors import IntegrityError, RegistryError
from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from composable.server.backup import restore_backup, write_backup
from composable.server.database import Database
from composable.server.metrics import JsonLines
from composable.server.services import open_services
from composable.server.settings import Settings
from composable.server.tables import Base
from tests.support.registries import Served, fetch, run_server

if TYPE_CHECKING:
    from tests.server.conftest import MakeVetted


def test_migrations_make_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/x.sqlite")
    database.migrate()
    database.migrate()
    with database.engine.connect() as connection:
        context = alembic.migration.MigrationContext.configure(connection)
        assert alembic.autogenerate.compare_metadata(context, Base.metadata) == []
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    database.close()
    assert settings == ["wal", 2, 1]


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="not the URL"):
        Database("nonsense")
    with pytest.raises(RegistryError, match="'mysql' is not supported"):
        Database("mysql://host/x")
    database = Database(f"sqlite:///{tmp_path}/none/x.sqlite")
    with pytest.raises(RegistryError, match="cannot be opened"):
        database.migrate()


def test_too_many_requests(tmp_path: Path) -> None:
    settings = Settings(reads_per_minute=5, writes_per_minute=2)
    with run_server(tmp_path / "served", settings=settings) as server:
        statuses = [server.ask("GET", "/config.json")[0] for _ in range(7)]
        assert statuses == [200] * 5 + [429] * 2
        # Made-up tokens do not lift the limit of an address.
        assert server.ask("GET", "/config.json", None, "cxr_" + "B" * 43)[0] == 429
        assert server.ask("GET", "/health/live")[0] == 200
        writes = [server.api("POST", "/accounts", {"name": "eve"})[0] for _ in range(3)]
        assert writes == [403, 403, 429]


def test_inputs_have_limits(server: Served) -> None:
    token = server.account("ann")
    assert server.api("POST", "/publications", b"x" * ((8 << 20) + 1), token)[0] == 413
    for body in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"manifest": 7}'):
        assert server.api("POST", "/publications", body, token)[0] == 422, body[:10]
    assert server.api("POST", "/publications", {"manifest": "a\0b"}, token)[0] == 422
    assert server.api("GET", "/packages/" + "a" * 400)[0] == 422
    assert server.api("GET", "/search?page=x")[0] == 422
    assert server.api("GET", "/search?sort=x")[0] == 422
    assert server.api("DELETE", "/search")[0] == 405
    assert server.api("GET", "/nothing")[0] == 404


def test_errors_are_explained_and_headers_are_safe(server: Served) -> None:
    status, answer = server.api("GET", "/packages/none")
    assert status == 404
    assert answer["error"].keys() == {"kind", "message", "where", "hint"}


def test_health_and_metrics(server: Served) -> None:
    assert server.ask("GET", "/health/live") == (200, b"ok\n")
    assert server.ask("GET", "/health/ready") == (200, b"ok\n")
    server.ask("GET", "/index/ge/german.jsonl")
    text = fetch(server.url + "/metrics")[1].decode()
    labels = 'method="GET",route="/index/{shard}/{name}.jsonl",status="404"'
    assert f"composable_requests_total{{{labels}}} 1.0" in text


def test_a_log_line_stays_one_line() -> None:
    record = logging.makeLogRecord({"msg": 'x\n{"level": "forged"}', "fields": {"path": "/\n"}})
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["path"] == "/\n"


def test_a_server_never_loads_jax() -> None:
    code = "import sys, composable.server.serve as s; print(*({'jax', 'numpy'} & {*sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"


def test_a_backup_restores_every_byte(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface, tmp_path: Path
) -> None:
    ann = server.account("ann")
    server.registry(ann).publish(make_vetted(), interface=interface)
    server.registry(ann).publish(make_vetted("french"), interface=interface)
    paths = ["/config.json", "/catalog.jsonl", "/index/ge/german.jsonl"]
    release = server.registry(None).versions("german")[0]
    paths += [f"/{blob_path(file.digest)}" for file in release.files]
    before = {path: fetch(server.url + path) for path in paths}
    counts = write_backup(server.services, tmp_path / "backup")
    assert counts == write_backup(server.services, tmp_path / "backup"), "brought up to date"
    with pytest.raises(RegistryError, match="is not empty"):
        restore_backup(server.services, tmp_path / "backup")
    with run_server(tmp_path / "restored") as restored:
        assert restore_backup(restored.services, tmp_path / "backup") == counts
        assert {path: fetch(restored.url + path) for path in paths} == before
        expert = make_vetted("polish", seed=2)
        restored.registry(ann).publish(expert, interface=interface)


def test_a_damaged_backup_is_refused(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface, tmp_path: Path
) -> None:
    server.registry(server.account("ann")).publish(make_vetted(), interface=interface)
    write_backup(server.services, tmp_path / "backup")
    text = (tmp_path / "backup" / "database.jsonl").read_text()
    services = open_services(str(tmp_path / "restored"))
    with pytest.raises(RegistryError, match="has no backup"):
        restore_backup(services, tmp_path)
    (tmp_path / "backup" / "database.jsonl").write_text(text.replace('"ann"', '"eve"'))
    with pytest.raises(IntegrityError, match="audit"):
        restore_backup(services, tmp_path / "backup")
    (tmp_path / "backup" / "database.jsonl").write_text(text)
    next((tmp_path / "backup" / "blobs").rglob("*/*")).write_bytes(b"x")
    with pytest.raises(IntegrityError, match="missing or damaged"):
        restore_backup(services, tmp_path / "backup")
    services.close()


def test_every_operation_is_described(server: Served) -> None:
    described = server.ask("GET", "/api/v1/openapi.json")[1]
    assert described["openapi"] == "3.1.0"
    operations = [op for path in described["paths"].values() for op in path.values()]
    assert len({op["operationId"] for op in operations}) == len(operations) > 25
    for operation in operations:
        assert operation["summary"].endswith(".")
