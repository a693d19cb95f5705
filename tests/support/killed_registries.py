"""Registry servers and publishers as processes that are killed in mid publish.

Processes are forked from one that has imported everything, so a restart takes milliseconds. The
parent has no threads and no open database.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import uvicorn

from composable.errors import ComposableError
from composable.interface import RouterInterface, digest_bytes
from composable.packaging import Registry
from composable.packaging.registry.budget import TimeBudget
from composable.packaging.registry.served import ServedRegistry, ServedStorage
from composable.server import accounts, audit
from composable.server.app import make_app
from composable.server.services import open_services
from composable.server.settings import Settings
from tests.support.registries import fetch, make_vetted_expert
from tests.support.servers import free_port

# A benchmark is no guest: it sends as fast as it can.
FAST = Settings(reads_per_minute=10**9, writes_per_minute=10**9)


@dataclass(frozen=True, kw_only=True)
class Kills:
    """What came of killing.

    Args:
        server: Times that the server was killed.
        client: Times that the publisher was killed.
        acknowledged: Publishes that the publisher was told had succeeded.
        lost: Those of them that are not listed, or not whole.
        half_visible: Listed releases with a file that is missing or damaged.
        listed: Releases that are listed at the end.
        entries: Entries of the audit log, whose chain was verified.
    """

    server: int
    client: int
    acknowledged: int
    lost: int
    half_visible: int
    listed: int
    entries: int


def fork(function: Callable[[], object]) -> int:
    """Run a function in a process of its own; return its id."""
    pid = os.fork()
    if pid == 0:
        _be_child(function)
    return pid


def _be_child(function: Callable[[], object]) -> NoReturn:
    status = 1
    with contextlib.suppress(BaseException):
        function()
        status = 0
    os._exit(status)


def kill(pid: int) -> None:
    """Kill a process and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def fork_server(location: str, database: str | None, port: int, settings: Settings = FAST) -> int:
    """Start a server; return the id of its process, once it answers."""

    def run() -> None:
        services = open_services(location, database, settings)
        config = uvicorn.Config(
            make_app(services),
            host="127.0.0.1",
            port=port,
            log_config=None,
            access_log=False,
            backlog=4096,
        )
        uvicorn.Server(config).run()

    pid = fork(run)
    for _ in range(3000):
        with contextlib.suppress(OSError):
            if fetch(f"http://127.0.0.1:{port}/health/live")[0] == 200:
                return pid
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    raise RuntimeError("the server does not answer")


@contextlib.contextmanager
def forked_servers(location: str, database: str | None, n: int) -> Iterator[list[str]]:
    """Run servers on the same data; yield their URLs."""
    ports = [free_port() for _ in range(n)]
    pids = [fork_server(location, database, port) for port in ports]
    try:
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        for pid in pids:
            kill(pid)


def create_publisher(location: str, database: str | None = None) -> str:
    """Create an account in a registry that no server runs; return a token."""
    services = open_services(location, database)
    with services.database.write() as session:
        account = accounts.create_account(session, accounts.SERVER, "ann")
        _, token = accounts.create_token(session, account, ["read", "publish", "yank", "account"])
    services.close()
    return token


def kill_in_mid_publish(
    home: Path, interface: RouterInterface, *, server: int, client: int, seed: int = 0
) -> Kills:
    """Kill a server and a publisher at random moments, then compare what is listed with the acks.

    Args:
        home: An empty folder.
        interface: What the experts plug into.
        server: How often to kill the server.
        client: How often to kill the publisher.
        seed: Of the moments.
    """
    rng = random.Random(seed)
    location, port = str(home / "served"), free_port()
    acks = home / "acks"
    acks.touch()
    token = create_publisher(location)
    url = f"http://127.0.0.1:{port}"

    def publish_on() -> None:
        done = set(acks.read_text().split())
        budget = TimeBudget(60, max_retries=1000, first_pause_seconds=0.01)
        registry = ServedRegistry(ServedStorage(url, token, budget=budget))
        number = len(done)
        while True:
            name = f"expert-{number}"
            folder = make_vetted_expert(home / "experts" / name, interface, name, seed=number)
            with contextlib.suppress(ComposableError):
                registry.publish(folder, interface=interface)
                with acks.open("a") as file:
                    file.write(f"{name}\n")
                number += 1

    doomed = ["server"] * server + ["client"] * client
    rng.shuffle(doomed)
    serving = fork_server(location, None, port)
    publishing = fork(publish_on)
    seconds = _time_publish(acks)
    for victim in doomed:
        time.sleep(rng.uniform(0.0, 2 * seconds))
        if victim == "server":
            kill(serving)
            serving = fork_server(location, None, port)
        else:
            kill(publishing)
            publishing = fork(publish_on)
    kill(publishing)
    kill(serving)
    serving = fork_server(location, None, port)
    try:
        acknowledged = set(acks.read_text().split())
        whole, half = find_visible(ServedRegistry(ServedStorage(url)))
    finally:
        kill(serving)
    services = open_services(location)
    with services.database.read() as session:
        entries, _ = audit.verify_chain(session)
    services.close()
    return Kills(
        server=server,
        client=client,
        acknowledged=len(acknowledged),
        lost=len(acknowledged - whole),
        half_visible=len(half),
        listed=len(whole | half),
        entries=entries,
    )


def _time_publish(acks: Path) -> float:
    """Wait for a few publishes; return the seconds that one takes."""
    seen, end, began = 0, time.monotonic() + 120, 0.0
    while seen < 4:
        if time.monotonic() > end:
            raise RuntimeError("nothing was published")
        if (n := len(acks.read_text().split())) != seen:
            seen, began = n, began if seen else time.monotonic()
        time.sleep(0.005)
    return (time.monotonic() - began) / 3


def find_visible(registry: Registry) -> tuple[set[str], set[str]]:
    """Return the packages whose releases are whole, and those of which a file is missing."""
    whole, half = set(), set()
    for name in registry.names() if registry.storage.read("catalog.jsonl") else ():
        intact = True
        for release in registry.versions(name):
            try:
                registry.read_manifest(release)
                for file in release.files:
                    data = b"".join(registry.stream(file.digest))
                    intact = intact and digest_bytes(data) == file.digest
            except ComposableError:
                intact = False
        (whole if intact else half).add(name)
    return whole, half
