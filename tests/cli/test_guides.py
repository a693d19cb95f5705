"""What is written for users is so: commands of the guide work, and the bound that is promised."""

import math
import re
import shlex
from pathlib import Path

import pytest

from composable.packaging.manifests.backbone_folder import find_backbone, read_interface

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "use.md"


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


@pytest.mark.skipif(not GUIDE.exists(), reason="the guides are part of a checkout only")
@pytest.mark.parametrize("page", ["README.md", "docs/concepts/overview.md"])
def test_the_bound_that_is_promised_is_that_of_the_shipped_interface(page):
    interface = read_interface(find_backbone("tiny-bytes"))
    per_document = interface.safe_bound(0) / math.log(2)
    per_byte = interface.safe_bound(1) / math.log(2) - per_document
    text = " ".join((ROOT / page).read_text().split())
    promised = re.search(r"([\d.]+) bits (?:per|a) document and ([\d.]+) bits (?:per|a) byte", text)
    assert promised is not None
    assert float(promised[1]) == pytest.approx(per_document, abs=1e-4)
    assert float(promised[2]) == pytest.approx(per_byte, abs=5e-6)


@pytest.mark.skipif(not GUIDE.exists(), reason="the guides are part of a checkout only")
def test_guide_to_what_you_run(works, cli, fakes, tmp_path, monkeypatch):
    fakes.publish("german", "1.2.0")
    fakes.publish("german", "1.2.1", seed=1)
    fakes.publish("physics", requires={"german": "^1"}, seed=2)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    works("init", "--registry", "../registry")
    works("install", "german@1.2.0", "physics")
    page = (GUIDE.parent / "know-what-you-run.md").read_text()
    sessions = read_sessions(page)
    assert len(sessions) == 6
    for command, shown in sessions:
        program, name, *arguments = shlex.split(command.replace("sha256:…", "sha256:" + "1" * 64))
        assert program == "composable"
        printed = works(name, *arguments).out
        assert shown in ("", printed), command
        if "--fixed" in arguments:
            table, _, remedies = cli("audit").out.partition("german-2026-1:")
            assert table in page, "the table that the page shows is that of the command"
            assert "1.2.1" in remedies


@pytest.mark.skipif(not GUIDE.exists(), reason="the guides are part of a checkout only")
def test_guide_to_signing(works, make_fakes, tmp_path, monkeypatch):
    """Every command of the page runs in its order, on one machine that has all keys."""
    monkeypatch.setenv("COMPOSABLE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("COMPOSABLE_PASSPHRASE", "secret")
    monkeypatch.chdir(tmp_path)
    page = (GUIDE.parent / "sign-your-registry.md").read_text()
    sessions = read_sessions(page)
    assert len(sessions) == 8
    key, done = "", []
    for command, _ in sessions:
        if "revoke" in done and "ed25519:…" in command:
            key = works("registry", "key", "alice-2").out.strip()
        program, name, *arguments = shlex.split(command.replace("ed25519:…", key))
        assert (program, name) == ("composable", "registry")
        printed = works(name, *arguments).out
        if arguments[0] == "key":
            key = printed.strip()
        done.append(arguments[0])
        if arguments[0] == "grant" and "revoke" not in done:
            make_fakes("registry").publish("german")  # "The publisher publishes as before"
    assert done == ["init", "key", "grant", "sign", "sign", "revoke", "grant", "sign"]
    works("init", "--registry", "registry")
    works("install", "german")
    assert f"german is signed by alice ({key})" in works("verify", "--signatures").out
