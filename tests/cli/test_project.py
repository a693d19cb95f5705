"""From `init` to `rollback`, through the commands."""

import os
import shutil
import subprocess
import sys

import pytest

from composable.packaging.install.lock import Lock
from composable.packaging.project.project import Project


def versions(path):
    return {name: str(version) for name, version in Lock.read(path).versions.items()}


def installed(path):
    return {str(m.name): str(m.version) for m in Project.read(path).environment.manifests()}


def test_init_writes_a_project_once(works, cli, tmp_path):
    works("init", "--registry", "house=../registry")
    project = Project.read(tmp_path)
    assert (project.backbone, dict(project.registries)) == ("tiny-bytes", {"house": "../registry"})
    outcome = cli("init")
    assert outcome.code == 1
    assert "already exists" in outcome.err


def test_init_refuses_an_unknown_backbone(cli, tmp_path):
    outcome = cli("init", "--backbone", "nowhere")
    assert outcome.code == 1
    assert "no backbone 'nowhere'" in outcome.err
    assert not (tmp_path / "composable.toml").exists()


def test_install_asks_locks_and_installs(works, project):
    assert works("install", "german>=1.0,<2", "physics").out.splitlines() == [
        "+ german 1.2.0",
        "+ physics 1.0.0",
    ]
    assert versions(project) == installed(project) == {"german": "1.2.0", "physics": "1.0.0"}
    assert works("sync", "--frozen").out == "nothing to change: 2 experts\n"


def test_add_only_asks(works, project):
    works("add", "german<2")
    assert 'german = "<2"' in (project / "composable.toml").read_text()
    assert not (project / "composable.lock").exists()
    works("sync")
    assert installed(project) == {"german": "1.2.0"}


def test_remove_and_sync_uninstall(works, project):
    works("install", "german<2", "physics")
    works("remove", "physics")
    assert works("sync").out == "- physics 1.0.0\n"
    assert installed(project) == {"german": "1.2.0"}


def test_remove_names_the_closest(cli, works, project):
    works("add", "physics")
    assert "did you mean 'physics'?" in cli("remove", "physic").err


@pytest.mark.parametrize("command", ["install german", "lock", "sync", "add german", "upgrade"])
def test_dry_run_writes_nothing(works, project, command):
    def snapshot():
        return {
            path: path.read_bytes()
            for path in project.rglob("*")
            if path.is_file() and project / "registry" not in path.parents
        }

    before = snapshot()
    works(*command.split(), "--dry-run")
    assert snapshot() == before


def test_dry_run_says_what_would_happen(works, project):
    outcome = works("install", "german", "--dry-run", "--json")
    assert outcome.json["changes"] == [{"name": "german", "before": None, "after": "2.0.0"}]


def test_quiet_prints_nothing(works, project):
    assert works("install", "german", "--quiet").out == ""


def test_lock_keeps_what_was_locked_until_told(works, project, fakes):
    works("install", "german<2")
    fakes.publish("german", "1.3.0", seed=4)
    assert works("lock").out == "nothing to change: 1 expert\n"
    assert works("lock", "--upgrade-package", "physics").out == "nothing to change: 1 expert\n"
    assert works("lock", "--upgrade-package", "german").out == "~ german 1.2.0 -> 1.3.0\n"
    assert installed(project) == {"german": "1.2.0"}


def test_upgrade_then_rollback(works, project, fakes):
    works("install", "german<2")
    before = (project / "composable.lock").read_bytes()
    fakes.publish("german", "1.3.0", seed=4)
    assert works("upgrade").out == "~ german 1.2.0 -> 1.3.0\n"
    assert works("rollback").out == "~ german 1.3.0 -> 1.2.0\n"
    assert (project / "composable.lock").read_bytes() == before
    assert installed(project) == {"german": "1.2.0"}


def test_rollback_of_an_install_says_that_the_project_asks_for_more(works, project):
    works("install", "german<2")
    works("install", "physics")
    assert "physics is required but not locked" in works("rollback").err


def test_rollback_without_a_past(cli, project):
    outcome = cli("rollback")
    assert outcome.code == 1
    assert "no previous generation" in outcome.err


@pytest.mark.parametrize("command", ["add", "install"])
def test_unknown_expert_changes_nothing_and_names_the_closest(cli, project, command):
    before = (project / "composable.toml").read_text()
    outcome = cli(command, "germn", "--json")
    assert outcome.code == 1
    assert outcome.json["error"]["kind"] == "UnknownExpertError"
    assert outcome.json["error"]["hint"] == "did you mean 'german'?"
    assert (project / "composable.toml").read_text() == before


def test_what_cannot_be_resolved_changes_nothing(cli, project):
    before = (project / "composable.toml").read_text()
    outcome = cli("install", "german>=2", "physics")
    assert outcome.code == 1
    assert "physics" in outcome.err
    assert "german" in outcome.err
    assert (project / "composable.toml").read_text() == before
    assert not (project / "composable.lock").exists()


