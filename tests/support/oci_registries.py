"""Docker's OCI registry on loopback, a server of tokens, and a relay that changes answers."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.client
import json
import shutil
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwt
from joserfc.jwk import ECKey

from tests.support.servers import free_port, require, wait_for

CONFIG = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {home}/data}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
AUTH = """
auth:
  token: {{realm: "{realm}", service: registry, issuer: tests, rootcertbundle: "{home}/cert.pem"}}
"""
# Headers of one connection only.
HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive", "content-length")


@contextlib.contextmanager
def run_oci_registry(home: Path, auth: str = "") -> Iterator[str]:
    """Run a registry; yield its host and port."""
    program = shutil.which("docker-registry")
    require(program is not None, "docker-registry (apt-get install docker-registry)")
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (home / "config.yml").write_text(CONFIG.format(home=home, port=port) + auth)
    process = subprocess.Popen(
        [str(program), "serve", str(home / "config.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@dataclass
class TokenServer:
    """A server of tokens.

    Args:
        password: What it wants for a token that may push.
        asked: Query and credentials of each request so far.
    """

    password: str
    asked: list[tuple[dict[str, str], str]] = field(default_factory=list)


@contextlib.contextmanager
def run_private_registry(home: Path, password: str) -> Iterator[tuple[str, TokenServer]]:
    """Run a registry that everybody may read, and who knows the password may write."""
    home.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (home / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    der = certificate.public_bytes(serialization.Encoding.DER)
    head = {"alg": "ES256", "typ": "JWT", "x5c": [base64.b64encode(der).decode()]}
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    tokens = TokenServer(password)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
            login = self.headers.get("Authorization", "")
            tokens.asked.append((query, login))
            kind, repository, actions = query["scope"].split(":")
            granted = ["pull"]
            if login == f"Basic {base64.b64encode(password.encode()).decode()}":
                granted = actions.split(",")
            elif login:
                self.send_response(401)
                self.end_headers()
                return
            access = [{"type": kind, "name": repository, "actions": granted}]
            at = int(time.time())
            claims = {
                "iss": "tests",
                "aud": query["service"],
                "exp": at + 300,
                "nbf": at - 60,
                "access": access,
            }
            data = json.dumps({"token": jwt.encode(head, claims, ECKey.import_key(pem))}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with (
        _run_handler(Handler) as port,
        run_oci_registry(
            home, AUTH.format(realm=f"http://127.0.0.1:{port}/token", home=home)
        ) as at,
    ):
        yield at, tokens


@dataclass
class Exchange:
    """A request, and the answer to it, which may be changed before it is sent.

    Args:
        method: The method.
        path: Path and query.
        sent: Headers of the request.
        body: Body of the request.
        status: Status of the answer.
        headers: Headers of the answer.
        data: Body of the answer.
        is_cut: Whether the connection is closed instead of an answer.
    """

    method: str
    path: str
    sent: dict[str, str]
    body: bytes
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    is_cut: bool = False


class Relay:
    """A relay to a registry.

    Args:
        target: Host and port of the registry.

    Attributes:
        url: Where it is.
        change: Called with each exchange before it is answered.
        before: Called with each exchange before it is passed on; an answer it sets is used.
        asked: All exchanges so far.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.host = ""
        self.change: Callable[[Exchange], None] = lambda _: None
        self.before: Callable[[Exchange], None] = lambda _: None
        self.asked: list[Exchange] = []

    def answer(self, exchange: Exchange) -> None:
        """Pass an exchange on."""
        self.asked.append(exchange)
        self.before(exchange)
        if exchange.is_cut or exchange.status:
            return
        connection = http.client.HTTPConnection(self.target, timeout=60)
        headers = {**exchange.sent, "Host": self.host}
        connection.request(exchange.method, exchange.path, exchange.body, headers)
        with contextlib.closing(connection):
            response = connection.getresponse()
            exchange.status = response.status
            exchange.headers = dict(response.getheaders())
            exchange.data = response.read()
        self.change(exchange)


@contextlib.contextmanager
def run_relay(target: str) -> Iterator[Relay]:
    """Run a relay."""
    relay = Relay(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            exchange = Exchange(self.command, self.path, dict(self.headers), self.rfile.read(size))
            relay.answer(exchange)
            if exchange.is_cut:
                self.close_connection = True
                return
            self.send_response(exchange.status)
            given = {name.lower(): text for name, text in exchange.headers.items()}
            for name, text in exchange.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, text)
            length = given.get("content-length", "0") if self.command == "HEAD" else None
            if exchange.status != 304:
                self.send_header("Content-Length", length or str(len(exchange.data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(exchange.data)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        def log_message(self, *_: Any) -> None:
            pass

    with _run_handler(Handler) as port:
        relay.host = f"127.0.0.1:{port}"
        yield relay


@contextlib.contextmanager
def _run_handler(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
