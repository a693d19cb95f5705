"""Registry servers on loopback, and experts that pass their rules."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from composable.interface import RouterInterface, body_signature, scout_signature
from composable.packaging import write_tensors
from composable.packaging.registry.served import ServedRegistry, ServedStorage
from composable.server import accounts
from composable.server.app import make_app
from composable.server.services import Services, open_services
from composable.server.settings import Settings
from composable.vetting.card import Card, CardInterface, Check, format_card, tensor_digests
from tests.support.servers import free_port

ALL = ("read", "publish", "yank", "account")


@dataclass
class Served:
    """A server on loopback.

    Args:
        url: Its URL.
        services: Its parts.
    """

    url: str
    services: Services

    def account(self, name: str, *, is_admin: bool = False, scopes: Any = ALL) -> str:
        """Create an account; return a token."""
        with self.services.database.write() as session:
            account = accounts.create_account(session, accounts.SERVER, name, is_admin=is_admin)
            return accounts.create_token(session, account, scopes)[1]

    def registry(self, token: str | None) -> ServedRegistry:
        """Open it for publishing."""
        return ServedRegistry(ServedStorage(self.url, token))

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        token: str | None = None,
        **headers: str,
    ) -> tuple[int, Any]:
        """Send a request; return the status, and the answer, parsed if it is JSON."""
        status, data, kind = fetch(self.url + path, method, body, token, **headers)
        return status, json.loads(data) if kind == "application/json" and data else data

    def api(
        self, method: str, path: str, body: Any = None, token: str | None = None
    ) -> tuple[int, Any]:
        """Send a request to the API."""
        return self.ask(method, f"/api/v1{path}", body, token)


def fetch(
    url: str, method: str = "GET", body: Any = None, token: str | None = None, **headers: str
) -> tuple[int, bytes, str]:
    """Send a request; return status, body and content type."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, method=method)
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers.get("Content-Type", "")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers.get("Content-Type", "")


@contextlib.contextmanager
def run_server(
    location: Path | str,
    database: str | None = None,
    settings: Settings | None = None,
    *,
    keys: Path | None = None,
) -> Iterator[Served]:
    """Run a server in a thread."""
    services = open_services(str(location), database, settings, keys=keys)
    port = free_port()
    config = uvicorn.Config(
        make_app(services), host="127.0.0.1", port=port, log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{port}", services)
    finally:
        server.should_exit = True
        thread.join()
        services.close()


def make_vetted_expert(
    folder: Path,
    interface: RouterInterface,
    name: str = "german",
    version: str = "1.0.0",
    *,
    seed: int = 0,
    head: str = "",
    tail: str = "",
    license: str = "Apache-2.0",
    needs: str = "^1",
    measured: dict[str, Any] | None = None,
) -> Path:
    """Write an expert's folder with a card that passes, and return it.

    Args:
        folder: Where to write.
        interface: What it plugs into.
        name: Its name.
        version: Its version.
        seed: Of its weights.
        head: More lines of `[expert]`.
        tail: More tables of the manifest.
        license: Its licence.
        needs: The range of its interface.
        measured: The figures of its card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for file, specs in (
        ("body.safetensors", body_signature(interface, "lora", 2)),
        ("scout.safetensors", scout_signature(interface, 8)),
    ):
        tensors = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in specs.items()}
        write_tensors(folder / file, tensors)
    (folder / "README.md").write_text(f"# {name}\n")
    (folder / "expert.toml").write_text(
        f'[expert]\nname = "{name}"\nversion = "{version}"\nbackbone = "tiny-bytes"\n'
        f'description = "Knows {name}."\nlicense = "{license}"\n{head}\n'
        f'[interface]\nname = "{interface.name}"\nrequires = "{needs}"\n'
        f'[body]\nkind = "lora"\nrank = 2\n[scout]\nwidth = 8\n{tail}'
    )
    card = Card(
        expert=f"{name}@{version}",
        interface=CardInterface(name=interface.name, digest=interface.digest),
        tensors=tensor_digests(folder),
        passed=True,
        checks=(Check(name="gain", passed=True, found="2.0 to 1.0", expected="at least 1% less"),),
        measured=measured or {"gain": 0.5, "anchor_loss": 0.001},
    )
    (folder / "card.json").write_text(format_card(card))
    return folder
