"""Accounts, tokens and owners: what each token allows, and for how long."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select

from composable.errors import RegistryError
from composable.interface import RouterInterface
from composable.server import accounts
from composable.server.settings import Settings
from composable.server.tables import Token
from tests.support.registries import Served, run_server

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.conftest import MakeVetted


def test_only_the_hash_of_a_token_is_kept(server: Served) -> None:
    token = server.account("ann")
    with server.services.database.read() as session:
        row = session.scalars(select(Token)).one()
    assert row.digest == hashlib.sha256(token.encode()).hexdigest()
    assert token not in str(vars(row))
    assert len(token) == len(accounts.PREFIX) + 43, "256 bits in base64"


@pytest.mark.parametrize("token", ["x", "cxr_" + "A" * 43, "cxr_", "cxr_" + "A" * 5000])
def test_tokens_that_are_none(server: Served, token: str) -> None:
    assert server.api("GET", "/account", None, token)[0] == 401
    assert server.ask("GET", "/catalog.jsonl", None, token)[0] == 401


def test_a_revoked_or_expired_token_stops_at_once(server: Served) -> None:
    token = server.account("ann")
    body = {"scopes": ["read"], "label": "laptop", "hours": 0.0001}
    _, short = server.api("POST", "/tokens", body, token)
    _, other = server.api("POST", "/tokens", {"scopes": ["read"]}, token)
    assert server.api("GET", "/account", None, other["token"])[1]["scopes"] == ["read"]
    assert server.api("DELETE", f"/tokens/{other['id']}", None, token)[0] == 204
    assert server.api("GET", "/account", None, other["token"])[0] == 401
    with server.services.database.write() as session:
        session.get_one(Token, short["id"]).expires = "2020-01-01T00:00:00Z"
    status, answer = server.api("GET", "/account", None, short["token"])
    assert (status, "expired" in answer["error"]["message"]) == (401, True)
    listed = server.api("GET", "/tokens", None, token)[1]["tokens"]
    assert [row["revoked"] is None for row in listed] == [True, True, False]
    assert not any("token" in row for row in listed)


def test_a_token_creates_none_that_allows_more(server: Served) -> None:
    token = server.account("ann", scopes=["account", "read"])
    assert server.api("POST", "/tokens", {"scopes": ["publish"]}, token)[0] == 403
    assert server.api("POST", "/tokens", {"scopes": []}, token)[0] == 422
    body = {"scopes": ["account", "read"], "packages": ["german"]}
    _, narrow = server.api("POST", "/tokens", body, token)
    assert server.api("POST", "/tokens", {"scopes": ["read"]}, narrow["token"])[0] == 403
    other = {"scopes": ["read"], "packages": ["french"]}
    assert server.api("POST", "/tokens", other, narrow["token"])[0] == 403
    assert server.api("POST", "/tokens", {"scopes": ["admin"]}, token)[0] == 403


def test_a_token_for_one_package_publishes_no_other(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    token = server.account("ann")
    body = {"scopes": ["publish"], "packages": ["german"]}
    narrow = server.api("POST", "/tokens", body, token)[1]["token"]
    server.registry(narrow).publish(make_vetted("german"), interface=interface)
    with pytest.raises(RegistryError, match="does not allow 'publish' for french"):
        server.registry(narrow).publish(make_vetted("french"), interface=interface)
    with pytest.raises(RegistryError, match="does not allow 'yank'"):
        server.registry(narrow).yank("german", "1.0.0")  # type: ignore[arg-type]


def test_nobody_joins_a_closed_registry(server: Served) -> None:
    assert server.api("POST", "/accounts", {"name": "eve"})[0] == 403
    admin = server.account("root", is_admin=True, scopes=["admin"])
    status, answer = server.api("POST", "/accounts", {"name": "eve"}, admin)
    assert status == 201
    assert server.api("GET", "/account", None, answer["token"])[1]["account"] == "eve"


def test_anybody_joins_an_open_one_under_a_new_name(tmp_path: Path) -> None:
    with run_server(tmp_path / "served", settings=Settings(is_open=True)) as server:
        assert server.api("POST", "/accounts", {"name": "anna"})[0] == 201
        for name in ("anna", "an-na", "server"):
            assert server.api("POST", "/accounts", {"name": name})[0] == 409
        assert server.api("POST", "/accounts", {"name": "A b"})[0] == 422


def test_a_private_package_does_not_exist_for_others(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    ann, bob = server.account("ann"), server.account("bob")
    server.registry(ann).publish(make_vetted("german"), interface=interface)
    server.registry(bob).publish(make_vetted("french", seed=1), interface=interface)
    manifest = server.registry(ann).versions("german")[0]
    blobs = [f"/blobs/{f.digest[7:9]}/{f.digest[7:]}" for f in manifest.files]
    assert server.api("PATCH", "/packages/german", {"private": True}, bob)[0] == 403
    assert server.api("PATCH", "/packages/german", {"private": True}, ann)[0] == 204
    hidden = [
        "/index/ge/german.jsonl",
        "/api/v1/packages/german",
        "/api/v1/packages/german/1.0.0",
        blobs[0],
    ]
    for path in hidden:
        assert [server.ask("GET", path, None, t)[0] for t in (ann, bob, None)] == [200, 404, 404]
    seen = [server.api("GET", "/search", None, t)[1]["total"] for t in (ann, bob, None)]
    assert seen == [2, 1, 1]
    names = [len(server.registry(t).names()) for t in (ann, bob, None)]
    assert names == [2, 1, 1]
    own = server.account("cy", scopes=["publish"])
    assert server.ask("GET", hidden[0], None, own)[0] == 404, "a token without scope read"


def test_private_bytes_cannot_be_claimed_by_their_digest(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    """A manifest that names the digests of a private package gives no access to its bytes."""
    from composable.packaging.manifests.packing import pack_expert

    ann, bob = server.account("ann"), server.account("bob")
    folder = make_vetted("german")
    manifest = pack_expert(folder, interface=interface)
    body = {"manifest": manifest.to_toml(), "private": True}
    _, opened = server.api("POST", "/publications", body, ann)
    for file in manifest.files:
        path = f"/publications/{opened['id']}/files/{file.digest}/0"
        server.api("PUT", path, (folder / file.name).read_bytes(), ann)
    assert server.api("POST", f"/publications/{opened['id']}/commit", None, ann)[0] == 200
    stolen = manifest.to_toml().replace('name = "german"', 'name = "polish"')
    _, answer = server.api("POST", "/publications", {"manifest": stolen}, bob)
    assert all(entry["missing"] == [0] for entry in answer["files"])
    _, answer = server.api("POST", "/publications", {"manifest": stolen}, ann)
    assert all(entry["missing"] == [] for entry in answer["files"]), "ann need not send them again"