def test_wrong_interface_version_is_refused_with_its_reason(cli, project, fakes):
    own = fakes.interface.digest
    fakes.publish("from-the-future", needs="^9.0", digest=own)
    outcome = cli("install", "from-the-future")
    assert outcome.code == 1
    assert "router interface" in outcome.err
    assert "^9.0" in outcome.err


def test_wrong_interface_digest_is_refused_with_its_reason(cli, project, fakes):
    fakes.publish("from-elsewhere", digest="sha256:" + "0" * 64)
    outcome = cli("install", "from-elsewhere")
    assert outcome.code == 1
    assert "does not honour" in outcome.err


def test_stale_lock_is_refused_when_frozen_and_mended_otherwise(cli, works, project):
    works("install", "german<2")
    works("add", "physics")
    outcome = cli("sync", "--frozen")
    assert outcome.code == 1
    assert "physics is required but not locked" in outcome.err
    assert "run `composable lock`" in outcome.err
    assert works("sync").out == "+ physics 1.0.0\n"


def test_missing_lock_is_refused_when_frozen(cli, project):
    assert "no lock file" in cli("sync", "--frozen").err


def test_wrong_digest_installs_nothing(cli, works, project, fakes):
    works("add", "german<2")
    works("lock")
    body = Lock.read(project)["german"].files[0]
    fakes.spoil(body.digest)
    outcome = cli("sync")
    assert outcome.code == 1
    assert "german 1.2.0" in outcome.err
    assert body.digest in outcome.err
    assert installed(project) == {}


def test_bad_project_file_is_named_by_dotted_path(cli, project):
    with (project / "composable.toml").open("a") as file:
        file.write('german = ">=banana"\n')
    assert "error: composable.toml: experts.german: " in cli("lock").err


def test_two_registries_an_expert_comes_from_the_one_it_is_bound_to(works, make_fakes, tmp_path):
    make_fakes("house").publish("german", "1.0.0")
    make_fakes("world").publish("german", "9.0.0", seed=1)
    works("init", "--registry", "house=house", "--registry", "world=world")
    works("install", "german")
    assert installed(tmp_path) == {"german": "1.0.0"}
    works("install", "german", "--registry", "world")
    assert installed(tmp_path) == {"german": "9.0.0"}
    assert Lock.read(tmp_path)["german"].registry == "world"


def test_registry_that_the_project_does_not_name(cli, project):
    outcome = cli("install", "german", "--registry", "defalt")
    assert outcome.code == 1
    assert "did you mean 'default'?" in outcome.err


def test_no_registry(cli, works):
    works("init")
    outcome = cli("install", "german")
    assert outcome.code == 1
    assert "no registry for 'german'" in outcome.err


def test_no_experts(works, project):
    assert works("sync").out == "nothing to change: 0 experts\n"
    assert works("list").out == "no experts installed\n"


def test_installed_once_needs_no_registry_again(works, project):
    works("install", "german<2")
    (project / "registry").rename(project / "elsewhere")
    works("sync")
    shutil.rmtree(project / ".composable")
    assert works("sync", "--frozen").out == "+ german 1.2.0\n"


def complete(words):
    """Return what the shell would offer for the last of some words."""
    environment = {
        **os.environ,
        "_COMPOSABLE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    command = [sys.executable, "-m", "composable.cli"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_shell_is_offered_commands_options_and_names(works, project):
    works("install", "physics")
    assert complete("composable ins") == ["install"]
    assert complete("composable sync --f") == ["--frozen", "--from"]
    assert complete("composable why ") == ["german", "physics"]
    assert complete("composable remove p") == ["physics"]


def test_links_to_shared_files_stay_links(works, make_fakes, tmp_path):
    """Two folders share a project file and a lock by links; the shared ones are written."""
    fakes = make_fakes("registry")
    fakes.publish("german")
    fakes.publish("physics", seed=1)
    works("init", "--registry", str(tmp_path / "registry"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "composable.toml").rename(tmp_path / "shared/composable.toml")
    for name in ("composable.toml", "composable.lock"):
        (tmp_path / name).symlink_to(f"shared/{name}")
    works("install", "german")
    works("install", "physics")
    works("remove", "german")
    works("sync")
    works("rollback")
    works("upgrade")
    for name in ("composable.toml", "composable.lock"):
        assert (tmp_path / name).is_symlink()
        assert "physics" in (tmp_path / "shared" / name).read_text()
    assert 'name = "german"' not in (tmp_path / "shared/composable.lock").read_text()


def test_a_file_in_another_encoding_says_so(cli, works, tmp_path):
    works("init")
    file = tmp_path / "composable.toml"
    text = file.read_text()
    file.write_bytes(text.encode("utf-16"))
    told = cli("lock").err
    assert "the text is UTF-16, expected UTF-8" in told
    assert "convert it with `iconv -f UTF-16 -t UTF-8`" in told
    file.write_text(text, encoding="utf-8-sig")
    works("lock")
