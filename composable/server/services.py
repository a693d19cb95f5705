"""What requests are answered with: the database, the storage, and what works on both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import text

from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.registry.storage import WritableStorage
from composable.server.database import Database
from composable.server.identities import Identities
from composable.server.limits import RateLimit
from composable.server.metrics import Metrics
from composable.server.proposals import Proposals
from composable.server.publishing import Publishing
from composable.server.search import SearchIndex
from composable.server.settings import Settings
from composable.server.signatures import SigningService

DATABASE_FILE: Final = "registry.sqlite"


@dataclass(frozen=True, kw_only=True)
class Services:
    """The parts of one server process.

    Args:
        database: Accounts, packages and releases.
        storage: Blobs and chunks.
        settings: What is allowed.
        publishing: The steps of publishing.
        proposals: The inbox.
        signing: Stores and confirms signatures.
        search: The index of words.
        identities: Verifies CI identities.
        reads: The limit on requests that change nothing.
        writes: The limit on requests that change something.
        metrics: What is counted.
    """

    database: Database
    storage: WritableStorage
    settings: Settings
    publishing: Publishing
    proposals: Proposals
    signing: SigningService
    search: SearchIndex
    identities: Identities
    reads: RateLimit
    writes: RateLimit
    metrics: Metrics

    def check_ready(self) -> None:
        """Raise an error unless database and storage answer."""
        with self.database.read() as session:
            session.execute(text("SELECT 1"))
        self.storage.read("config.json")

    def close(self) -> None:
        """Close the database."""
        self.database.close()


def database_url(location: str, database: str | None) -> str:
    """Return the URL of the database; by default, SQLite in the folder.

    Example:
        >>> database_url("/srv/registry", None)
        'sqlite:////srv/registry/registry.sqlite'
    """
    return database or f"sqlite:///{Path(location).absolute() / DATABASE_FILE}"


def open_services(
    location: str,
    database: str | None = None,
    settings: Settings | None = None,
    *,
    keys: Path | None = None,
) -> Services:
    """Open a registry: its storage and its database, which is created or brought up to date.

    Args:
        location: A folder, or the URL of a bucket, for the bytes.
        database: The database's URL; by default SQLite in the folder.
        settings: What is allowed.
        keys: Folder of the online key of a signed registry; by default that of the user.

    Raises:
        RegistryError: When the storage or the database cannot be opened.
    """
    settings = settings or Settings()
    storage = open_for_publishing(location).writable_storage()
    if database is None and not storage.is_remote:
        Path(location).mkdir(parents=True, exist_ok=True)
    opened = Database(database_url(location, database))
    opened.migrate()
    signing = SigningService(opened, keys, settings.title)
    return Services(
        database=opened,
        storage=storage,
        settings=settings,
        publishing=Publishing(opened, storage, settings, signing),
        proposals=Proposals(opened, storage, settings),
        signing=signing,
        search=SearchIndex(),
        identities=Identities(settings),
        reads=RateLimit(settings.reads_per_minute),
        writes=RateLimit(settings.writes_per_minute),
        metrics=Metrics(),
    )
