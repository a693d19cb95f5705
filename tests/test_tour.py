"""The notebook that shows a newcomer around: every cell runs, and shows what its text says."""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
REGISTRY = ROOT / "demo" / "registry"


@pytest.mark.skipif(
    not REGISTRY.exists() and "CI" not in os.environ, reason="`make demo` makes its registry"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib")
def test_tour(monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "docs" / "guides" / "tour.ipynb").read_text())["cells"]
    names = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"tour.ipynb, cell {number}", "exec"), names)
    assert names["same"], "removing and installing again must restore every bit"
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "backbone" in line]
    (program, speech) = (
        {k: float(v) for k, v in zip(row[2::2], row[3::2], strict=True)} for row in rows
    )
    assert program["mix"] < program["backbone"] - 1
    assert abs(speech["mix"] - speech["backbone"]) < 0.2
