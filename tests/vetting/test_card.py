import json
import shutil
from pathlib import Path

import pytest

from composable.errors import VettingError
from composable.files.records import parse_record
from composable.interface import digest_bytes
from composable.vetting.card import CARD_FILE, Card, CardInterface, format_card, require_passed

OLD_CARDS = Path("benchmarks/results/cards")


@pytest.fixture
def folder(trained_folder, tmp_path):
    return shutil.copytree(trained_folder, tmp_path / "logic")


def change_card(folder, **changes):
    card = json.loads((folder / CARD_FILE).read_text())
    (folder / CARD_FILE).write_text(json.dumps({**card, **changes}))


def test_a_vetted_expert_may_be_published(folder, loaded):
    card = require_passed(folder, loaded.interface)
    assert card.expert == "logic@1.0.0"
    assert card.interface == CardInterface(name="tiny", digest=loaded.interface.digest)
    for name, digest in card.tensors.items():
        assert digest == digest_bytes((folder / name).read_bytes())
    assert "composable check" in card.measure_again


def test_publishing_without_a_card_is_refused(folder, loaded):
    (folder / CARD_FILE).unlink()
    with pytest.raises(VettingError, match="was not vetted") as caught:
        require_passed(folder, loaded.interface)
    assert "composable check" in caught.value.hint


@pytest.mark.parametrize("name", ["body.safetensors", "scout.safetensors"])
def test_tensors_that_changed_since_must_be_vetted_again(folder, loaded, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(VettingError, match="changed since they were vetted"):
        require_passed(folder, loaded.interface)


def test_a_card_for_another_interface_is_refused(folder, tiny):
    with pytest.raises(VettingError, match="another interface"):
        require_passed(folder, tiny.interface)


def test_a_failed_check_is_reported_with_its_figures(folder, loaded):
    checks = [{"name": "gain", "passed": False, "found": "3 to 3", "expected": "1% less"}]
    change_card(folder, checks=checks, passed=False)
    with pytest.raises(VettingError, match="gain: 3 to 3, expected 1% less"):
        require_passed(folder, loaded.interface)


def test_a_card_that_contradicts_itself_is_refused(folder, loaded):
    checks = [{"name": "gain", "passed": False, "found": "3 to 3", "expected": "1% less"}]
    change_card(folder, checks=checks, passed=True)
    with pytest.raises(VettingError, match="gain"):
        require_passed(folder, loaded.interface)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"tensors": 3}', '{"interface": []}'])
def test_a_damaged_card_is_refused(folder, loaded, text):
    (folder / CARD_FILE).write_text(text)
    with pytest.raises(VettingError):
        require_passed(folder, loaded.interface)


def test_old_cards_are_read_and_written_unchanged():
    root = Path(__file__).parents[2]
    blobs = (root / "tests/golden/0.1.0/registry/blobs").glob("*/*")
    texts = [data for file in blobs if (data := file.read_bytes()).startswith(b'{\n  "expert"')]
    texts += [file.read_bytes() for file in (root / OLD_CARDS).glob("*.json")]
    assert len(texts) >= 4
    for text in texts:
        assert format_card(parse_record(Card, text, CARD_FILE)).encode() == text.rstrip() + b"\n"


def test_a_figure_that_is_not_finite_stays_on_the_card(folder):
    card = parse_record(Card, (folder / CARD_FILE).read_bytes(), CARD_FILE)
    card.measured["gain"] = None
    assert json.loads(format_card(card))["measured"]["gain"] is None


def test_fields_of_later_versions_are_ignored(folder, loaded):
    change_card(folder, added_later=[1])
    assert require_passed(folder, loaded.interface).passed
