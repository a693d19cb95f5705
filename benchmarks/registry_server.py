"""How does a registry server do? Readers, kills, races, fuzzing, search, installing, pages.

    python -m benchmarks.registry_server readers --connections 10000 [--postgres]
    python -m benchmarks.registry_server kills --server 1000 --client 200
    python -m benchmarks.registry_server races --rounds 500 [--postgres]
    python -m benchmarks.registry_server fuzz --cases 50000     # needs schemathesis
    python -m benchmarks.registry_server search --experts 10000
    python -m benchmarks.registry_server pages --experts 10000
    python -m benchmarks.registry_server install --gigabytes 1

Server and client share this machine's cores. With --json FILE the figures are added to a file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import select

from benchmarks.install import FLOOR, INSTALL, make_interface, run_measured
from composable.errors import ComposableError
from composable.interface import RouterInterface, body_signature, scout_signature
from composable.packaging import Lock, Project, Requirement, lock_project, write_tensors
from composable.packaging.registry.served import ServedRegistry, ServedStorage
from composable.server import accounts
from composable.server.services import open_services
from composable.server.tables import Package
from composable.vetting.card import Card, CardInterface, Check, format_card, tensor_digests
from tests.support.filled_registries import DOMAINS, WORDS, fill_registry, filled_server
from tests.support.killed_registries import (
    create_publisher,
    forked_servers,
    kill_in_mid_publish,
)
from tests.support.postgres import run_postgres
from tests.support.registries import fetch, make_vetted_expert

SLOT_BYTES = 3 * 1024 * 4096 * 4


def small_interface() -> RouterInterface:
    return dataclasses.replace(make_interface(2), d_model=4, d_ff=8, scout_max_width=8)


@contextlib.contextmanager
def find_database(home: Path, *, is_postgres: bool) -> Iterator[str | None]:
    """Yield the URL of a database: of a PostgreSQL server that is started, or None for SQLite."""
    if not is_postgres:
        yield None
        return
    with (
        tempfile.TemporaryDirectory(prefix="composable-pg-") as data,
        run_postgres(Path(data)) as url,
    ):
        yield url


def measure_readers(home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Open many connections at once, and read an index from each, some times in a row."""
    with find_database(home, is_postgres=arguments.postgres) as database:
        location = str(home / "served")
        token = create_publisher(location, database)
        with forked_servers(location, database, 1) as (url,):
            folder = make_vetted_expert(home / "german", small_interface(), needs="*")
            ServedRegistry(ServedStorage(url, token)).publish(folder, interface=small_interface())
            began = time.perf_counter()
            seconds, errors = asyncio.run(
                read_at_once(url, arguments.connections, arguments.requests)
            )
            wall = time.perf_counter() - began
    return {
        "database": "PostgreSQL" if arguments.postgres else "SQLite",
        "connections": arguments.connections,
        "answers": len(seconds),
        "errors": errors,
        "per_second": round(len(seconds) / wall),
        "p50_s": round(statistics.median(seconds), 3),
        "p99_s": round(quantile(seconds, 0.99), 3),
    }


async def read_at_once(url: str, n: int, requests: int) -> tuple[list[float], int]:
    """Return the seconds of each answer that was right, and the number of all others."""
    host, port = url.removeprefix("http://").split(":")
    expected = fetch(f"{url}/index/ge/german.jsonl")[1]
    request = f"GET /index/ge/german.jsonl HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    seconds: list[float] = []
    start = asyncio.Event()

    async def read() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        await start.wait()
        for _ in range(requests):
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if (
                head.startswith(b"HTTP/1.1 200")
                and await reader.readexactly(len(expected)) == expected
            ):
                seconds.append(time.perf_counter() - began)
        writer.close()

    tasks = [asyncio.create_task(read()) for _ in range(n)]
    await asyncio.sleep(0)
    start.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    return seconds, n * requests - len(seconds)


