"""The user's guide: every command in it works, in its order, and prints what it shows."""

import re
import shlex
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "users-guide.md"


def read_sessions(text):
    """Return commands and the output that is shown for them; none shown is not compared."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    sessions = re.split(r"^\$ ", "".join(blocks), flags=re.MULTILINE)[1:]
    return [tuple(session.partition("\n")[::2]) for session in sessions]


@pytest.mark.skipif(not GUIDE.exists(), reason="the guides are part of a checkout only")
def test_users_guide(works, fakes, tmp_path, monkeypatch):
    fakes.publish("python-code")
    fakes.publish("set-mm", seed=1)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    for command, shown in read_sessions(GUIDE.read_text()):
        program, name, *arguments = shlex.split(command)
        assert program == "composable"
        if name != "generate":  # which needs jax and has a test of its own
            printed = works(name, *arguments).out
            assert shown in ("", printed), command
