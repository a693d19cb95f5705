"""The database: SQLite or PostgreSQL, its migrations, and transactions.

Changes have one order: each locks the head of the audit log first. On SQLite that is the database's
only writer lock. So two replicas cannot both create a version, and the log cannot fork.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import alembic.command
import alembic.config
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from composable.errors import RegistryError
from composable.packaging.registry.release import TIME_FORMAT
from composable.server.tables import Head

# As many as threads that answer requests; two replicas stay below PostgreSQL's default of 100.
MAX_CONNECTIONS: Final = 32
_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_MIGRATION_LOCK: Final = 0x636F6D70


class Database:
    """The tables of a registry.

    Args:
        url: Such as `sqlite:////srv/registry/registry.sqlite` or `postgresql://user@host/name`.

    Raises:
        RegistryError: When it is not the URL of a database of these kinds, or cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise RegistryError("is not the URL of a database", where=url[:200]) from error
        self.location = parsed.render_as_string(hide_password=True)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if parsed.get_backend_name() == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        elif not self.is_sqlite:
            raise RegistryError(
                f"{parsed.get_backend_name()!r} is not supported",
                where=self.location,
                hint="expected sqlite:///FILE or postgresql://USER@HOST/NAME",
            )
        self.engine = create_engine(
            parsed, pool_size=MAX_CONNECTIONS, max_overflow=0, pool_pre_ping=not self.is_sqlite
        )
        if self.is_sqlite:
            _prepare_sqlite(self.engine)
            self._reading = self.engine
        else:
            self._reading = self.engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        self._writing = self.engine.execution_options(is_writing=True)

    def migrate(self) -> None:
        """Bring the tables to the newest version; of several replicas, one does it.

        Raises:
            RegistryError: When the database cannot be opened.
        """
        try:
            with self._writing.begin() as connection:
                if not self.is_sqlite:
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
                config = alembic.config.Config(attributes={"connection": connection})
                config.set_main_option("script_location", str(_MIGRATIONS))
                # Changes that do not build on each other may be written at the same time.
                alembic.command.upgrade(config, "heads")
        except SQLAlchemyError as error:
            raise RegistryError(
                f"the database cannot be opened: {str(error).splitlines()[0][:300]}",
                where=self.location,
            ) from error

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Open a session that sees one state of the database and changes nothing."""
        with Session(self._reading) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction; all other changes wait for its end. It is durable at the end."""
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            session.execute(select(Head).with_for_update())
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def now() -> str:
    """Return the time, as registries write it."""
    return format_time(datetime.datetime.now(datetime.UTC))


def in_hours(hours: float) -> str:
    """Return the time in some hours."""
    return format_time(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=hours))


def format_time(time: datetime.datetime) -> str:
    """Return a time in UTC as registries write it."""
    return time.strftime(TIME_FORMAT)


def _prepare_sqlite(engine: Engine) -> None:
    """Set what makes commits durable, readers independent of writers, and transactions ours."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction of its own
        for setting in (
            "busy_timeout=60000",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {setting}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        is_writing = connection.get_execution_options().get("is_writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")
