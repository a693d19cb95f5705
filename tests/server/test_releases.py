"""What happens to releases later: yanks, quarantine, takedowns; and the log of all that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import delete, text, update
from sqlalchemy.exc import DatabaseError

from composable.errors import IntegrityError, RegistryError
from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from composable.packaging import Version
from composable.server import audit
from composable.server.settings import Settings
from composable.server.tables import Audit
from tests.support.registries import Served, run_server

if TYPE_CHECKING:
    from tests.server.conftest import MakeVetted


def test_a_yank_has_a_reason_and_can_be_undone(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    ann, bob = server.account("ann"), server.account("bob")
    registry = server.registry(ann)
    registry.publish(make_vetted(), interface=interface)
    with pytest.raises(RegistryError, match="belongs to somebody else"):
        server.registry(bob).yank("german", Version("1.0.0"), "mine is better")
    registry.yank("german", Version("1.0.0"), "trained on the test set")
    assert [release.is_yanked for release in registry.versions("german")] == [True]
    row = server.api("GET", "/packages/german/1.0.0")[1]
    assert (row["yanked"], row["reason"]) == (True, "trained on the test set")
    registry.unyank("german", Version("1.0.0"))
    assert [release.is_yanked for release in registry.versions("german")] == [False]
    with pytest.raises(RegistryError, match="no release german 3"):
        registry.yank("german", Version("3.0.0"))


def test_quarantine_until_vetting_passed(
    tmp_path: Path, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    with run_server(tmp_path / "served", settings=Settings(is_quarantined=True)) as server:
        ann = server.account("ann")
        vetter = server.account("vetter", is_admin=True, scopes=["vet"])
        folder = make_vetted()
        server.registry(ann).publish(folder, interface=interface)
        assert server.registry(ann).publish(folder, interface=interface), "the same again"
        digest = server.api("GET", "/packages/german/1.0.0", None, ann)[1]["manifest"]
        path = f"/{blob_path(digest)}"
        assert server.ask("GET", "/index/ge/german.jsonl")[0] == 404
        assert server.api("GET", "/packages/german/1.0.0")[0] == 404
        assert server.api("GET", "/search")[1]["total"] == 0
        assert [server.ask("GET", path, None, t)[0] for t in (None, ann)] == [404, 200]
        passed = {"passed": True, "note": "measured again"}
        vetting = "/packages/german/1.0.0/vetting"
        assert server.api("POST", vetting, passed, ann)[0] == 403
        assert server.api("POST", vetting, passed, vetter)[0] == 204
        assert server.api("POST", vetting, passed, vetter)[0] == 409
        assert server.ask("GET", path)[0] == 200
        assert [str(r.version) for r in server.registry(None).versions("german")] == ["1.0.0"]
        server.registry(ann).publish(make_vetted(version="2.0.0", seed=1), interface=interface)
        failed = {"passed": False, "note": "harms other experts"}
        vetting = "/packages/german/2.0.0/vetting"
        assert server.api("POST", vetting, failed, vetter)[0] == 204
        assert server.api("GET", "/packages/german/2.0.0", None, ann)[0] == 410


def test_a_takedown_leaves_a_tombstone(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    """The bytes are gone, locks can see why, and the name is not used again, by nobody."""
    ann = server.account("ann")
    admin = server.account("root", is_admin=True, scopes=["admin"])
    folder = make_vetted()
    server.registry(ann).publish(folder, interface=interface)
    server.registry(ann).publish(make_vetted("french"), interface=interface)
    before = server.registry(None).versions("german")[0]
    body = {"reason": "court order 7"}
    assert server.api("POST", "/packages/german/takedown", body, ann)[0] == 403
    status, answer = server.api("POST", "/packages/german/takedown", body, admin)
    assert (status, answer["deleted_files"]) == (200, 3), "french has the same tensors"
    root = Path(server.services.storage.location)
    left = [file.name for file in before.files if (root / blob_path(file.digest)).exists()]
    assert left == ["body.safetensors", "scout.safetensors"]
    assert server.ask("GET", f"/{blob_path(before.manifest)}")[0] == 404
    after = server.registry(None).versions("german")[0]
    assert (after.is_yanked, after.description) == (True, "")
    assert after.manifest == before.manifest
    assert server.api("GET", "/packages/german")[1]["removal"] == "court order 7"
    assert server.api("GET", "/search")[1]["total"] == 1
    with pytest.raises(RegistryError, match="taken down"):
        server.registry(ann).publish(folder, interface=interface)
    with pytest.raises(RegistryError, match=r"taken down|looks like"):
        server.registry(server.account("bob")).publish(make_vetted("gerrnan"), interface=interface)


def test_the_log_has_every_change_and_cannot_be_changed(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    ann = server.account("ann")
    server.registry(ann).publish(make_vetted(), interface=interface)
    server.registry(ann).yank("german", Version("1.0.0"), "wrong")
    database = server.services.database
    with database.read() as session:
        n, last = audit.verify_chain(session)
        actions = [entry.action for entry in session.query(Audit).order_by(Audit.number)]
    assert actions == ["account.create", "token.create", "package.create", "publish", "yank"]
    admin = server.account("root", is_admin=True, scopes=["admin"])
    _, answer = server.api("GET", "/audit?after=4", None, admin)
    assert answer["entries"][0]["action"] == "yank"
    assert answer["entries"][0]["hash"] == last
    assert server.api("GET", "/audit", None, ann)[0] == 403
    for change in (update(Audit).values(account="eve"), delete(Audit)):
        with pytest.raises(DatabaseError, match="append-only"), database.write() as session:
            session.execute(change)
    assert n == 5


def test_a_changed_log_is_found(server: Served) -> None:
    """Even somebody who drops the triggers cannot change an entry unnoticed."""
    for name in ("ann", "bob", "cy"):
        server.account(name)
    database = server.services.database
    with database.write() as session:
        session.execute(text("DROP TRIGGER audit_no_update"))
        session.execute(update(Audit).where(Audit.number == 3).values(subject="eve"))
    with database.read() as session, pytest.raises(IntegrityError, match="audit entry 3"):
        audit.verify_chain(session)
    with database.write() as session:
        session.execute(update(Audit).where(Audit.number == 3).values(subject="bob"))
        session.execute(text("DROP TRIGGER audit_no_delete"))
        session.execute(delete(Audit).where(Audit.number == 6))
    with database.read() as session, pytest.raises(IntegrityError, match="entries were removed"):
        audit.verify_chain(session)
