"""Adding up a ledger, and its page."""

import json

import pytest

from composable.errors import TrainingError
from composable.training.ledger import LEDGER_FILE
from composable.workflows.goodput import find_ledger, read_goodput, write_page
from composable.workflows.workspace import WORK

# A start that did 30 steps in three seconds each ten, and was killed; the next went on from 15.
LINES = [
    {"at": 102.0, "step": 0, "seconds": {"startup": 2.0}, "processes": 2, "devices": "2 x cpu"},
    {"at": 106.0, "step": 10, "seconds": {"compile": 1.0, "data": 0.5, "step": 2.5}},
    {"at": 110.0, "step": 20, "seconds": {"data": 1.0, "step": 2.0, "checkpoint": 1.0}},
    {"at": 113.0, "step": 30, "seconds": {"step": 3.0}},
    {"at": 123.0, "step": 15, "seconds": {"startup": 3.0}, "processes": 1, "devices": "1 x cpu"},
    {"at": 126.0, "step": 25, "seconds": {"step": 3.0}},
]


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / LEDGER_FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"at": 127')
    return path


def test_steps_that_were_done_again_are_lost(ledger):
    goodput = read_goodput(ledger)
    # Half of steps 11 to 20 with half of their data, and 21 to 30.
    assert goodput.seconds["lost"] == pytest.approx(0.5 * (2.0 + 1.0) + 3.0)
    assert goodput.seconds["step"] == pytest.approx(2.5 + 1.0 + 3.0)
    assert goodput.seconds["down"] == pytest.approx(7.0), "from the last line to the next start"
    assert goodput.seconds["checkpoint"] == pytest.approx(1.0)
    assert goodput.seconds.total == pytest.approx(126.0 - 100.0)
    assert goodput.share == pytest.approx(6.5 / 26.0)


def test_as_plain_data(ledger):
    data = read_goodput(ledger).to_dict()
    assert [(start["first_step"], start["last_step"]) for start in data["starts"]] == [
        (0, 30),
        (15, 25),
    ]
    assert data["wall_seconds"] == 26.0
    assert json.loads(json.dumps(data)) == data


def test_the_page_draws_every_start_over_the_wall_time(ledger, tmp_path):
    write_page(tmp_path / "page.html", read_goodput(ledger), "<run>")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;run&gt;" in page
    assert "25.0 % of 26 seconds" in page
    assert '<rect class="startup" x="0.00" y="0" width="61.54"' in page  # 2 of 26 seconds
    assert "http" not in page
    assert "<script" not in page


def test_the_ledger_is_found_in_an_expert_and_in_a_work_folder(ledger, tmp_path):
    assert find_ledger(tmp_path) == ledger
    expert = tmp_path / "expert"
    (expert / WORK).mkdir(parents=True)
    with pytest.raises(TrainingError, match=f"no {LEDGER_FILE}"):
        find_ledger(expert)
    ledger.rename(expert / WORK / LEDGER_FILE)
    assert find_ledger(expert).parent.name == WORK


def test_a_ledger_without_a_start_is_refused(tmp_path):
    (tmp_path / LEDGER_FILE).write_text("nothing\n")
    with pytest.raises(TrainingError, match="no start"):
        read_goodput(tmp_path / LEDGER_FILE)