def measure_kills(home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill server and publisher at random moments, and compare what is listed with the acks."""
    found = kill_in_mid_publish(
        home, small_interface(), server=arguments.server, client=arguments.client
    )
    return dataclasses.asdict(found)


def measure_races(home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let two publishers send other content for one name and version to two replicas at once."""
    interface, outcomes = small_interface(), []
    with find_database(home, is_postgres=arguments.postgres) as database:
        location = str(home / "served")
        token = create_publisher(location, database)
        with forked_servers(location, database, 2) as urls, ThreadPoolExecutor(2) as pool:
            for number in range(arguments.rounds):
                name = f"expert-{number}"
                folders = [
                    make_vetted_expert(
                        home / "experts" / str(seed), interface, name, seed=2 * number + seed
                    )
                    for seed in range(2)
                ]
                barrier = threading.Barrier(2)

                def publish(url: str, folder: Path, barrier: threading.Barrier = barrier) -> str:
                    registry = ServedRegistry(ServedStorage(url, token))
                    barrier.wait()
                    try:
                        return registry.publish(folder, interface=interface).digest
                    except ComposableError as error:
                        return error.message

                answers = list(pool.map(publish, urls, folders))
                won = [answer for answer in answers if answer.startswith("sha256:")]
                clear = [a for a in answers if a.endswith("already published with other content")]
                shown = [
                    [r.manifest for r in ServedRegistry(ServedStorage(url)).versions(name)]
                    for url in urls
                ]
                is_right = len(won) == len(clear) == 1 and shown == [won, won]
                outcomes.append(is_right)
    return {
        "database": "PostgreSQL" if arguments.postgres else "SQLite",
        "rounds": len(outcomes),
        "one_winner_and_a_clear_refusal": sum(outcomes),
    }


def measure_fuzz(home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Send generated requests for every operation, with a token that allows much."""
    location = str(home / "served")
    services = open_services(location)
    with services.database.write() as session:
        account = accounts.create_account(session, accounts.SERVER, "ann", is_admin=True)
        token = accounts.create_token(session, account, accounts.SCOPES)[1]
    fill_registry(services, small_interface(), 20, account.id)
    # So that requests reach what exists, too.
    with services.database.read() as session:
        name = session.scalars(select(Package.name)).first()
    config = {"path.name": name, "path.version": "1.0.0", "path.account": "ann"}
    lines = (f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in config.items())
    (home / "schemathesis.toml").write_text("[parameters]\n" + "".join(lines))
    services.close()
    with forked_servers(location, None, 1) as (url,):
        operations = fetch(f"{url}/api/v1/openapi.json")[1].count(b"operationId")
        command = [
            *shlex.split(arguments.schemathesis),
            "--config-file",
            str(home / "schemathesis.toml"),
            "run",
            f"{url}/api/v1/openapi.json",
            "--header",
            f"Authorization: Bearer {token}",
            "--checks",
            "not_a_server_error,response_schema_conformance,status_code_conformance",
            "--max-examples",
            str(max(1, arguments.cases // operations)),
            "--phases",
            "fuzzing",
            "--suppress-health-check",
            "all",
        ]
        # These would end the test: of the token, or of what the other requests name.
        for operation in ("revoke_token", "take_down_package", "take_down_release"):
            command += ["--exclude-operation-id", operation]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        metrics = fetch(f"{url}/metrics")[1].decode()
    print(run.stdout[-arguments.tail :], run.stderr[-500:])
    counts: dict[str, int] = {}
    for line in metrics.splitlines():
        if line.startswith("composable_requests_total{"):
            status = line.split('status="')[1][:3]
            counts[status[0] + "xx"] = counts.get(status[0] + "xx", 0) + int(
                float(line.split()[-1])
            )
    return {"cases": sum(counts.values()), "answers": counts, "passed": run.returncode == 0}


def measure_search(home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Search by one to three words, a third of them with a filter, over HTTP, one at a time."""
    queries = [
        "+".join(WORDS[(7 * n + k) % len(WORDS)] for k in range(1 + n % 3))
        + (f"&domain={DOMAINS[n % len(DOMAINS)]}" if n % 3 == 0 else "")
        for n in range(arguments.queries)
    ]
    with filled_server(home, small_interface(), arguments.experts) as url:
        fetch(f"{url}/api/v1/search?q=law")
        times, found = [], 0
        for query in queries:
            began = time.perf_counter()
            _, data, _ = fetch(f"{url}/api/v1/search?q={query}")
            times.append(time.perf_counter() - began)
            found += json.loads(data)["total"] > 0
    return {
        "experts": arguments.experts,
        "queries": len(queries),
        "with_results": found,
        "p50_ms": round(1000 * statistics.median(times), 1),
        "p99_ms": round(1000 * quantile(times, 0.99), 1),
    }


def measure_pages(home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fetch each page some times; its size, with what it needs, and its time."""
    with filled_server(home, small_interface(), arguments.experts) as url:
        _, data, _ = fetch(f"{url}/api/v1/search?q=law")
        names = [row["name"] for row in json.loads(data)["packages"]]
        basket = "&".join(f"with={name}" for name in names[:5])
        paths = {
            "home": "/",
            "search": "/search?q=law",
            "expert": f"/experts/{names[0]}",
            "backbone": "/backbones/large",
            "basket of 5": f"/backbones/large?{basket}",
            "publisher": "/publishers/ann",
        }
        style = len(fetch(f"{url}/style.css")[1])
        rows = {}
        for label, path in paths.items():
            times = []
            for _ in range(arguments.repeats + 1):
                began = time.perf_counter()
                status, data, _ = fetch(url + path)
                times.append(time.perf_counter() - began)
                assert status == 200, (path, data)
            rows[label] = {
                "kB": round((len(data) + style) / 1000, 1),
                "ms": round(1000 * statistics.median(times[1:]), 1),
                "max_ms": round(1000 * max(times[1:]), 1),
            }
    return {"experts": arguments.experts, "pages": rows}


def measure_install(home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Publish a large expert to a server, and install it, in turn with the floor."""
    interface = make_interface(max(1, round(arguments.gigabytes * 1e9 / SLOT_BYTES)))
    folder = write_large(home / "large", interface)
    size = (folder / "body.safetensors").stat().st_size
    location = str(home / "served")
    token = create_publisher(location)
    with forked_servers(location, None, 1) as (url,):
        began = time.perf_counter()
        manifest = ServedRegistry(ServedStorage(url, token)).publish(folder, interface=interface)
        published = time.perf_counter() - began
        digest = next(f.digest for f in manifest.files if f.name == "body.safetensors")
        source = home / "served" / "blobs" / digest[7:9] / digest[7:]
        project = Project.create(home / "project", "large", {"server": url})
        project = project.add(Requirement.parse("large"))
        lock_project(project, interface)
        assert Lock.read(home / "project").experts
        floor, install = [], []
        for number in range(arguments.repeats):
            target = home / f"floor-{number}"
            script = [sys.executable, "-c", textwrap.dedent(FLOOR), str(source), str(target)]
            floor.append(run_measured(script)[0])
            target.unlink()
            store = home / f"store-{number}"
            script = [
                sys.executable,
                "-c",
                textwrap.dedent(INSTALL),
                str(home / "project"),
                str(store),
            ]
            seconds, peak = run_measured(script)
            install.append(seconds)
            subprocess.run(["rm", "-rf", str(store), str(home / "project" / ".composable")])
    ratios = [f / i for f, i in zip(floor, install, strict=True)]
    return {
        "bytes": size,
        "publish_s": round(published, 2),
        "floor_s": [round(s, 2) for s in floor],
        "install_s": [round(s, 2) for s in install],
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in ratios],
        "peak_mb": round(peak / 1e6),
    }


def write_large(folder: Path, interface: RouterInterface) -> Path:
    """Write a large expert with a card."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file, specs in (
        ("body.safetensors", body_signature(interface, "ffn", None)),
        ("scout.safetensors", scout_signature(interface, 64)),
    ):
        write_tensors(
            folder / file,
            {n: rng.standard_normal(s.shape, dtype=np.float32) * 0.01 for n, s in specs.items()},
        )
    (folder / "expert.toml").write_text(
        '[expert]\nname = "large"\nversion = "1.0.0"\nbackbone = "large"\nlicense = "MIT"\n'
        '[interface]\nname = "large"\nrequires = "^1"\n'
        '[body]\nkind = "ffn"\n[scout]\nwidth = 64\n'
    )
    card = Card(
        expert="large@1.0.0",
        interface=CardInterface(name="large", digest=interface.digest),
        tensors=tensor_digests(folder),
        passed=True,
        checks=(Check(name="format", passed=True, found="", expected=""),),
    )
    (folder / "card.json").write_text(format_card(card))
    return folder


def quantile(values: list[float], fraction: float) -> float:
    """Return the smallest value that at least this fraction of the values do not exceed."""
    return sorted(values)[min(int(fraction * len(values)), len(values) - 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, **numbers: float) -> argparse.ArgumentParser:
        command = commands.add_parser(name)
        for option, value in numbers.items():
            command.add_argument(f"--{option}", type=type(value), default=value)
        command.add_argument("--folder", type=Path, help="where to work")
        command.add_argument("--json", type=Path, metavar="FILE")
        return command

    add("readers", connections=10000, requests=3).add_argument("--postgres", action="store_true")
    add("kills", server=1000, client=200)
    add("races", rounds=500).add_argument("--postgres", action="store_true")
    fuzz = add("fuzz", cases=50000, tail=3000)
    fuzz.add_argument("--schemathesis", default="schemathesis", help="the command")
    add("search", experts=10000, queries=500)
    add("pages", experts=10000, repeats=20)
    add("install", gigabytes=1.0, repeats=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        found = globals()[f"measure_{arguments.command}"](Path(name), arguments)
    found["date"] = datetime.date.today().isoformat()
    found["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps(found, indent=2))
    if arguments.json:
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        label = f"{arguments.command} {found.get('database', '')}".strip()
        arguments.json.write_text(json.dumps({**known, label: found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
