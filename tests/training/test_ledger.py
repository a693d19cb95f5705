"""The ledger of a run: all of its wall time, by kind, over several starts."""

import json
import time

import pytest

from composable.training import ledger as ledgers
from composable.training.ledger import LEDGER_FILE, Ledger
from composable.training.loop import fit
from tests.training.line_program import CFG, objective, parts


def read(folder):
    return [json.loads(line) for line in (folder / LEDGER_FILE).read_text().splitlines()]


def test_seconds_add_up_to_the_wall_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Ledger, "_ended", time.monotonic())
    began = time.time()
    with Ledger(tmp_path) as ledger:
        time.sleep(0.02)
        ledger.start(7)
        with ledger.charge("data"):
            time.sleep(0.02)
        time.sleep(0.03)
        ledger.end_step(8, is_due=True)
        time.sleep(0.02)
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [7, 8, 8]
    kinds = [set(line["seconds"]) for line in lines]
    assert kinds == [{"startup"}, {"data", "step"}, {"checkpoint"}]
    assert (lines[0]["processes"], lines[0]["devices"]) == (1, "1 x cpu")
    total = sum(sum(line["seconds"].values()) for line in lines)
    assert total == pytest.approx(lines[-1]["at"] - began, abs=0.02)
    assert Ledger._ended == pytest.approx(time.monotonic(), abs=1.0)


def test_short_steps_share_a_line(tmp_path, monkeypatch):
    with Ledger(tmp_path) as ledger:
        ledger.start(0)
        for step in range(1, 50):
            ledger.end_step(step)
    assert [line["step"] for line in read(tmp_path)] == [0, 49]
    monkeypatch.setattr(ledgers, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(ledgers, "_LINE_SHARE", 0.0)
    with Ledger(tmp_path) as ledger:
        ledger.start(49)
        ledger.end_step(50)
    assert [line["step"] for line in read(tmp_path)] == [0, 49, 49, 50, 50]


def test_a_line_that_a_kill_cut_does_not_spoil_the_next(tmp_path):
    (tmp_path / LEDGER_FILE).write_text('{"at": 1')
    with Ledger(tmp_path) as ledger:
        ledger.start(0)
    first, *others = (tmp_path / LEDGER_FILE).read_text().splitlines()
    assert first == '{"at": 1'
    assert all(json.loads(line)["step"] == 0 for line in others)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Ledger(None) as ledger:
        ledger.start(0)
        ledger.end_step(1, is_due=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_charges_what_it_does(tmp_path):
    fit(objective, *parts(), CFG, directory=tmp_path)
    fit(objective, *parts(), CFG, directory=tmp_path)  # all steps were done
    lines = read(tmp_path)
    starts = [line["step"] for line in lines if "startup" in line["seconds"]]
    assert starts == [0, CFG.steps]
    seconds = {kind for line in lines for kind in line["seconds"]}
    assert seconds == {"startup", "compile", "data", "step", "checkpoint"}
