"""The guide "Maintain an expert together", played in small; and the workflow file for GitHub."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from composable.cli.app import app
from composable.corpora.documents import Document, write_documents
from composable.packaging.registry.locations import open_for_publishing, open_inbox
from tests.support.tiny import PRIVATE_WORDS

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "maintain-together.md"
WORKFLOW = GUIDE.with_name("review-on-github.yml")

pytestmark = pytest.mark.skipif(not GUIDE.exists(), reason="guides are part of a checkout only")


def run(command):
    """Run a command as a shell does, ours in this process; return what it printed."""
    first, *others = re.split(r" (&&|\|\|) ", command)
    program, *arguments = shlex.split(first)
    if program != "composable":
        subprocess.run(["bash", "-ec", command], check=True)
        return ""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if others:  # `first && second || third`
        assert others[0::2] == ["&&", "||"]
        return run(others[1] if result.exit_code == 0 else others[3])
    assert result.exit_code == 0, (command, result.output)
    return result.stdout


def test_the_guide(loaded, tiny, tmp_path, monkeypatch):
    """Its commands, one after the other, with a tiny backbone, few steps and words for texts."""
    texts = tmp_path / "experts" / "legal" / "text"
    texts.mkdir(parents=True)
    for name, count, seed in (("train", 60, 0), ("heldout", 24, 100)):
        words = [tiny.text(PRIVATE_WORDS, seed=seed + i, length=200) for i in range(count)]
        documents = [Document(f"{name}/{i}", text) for i, text in enumerate(words)]
        write_documents(texts / f"{name}.jsonl", documents)
    (tmp_path / "team").mkdir()
    monkeypatch.chdir(tmp_path / "team")
    monkeypatch.setenv("COMPOSABLE_KEYS", str(tmp_path / "keys"))
    shutil.copytree(loaded.folder, "tiny")
    first, *blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert first.startswith("make setup\n")
    printed = {}
    for command in "".join(blocks).replace("\\\n", "").splitlines():
        small = command.replace("--steps 100", "--steps 30")
        if small.startswith("composable new"):
            small += " --backbone tiny"
        printed[command] = run(small)
    registry = open_for_publishing("registry")
    releases = registry.versions("contracts")
    is_merged = len(releases) == 3
    versions = ["1.0.0", "1.0.1", "1.0.2"][: 2 + is_merged]
    assert [str(release.version) for release in releases] == versions
    for release in releases[1:]:
        provenance = registry.read_manifest(release).provenance
        assert provenance is not None and provenance.proposer.startswith("ed25519:")
        assert provenance.base == "contracts@1.0.0"
    states = [received.state for received in open_inbox("registry").entries()]
    assert sorted(states) == ["accepted", "accepted" if is_merged else "rejected"]
    assert "contracts@1.0.1" in printed["composable review registry"]


def test_the_workflow_is_one(tmp_path):
    """It fits GitHub's schema, and the check finds a misspelt key."""
    command = [sys.executable, "-m", "check_jsonschema"]
    schema = ["--builtin-schema", "vendor.github-workflows"]
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOW.read_text().replace("    runs-on:", "    run-on:"))
    codes = [
        subprocess.run([*command, *schema, str(file)], capture_output=True).returncode
        for file in (WORKFLOW, broken)
    ]
    assert codes == [0, 1]


@pytest.fixture
def commands(tmp_path):
    """Return the environment of a shell that finds our `composable` and Python."""
    home = tmp_path / "bin"
    home.mkdir()
    for name, module in (("composable", "-m composable.cli"), ("python", "")):
        script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n'
        (home / name).write_text(script)
        (home / name).chmod(0o755)
    return {**os.environ, "PATH": f"{home}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def test_the_workflow_reviews_a_pull_request(
    loaded, trained_folder, tiny, tmp_path, monkeypatch, commands
):
    """Its steps are run, in order, on a repository with a pull request and a registry."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=repository, check=True)

    registry = tmp_path / "published"
    open_for_publishing(registry).publish(trained_folder, interface=loaded.interface)
    repository = tmp_path / "repository"
    (repository / "held-out").mkdir(parents=True)
    documents = [Document(f"{i}", tiny.text(PRIVATE_WORDS, seed=100 + i)) for i in range(8)]
    write_documents(repository / "held-out" / "proofs.jsonl", documents)
    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-qm", "Held-out text")
    git("checkout", "-qb", "change")
    for name in ("expert.toml", "body.safetensors", "scout.safetensors"):
        shutil.copy(trained_folder / name, repository)
    manifest = repository / "expert.toml"
    line = 'name = "logic"\n'
    manifest.write_text(
        manifest.read_text().replace(line, f'{line}derives-from = "logic@1.0.0"\n', 1)
    )
    shutil.rmtree(repository / "held-out")  # what the pull request says of the text is not read
    git("add", ".")
    git("commit", "-qam", "Describe it better")

    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(loaded.folder, work / "tiny")
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["review"]
    assert yaml.safe_load(WORKFLOW.read_text())["permissions"] == {"contents": "read"}
    title = 'Better "$(touch executed)" | `touch executed`'
    environment = {
        **commands,
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "REGISTRY": str(registry),
        "EXPERT": ".",
        "TEXT": "held-out",
        "TITLE": title,
        "NUMBER": "7",
    }
    assert job["env"].keys() <= environment.keys()
    branches = {"proposed": "change", "base": "main"}
    done = []
    for step in job["steps"]:
        if step.get("uses", "").startswith("actions/checkout@"):
            path = step["with"]["path"]
            git("worktree", "add", "-q", "--detach", str(work / path), branches[path])
        elif "run" in step and "pip install" not in step["run"]:
            assert "${{" not in step["run"], "values from outside come by the environment"
            shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
            subprocess.run(shell, cwd=work, env=environment, check=True)
            done.append(step["name"])
    assert done == ["Copy the registry", "Propose the change", "Review it", "Show the verdict"]
    kept = next(step for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
    assert (work / kept["with"]["path"] / "verdict.html").is_file()
    verdict = json.loads((work / "review" / "verdict.json").read_text())
    assert verdict["passed"] and verdict["base"] == "logic@1.0.0"
    summary = (tmp_path / "summary.md").read_text()
    assert "can be accepted" in summary and "| triggers | ok |" in summary
    assert not (work / "executed").exists()
