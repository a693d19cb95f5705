"""Every attack on a signed registry is refused, in a folder, over HTTP and in a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from composable.errors import SignatureError
from tests.packaging.conftest import make_interface
from tests.support.registry_attacks import ATTACKS, Attack, ask_for_lookalike
from tests.support.servers import run_s3
from tests.support.signed_registries import Place, World, build_world, serve_folder, use

GENUINE = {
    "names": ["french", "german"],
    "german": [("1.0.0", True), ("1.1.0", False)],
    "french": [("1.0.0", False)],
    "advisories": ["german-1"],
}


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("signed") / "world", make_interface())


@pytest.fixture
def world(genuine: World, tmp_path: Path) -> World:
    return genuine.copy(tmp_path / "world")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[dict[str, str]]:
    with run_s3() as environment:
        yield environment


def attack_and_use(world: World, place: Place, attack: Attack) -> None:
    """Let a client see the registry, then the attack, and check what the client does."""
    before = None
    if attack.saw is not None:
        world.restore(attack.saw)
        before = use(world.open("client", place.open(world)))
        world.restore("late")
    attack.run(world)
    client = world.open("client", place.open(world))
    if attack.refused_for is None:
        after = use(client)
        assert after == before
        assert {key: after[key] for key in GENUINE} == GENUINE
        return
    with pytest.raises(SignatureError) as refused:
        use(client)
        ask_for_lookalike(client)
    assert refused.value.kind == attack.refused_for, str(refused.value)
    assert refused.value.hint and refused.value.where


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
