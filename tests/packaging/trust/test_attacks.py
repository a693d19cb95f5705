"""Every attack on a signed registry is refused, in a folder, over HTTP and in a bucket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.registry_attacks import ATTACKS, Attack, meet_attack
from tests.support.servers import run_s3
from tests.support.signed_registries import Place, World, serve_folder


@pytest.fixture(scope="module")
def endpoint() -> Iterator[dict[str, str]]:
    with run_s3() as environment:
        yield environment


def attack_and_use(world: World, place: Place, attack: Attack) -> None:
    assert meet_attack(world, place, attack) == attack.refused_for


IDS = [attack.name for attack in ATTACKS]


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_folder(world: World, attack: Attack) -> None:
    attack_and_use(world, Place("folder"), attack)


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_http(world: World, attack: Attack) -> None:
    with serve_folder(world.folder) as url:
        attack_and_use(world, Place("http", url), attack)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_bucket(
    world: World, attack: Attack, endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in endpoint.items():
        monkeypatch.setenv(name, value)
    url = f"s3://experts/{attack.name.replace(' ', '-')}"
    attack_and_use(world, Place("bucket", url), attack)
