"""Registries with thousands of packages, written into the database at once.

Some are made like any release; the others are copies of their rows under other names, since making
ten thousand would take minutes. Copies are in search and on pages, and have no index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from composable.interface import RouterInterface, digest_bytes
from composable.packaging import Constraint, Manifest, Version
from composable.packaging.manifests.manifest import BodySpec, InterfaceNeed, PackageFile
from composable.packaging.registry.release import Release as Listed
from composable.packaging.versions.names import confusable_key
from composable.server import documents
from composable.server.services import Services, open_services
from composable.server.tables import Backbone, Base, File, Owner, Package, Release
from composable.vetting.card import Card, CardInterface, Check, format_card
from tests.support.killed_registries import create_publisher, forked_servers

_WORDS: Final = (
    "law contracts patents medicine radiology genome protein chemistry physics optics "
    "geology weather climate ocean finance audit tax history archaeology music poetry "
    "drama cooking farming forestry python rust fortran haskell sql shell proofs algebra "
    "topology logic german french polish spanish greek latin swahili turkish hindi korean "
    "japanese news sport chess "
)
WORDS: Final = _WORDS.split()
DOMAINS: Final = ("science", "law", "code", "language", "arts", "finance")
LANGUAGES: Final = ("en", "de", "fr", "pl", "es", "ja")
PROTOTYPES: Final = 60
TIME: Final = "2026-11-29T12:00:00Z"


def fill_registry(services: Services, interface: RouterInterface, n: int, account: int) -> None:
    """Insert packages with one release each; their files are listed, and not in the storage.

    Args:
        services: The registry.
        interface: What all plug into.
        n: How many.
        account: Whose they are.
    """
    rng = random.Random(0)
    with services.database.write() as session:
        session.add(
            Backbone(
                name=interface.name,
                version=interface.version,
                interface=interface.to_json(),
                description="A backbone.",
                license="Apache-2.0",
                added=TIME,
            )
        )
        for number in range(min(n, PROTOTYPES)):
            manifest = _make_manifest(interface, number, rng)
            package = Package(
                name=manifest.name,
                key=confusable_key(manifest.name),
                is_private=False,
                created=TIME,
                removal=None,
                revision=0,
                index=b"",
                index_digest="",
                summary={},
            )
            session.add(package)
            session.flush()
            session.add(Owner(package_id=package.id, account_id=account, added=TIME))
            release = Release(
                package_id=package.id,
                version="1.0.0",
                stem="1.0.0",
                state=documents.PUBLISHED,
                is_yanked=False,
                reason="",
                published=TIME,
                publisher="ann",
                row=Listed.of(manifest, TIME).to_row(),
                manifest=manifest.to_toml(),
                card=_make_card(manifest, interface, rng),
                readme="# An expert\n\n" + "It was trained on text. " * 40,
            )
            release.files = [
                File(name=file.name, size=file.size, digest=file.digest) for file in manifest.files
            ]
            session.add(release)
            documents.refresh_package(session, package, 1)
        _copy_rows(session, n, account)


@contextlib.contextmanager
def filled_server(home: Path, interface: RouterInterface, n: int) -> Iterator[str]:
    """Run a server with many experts on SQLite; yield its URL."""
    location = str(home / "served")
    create_publisher(location)
    services = open_services(location)
    fill_registry(services, interface, n, 1)
    services.close()
    with forked_servers(location, None, 1) as (url,):
        yield url


def _copy_rows(session: Session, n: int, account: int) -> None:
    """Copy the packages under other names until there are `n`."""
    rows = {
        table: [dict(row) for row in session.execute(select(table.__table__)).mappings()]
        for table in (Package, Release, File)
    }
    added: dict[type[Base], list[dict[str, Any]]] = {table: [] for table in (*rows, Owner)}
    for number in range(PROTOTYPES, n):
        origin = number % PROTOTYPES
        package, release = rows[Package][origin], rows[Release][origin]
        old, new = package["name"], f"{package['name'].rpartition('-')[0]}-{number}"
        copied = {"id": number + 1, "name": new, "key": confusable_key(new), "index": b""}
        summary = json.loads(json.dumps(package["summary"]).replace(old, new))
        added[Package].append({**package, **copied, "summary": summary})
        texts = {key: release[key].replace(old, new) for key in ("manifest", "card")}
        row = json.loads(json.dumps(release["row"]).replace(old, new))
        ids = {"id": number + 1, "package_id": number + 1}
        added[Release].append({**release, **texts, **ids, "row": row})
        files = [file for file in rows[File] if file["release_id"] == release["id"]]
        added[File] += [{**file, "release_id": number + 1} for file in files]
        added[Owner].append({"package_id": number + 1, "account_id": account, "added": TIME})
    for table, values in added.items():
        if values:
            session.execute(insert(table), values)


def _make_manifest(interface: RouterInterface, number: int, rng: random.Random) -> Manifest:
    words = rng.sample(WORDS, 3)
    draft = Manifest(
        name=f"{words[0]}-{words[1]}-{number}",
        version=Version("1.0.0"),
        backbone=interface.name,
        interface=InterfaceNeed(
            name=interface.name, requires=Constraint("^1"), digest=interface.digest
        ),
        body=BodySpec(kind="lora", rank=2),
        scout_width=8,
        description=f"Text about {words[0]}, {words[1]} and {words[2]}.",
        license=rng.choice(("Apache-2.0", "MIT", "CC-BY-4.0")),
        domains=(rng.choice(DOMAINS),),
        languages=(rng.choice(LANGUAGES),),
    )
    files = tuple(
        PackageFile(name=name, size=1_000_000, digest=digest_bytes(f"{name}{number}".encode()))
        for name in ("body.safetensors", "card.json", "scout.safetensors")
    )
    return dataclasses.replace(draft, files=files)


def _make_card(manifest: Manifest, interface: RouterInterface, rng: random.Random) -> str:
    gain = rng.uniform(0.05, 0.7)
    return format_card(
        Card(
            expert=f"{manifest.name}@1.0.0",
            interface=CardInterface(name=interface.name, digest=interface.digest),
            tensors={},
            passed=True,
            checks=(Check(name="gain", passed=True, found=f"{gain:.2f}", expected="0.01"),) * 8,
            measured={
                "bits_per_byte": {
                    "own_backbone": 3.0,
                    "own_expert": 3.0 * (1 - gain),
                    "own_mix": 3.0 * (1 - gain),
                    "anchor_backbone": 1.45,
                    "anchor_mix": 1.451,
                },
                "gain": gain,
                "gain_interval": {"low": gain - 0.01, "high": gain + 0.01},
                "anchor_taken": 0.01,
                "anchor_taken_bound": 0.3,
            },
        )
    )
