"""PostgreSQL and an S3 endpoint, started once; each test has a database and a folder of its own."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.packaging.conftest import make_interface
from tests.support.postgres import run_postgres
from tests.support.servers import run_s3

_COUNT = itertools.count()


@pytest.fixture
def interface():
    return make_interface()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    # Not in pytest's folder, which only its owner may enter: PostgreSQL runs as another user.
    with (
        tempfile.TemporaryDirectory(prefix="composable-pg-") as home,
        run_postgres(Path(home)) as url,
    ):
        yield url


@pytest.fixture
def new_database(postgres: str) -> Callable[[], str]:
    """Return a function that creates an empty database and returns its URL."""

    def create() -> str:
        name = f"registry{next(_COUNT)}"
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return postgres.replace("/postgres", f"/{name}")

    return create


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[dict[str, str]]:
    with run_s3() as environment:
        yield environment


@pytest.fixture
def bucket(s3_endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty folder in a bucket."""
    for name, value in s3_endpoint.items():
        monkeypatch.setenv(name, value)
    return f"s3://experts/{next(_COUNT)}"
