"""A signed registry in two states, built once and copied for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.conftest import make_interface
from tests.support.signed_registries import World, build_world


@pytest.fixture(scope="session")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("signed") / "world", make_interface())


@pytest.fixture
def world(genuine: World, tmp_path: Path) -> World:
    return genuine.copy(tmp_path / "world")
