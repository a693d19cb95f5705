"""Running the demo: its folder, a contributor that fails, and what is printed at the end."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from composable.assembly.backbones import LoadedBackbone
from composable.demo.contribution import Contribution, run_contribution
from composable.demo.result import DemoResult
from composable.demo.run import CONTRIBUTORS, StepCosts, print_result, read_held_out, run_demo
from composable.errors import ComposableError, TrainingError
from composable.files.records import parse_record

RUNS = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "demo_seeds.json").read_text()
)["runs"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ComposableError, match="not empty and was not made by the demo"):
        run_demo(tmp_path, console=Console(file=io.StringIO()))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_contributor_that_fails_is_reported_with_its_log(tmp_path: Path) -> None:
    contribution = Contribution(
        folder=tmp_path / CONTRIBUTORS[0],
        backbone=tmp_path / "no-backbone",
        registry=tmp_path / "registry",
        keys=tmp_path / "keys",
        steps=1,
        seed=0,
        unreadable=tmp_path / "other.jsonl",
    )
    labels: list[str] = []
    with pytest.raises(TrainingError, match=r"(?s)ended with status 1.*no-backbone") as caught:
        run_contribution(contribution, lambda label, *_, **__: labels.append(label.rstrip()))
    assert caught.value.where == CONTRIBUTORS[0]
    assert labels == [f"{CONTRIBUTORS[0]}: body and scout"]


@pytest.mark.slow
def test_a_contributor_reads_programs_and_cannot_write_them(
    tmp_path: Path, loaded: LoadedBackbone
) -> None:
    """It starts, reports what confines it, and fails: the backbone is not the expert's."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (tmp_path / "keys").mkdir()
    contribution = Contribution(
        folder=tmp_path / CONTRIBUTORS[0],
        backbone=loaded.folder,
        registry=tmp_path / "registry",
        keys=tmp_path / "keys",
        steps=1,
        seed=0,
        unreadable=tmp_path / "other.jsonl",
        programs=programs,
    )
    (tmp_path / "other.jsonl").write_text("text of another contributor")
    with pytest.raises(TrainingError, match=r"(?s)ended with status 1.*tiny-bytes"):
        run_contribution(contribution, lambda *_, **__: None)
    assert not list(programs.iterdir())


def test_spliced_texts_depend_on_the_seed_alone() -> None:
    texts = read_held_out(0)
    assert list(texts.domains) == list(CONTRIBUTORS)
    assert texts.spliced == read_held_out(0).spliced
    assert texts.spliced != read_held_out(1).spliced


def test_costs_are_recorded_by_step() -> None:
    costs = StepCosts()
    with costs.record("one"):
        pass
    with costs.record("two"):
        pass
    assert list(costs.seconds) == list(costs.memory) == ["one", "two"]
    assert min(costs.memory.values()) > 1_000_000


def test_the_printed_command_can_be_copied(tmp_path: Path) -> None:
    result = parse_record(DemoResult, json.dumps(RUNS[0]), "demo_seeds.json")
    out = io.StringIO()
    project = tmp_path / "a long folder [red] with spaces" / ("x" * 80) / "project"
    print_result(Console(file=out, width=80), result, tmp_path / "report.html", project)
    lines = out.getvalue().splitlines()
    assert f"Report: {tmp_path / 'report.html'}" in lines
    command = shlex.split(lines[-1])
    assert command[:3] == ["cd", str(project), "&&"]
    at = command.index("generate")
    program = command[3:at]
    # From another folder, with no environment activated.
    shown = subprocess.run(
        [*program, "--help"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert shown.returncode == 0 and b"generate" in shown.stdout
    assert command[at + 1 : at + 3] == ["--prompts", "prompts.jsonl"]
    for item in result.properties:
        assert any(line.startswith(f"✓ {item.name}  ") for line in lines)
    assert "does not hold" not in out.getvalue()
