"""Trusted publishing with an issuer on loopback that signs as a CI does."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from composable.interface import RouterInterface
from composable.server.settings import Settings
from tests.support.registries import Served, run_server

if TYPE_CHECKING:
    from tests.server.conftest import MakeVetted

SUBJECT = "repo:lab/german:ref:refs/heads/main"


class Issuer:
    """An OpenID Connect issuer."""

    def __init__(self) -> None:
        self.key = RSAKey.generate_key(2048, {"kid": "1"}, private=True)
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                documents = {
                    "/.well-known/openid-configuration": {"jwks_uri": f"{issuer.url}/keys"},
                    "/keys": {"keys": [issuer.key.as_dict(private=False)]},
                }
                data = json.dumps(documents[self.path]).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def sign(self, key: RSAKey | None = None, **claims: Any) -> str:
        """Return an identity token; a claim of None is left out."""
        now = int(time.time())
        stated = {
            "iss": self.url,
            "sub": SUBJECT,
            "aud": "composable",
            "exp": now + 300,
            "iat": now,
            "jti": str(time.perf_counter_ns()),
            "environment": "release",
            **claims,
        }
        kept = {name: value for name, value in stated.items() if value is not None}
        return jwt.encode({"alg": "RS256", "kid": self.key.kid}, kept, key or self.key)


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    found = Issuer()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def trusting(
    issuer: Issuer, tmp_path: Path, make_vetted: MakeVetted, interface: RouterInterface
) -> Iterator[Served]:
    """A server with a package that a CI identity may publish."""
    settings = Settings(issuers=(issuer.url,))
    with run_server(tmp_path / "served", settings=settings) as server:
        ann = server.account("ann")
        server.registry(ann).publish(make_vetted(), interface=interface)
        body = {
            "issuer": issuer.url,
            "subject": "repo:lab/german:*",
            "claims": {"environment": "release"},
        }
        assert server.api("POST", "/packages/german/publishers", body, ann)[0] == 201
        yield server


def exchange(server: Served, identity: str, package: str = "german") -> tuple[int, Any]:
    return server.api("POST", "/identities", {"identity": identity, "package": package})


def test_a_ci_job_publishes_without_a_secret(
    trusting: Served, issuer: Issuer, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    status, answer = exchange(trusting, issuer.sign())
    assert status == 200
    account = trusting.api("GET", "/account", None, answer["token"])[1]
    assert account["scopes"] == ["publish", "read"]
    assert account["packages"] == ["german"]
    later = make_vetted(version="2.0.0", seed=1)
    trusting.registry(answer["token"]).publish(later, interface=interface)
    assert len(trusting.registry(None).versions("german")) == 2


def test_an_identity_is_accepted_once(trusting: Served, issuer: Issuer) -> None:
    identity = issuer.sign()
    assert exchange(trusting, identity)[0] == 200
    status, answer = exchange(trusting, identity)
    assert (status, answer["error"]["message"]) == (401, "the identity token was used before")


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"aud": "other"}, 401),
        ({"aud": None}, 401),
        ({"exp": 1}, 401),
        ({"exp": None}, 401),
        ({"jti": None}, 401),
        ({"jti": 7}, 401),
        ({"iss": "https://evil.example"}, 401),
        ({"nbf": 1 << 33}, 401),
        ({"sub": "repo:lab/other:ref:refs/heads/main"}, 403),
        ({"environment": "test"}, 403),
        ({"environment": None}, 403),
    ],
)
def test_identities_that_are_refused(
    trusting: Served, issuer: Issuer, claims: dict[str, Any], status: int
) -> None:
    assert exchange(trusting, issuer.sign(**claims))[0] == status


def test_forged_identities_are_refused(trusting: Served, issuer: Issuer) -> None:
    other = RSAKey.generate_key(2048, {"kid": "1"}, private=True)
    assert exchange(trusting, issuer.sign(key=other))[0] == 401
    head, body, _ = issuer.sign().split(".")
    unsigned = "eyJhbGciOiJub25lIn0"
    for text in (f"{unsigned}.{body}.", f"{head}.{body}.", "a.b.c", "x", "", "." * 30000):
        assert exchange(trusting, text)[0] == 401
    assert exchange(trusting, issuer.sign(), "french")[0] == 403


def test_new_keys_of_an_issuer_are_found(trusting: Served, issuer: Issuer) -> None:
    assert exchange(trusting, issuer.sign())[0] == 200
    issuer.key = RSAKey.generate_key(2048, {"kid": "2"}, private=True)
    time.sleep(1.1)  # keys are read again at most once a second
    assert exchange(trusting, issuer.sign())[0] == 200
