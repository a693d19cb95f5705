import io
import json
import sys
import time
import warnings
from types import SimpleNamespace

import click
import pytest
from rich.console import Console

from composable import kernels, progress
from composable.cli import bars
from composable.cli.options import AS_JSON, PROCESS
from composable.cli.output import format_table, note, note_warnings, show, show_error
from composable.cli.routing import choose_format
from composable.cli.use import _print_pieces
from composable.errors import ContributionWarning, TrainingError
from composable.progress import show_bars


def test_each_expert_whose_contributions_count_as_zero_is_told_of_once(capsys):
    with note_warnings():
        for zeroed in (12, 13):
            warnings.warn(ContributionWarning("loud", zeroed, 512), stacklevel=1)
        warnings.warn(ContributionWarning("other", 1, 2), stacklevel=1)
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split(" contributions")[0] for line in told.err.splitlines()] == [
        "warning: expert loud: 12 of 512",
        "warning: expert other: 1 of 2",
    ]


def test_other_warnings_go_where_they_went():
    with pytest.warns(UserWarning, match="something else"), note_warnings():
        warnings.warn("something else", stacklevel=1)


HOSTILE = "red \x1b[31m \u202eback\nerror: fake  1.0"


def test_a_cell_stays_in_its_row(capsys):
    table = format_table(("NAME", "WHAT"), [("a", HOSTILE), ("b", "fine")])
    assert len(table.splitlines()) == 3
    show(table, None, as_json=False)
    assert "\x1b" not in capsys.readouterr().out


def test_a_note_is_one_line(capsys):
    note(HOSTILE)
    assert capsys.readouterr().err == "red \\x1b[31m \\u202eback\\nerror: fake  1.0\n"


def test_json_is_exact(capsys):
    show("", {"what": HOSTILE}, as_json=True)
    told = capsys.readouterr().out
    assert json.loads(told) == {"what": HOSTILE}
    assert "\x1b" not in told
    assert "\u202e" not in told


def test_a_bar_shows_its_label_as_text():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=200)
    with show_bars(is_transient=False, console=console) as update:
        update("evil \x1b]0;title\x07\u202e", 1, 2, "note \x1b[5m")
    assert "evil \\x1b]0;title\\x07\\u202e" in screen.getvalue()
    assert "note \\x1b[5m" in screen.getvalue()


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    seconds = iter([0, 4, 11, 12, 13, 24, 30, 31])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    log = io.StringIO()
    with show_bars(console=Console(file=log, width=20)) as update:
        for done in (0, 100, 200, 250):
            update("body and scout  ", done, 300, f"note {done}\x1b[5m")
        update("quick", 1, 1)  # at once, without any line
        update("body and scout  ", 300, 300)
        update("body and scout  ", 300, 300)
    assert log.getvalue().splitlines() == [
        "body and scout: 200/300, note 200\\x1b[5m",
        "body and scout: 300/300",
    ]
    with show_bars(counts_bytes=True, console=Console(file=log)) as update:
        update("weights", 2_500_000, None)
    assert len(log.getvalue().splitlines()) == 2


def test_generated_text_is_escaped_on_a_terminal_only(capsys, monkeypatch):
    pieces = [SimpleNamespace(text="a\tb\x1b[2J\n", weight_E=None)]
    _print_pieces(pieces, choose_format((), is_wanted=False))
    assert capsys.readouterr().out == "a\tb\x1b[2J\n\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _print_pieces(pieces, choose_format((), is_wanted=False))
    assert capsys.readouterr().out == "a\tb\\x1b[2J\n\n"


@pytest.mark.parametrize(("seconds", "soon"), [(0, 60), (0.2, 0)], ids=["there", "compiling"])
def test_kernels_are_said_to_compile_only_where_they_do(capsys, monkeypatch, seconds, soon):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(bars, "_SOON_SECONDS", soon)
    monkeypatch.setattr(kernels, "load_native", lambda: time.sleep(seconds))
    bars.await_kernels()
    said = capsys.readouterr().err
    assert ("compiling kernels for this processor, once" in said) == bool(seconds)
    bars.await_kernels(is_quiet=True)
    assert capsys.readouterr().err == ""


def test_an_error_in_a_run_of_many_processes_names_the_one_that_failed(capsys):
    ctx = click.Context(click.Command("train"))
    ctx.meta[PROCESS] = 3
    show_error(TrainingError("the loss is nan", where="step 7"), ctx)
    assert capsys.readouterr().err == "error: process 3: step 7: the loss is nan\n"
    ctx.meta[AS_JSON] = True
    show_error(TrainingError("the loss is nan"), ctx)
    assert json.loads(capsys.readouterr().out)["error"]["process"] == 3
