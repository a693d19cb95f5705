"""A server on SQLite and a folder, and experts to publish."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from composable.interface import RouterInterface
from tests.packaging.conftest import make_interface
from tests.support.registries import Served, make_vetted_expert, run_server

MakeVetted = Callable[..., Path]


@pytest.fixture
def interface() -> RouterInterface:
    return make_interface()


@pytest.fixture
def make_vetted(tmp_path: Path, interface: RouterInterface) -> MakeVetted:
    """Return a function that writes an expert's folder and returns it."""
    count = itertools.count()

    def make(name: str = "german", version: str = "1.0.0", **settings: object) -> Path:
        folder = tmp_path / "experts" / f"{name}-{next(count)}"
        chosen = settings.pop("interface", interface)
        return make_vetted_expert(folder, chosen, name, version, **settings)

    return make


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with run_server(tmp_path / "served") as served:
        yield served
