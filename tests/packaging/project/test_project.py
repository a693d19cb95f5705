"""The project file: found upwards, edited without touching the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from composable.errors import ManifestError, PackagingError
from composable.files.user_files import replace_text
from composable.packaging import Constraint, Project, Requirement
from composable.packaging.project import project as project_module
from composable.packaging.project.project import Wanted

TEXT = """\
# What our team uses.
[project]
backbone = "tiny-bytes"   # the small one
registry = "public"

[registries]
public = "/srv/registry"
team = "../team"

[experts]
# Keep these in step.
german = "^1.2"     # news only
"set-mm" = { version = ">=1, <3", registry = "team" }

french = "~0.3"

[bindings]
private-base = "team"
"""


@pytest.fixture
def written(tmp_path: Path) -> Project:
    (tmp_path / "composable.toml").write_text(TEXT)
    return Project.read(tmp_path)


def test_reading(written: Project) -> None:
    assert written.backbone == "tiny-bytes"
    assert list(written.experts) == ["german", "set-mm", "french"]
    assert written.experts["set-mm"].constraint == Constraint(">=1, <3")
    assert written.registry_of("german") == "public"
    assert written.registry_of("set-mm") == "team"
    assert written.registry_of("private-base") == "team"
    assert written.registry_of("anything") == "public"
    assert written.lock is None
    with pytest.raises(ManifestError) as caught:
        written.open_registry("tema")
    assert caught.value.hint == "did you mean 'team'?"


def test_find_upwards(written: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    assert Project.find(deep).root == tmp_path.resolve()
    monkeypatch.chdir(deep)
    assert Project.find().experts == written.experts
    (tmp_path / "composable.toml").unlink()
    with pytest.raises(PackagingError, match=r"no composable\.toml in this directory or above"):
        Project.find(deep)


def test_create(tmp_path: Path) -> None:
    project = Project.create(tmp_path / "new", "tiny-bytes", {"local": "../registry"})
    assert project.default_registry == "local"
    assert project.experts == {}
    assert Project.read(project.root) == project
    with pytest.raises(PackagingError, match="already exists"):
        Project.create(tmp_path / "new", "other")
    assert Project.create(tmp_path / "bare", "tiny-bytes").registries == {}


def test_adding_touches_one_line(written: Project) -> None:
    project = written.add(Requirement.parse("dutch>=2"))
    lines = project.path.read_text().splitlines()
    assert set(lines) - set(TEXT.splitlines()) == {'dutch = ">=2"'}
    assert [line for line in lines if line != 'dutch = ">=2"'] == TEXT.splitlines()
    assert list(project.experts) == ["german", "set-mm", "french", "dutch"]


def test_changing_keeps_place_and_registry(written: Project) -> None:
    project = written.add(Requirement.parse("set-mm^2"))
    assert '"set-mm" = { version = "^2", registry = "team" }' in project.path.read_text()
    assert list(project.experts) == ["german", "set-mm", "french"]
    assert project.experts["set-mm"].registry == "team"
    moved = project.add(Requirement.parse("german"), registry="team")
    assert moved.registry_of("german") == "team"


def test_removing_restores(written: Project) -> None:
    project = written.add(Requirement.parse("dutch")).remove("dutch")
    assert project.path.read_text() == TEXT
    assert "german" not in project.remove("german").experts
    with pytest.raises(PackagingError) as caught:
        project.remove("germa")
    assert caught.value.hint == "did you mean 'german'?"


def test_a_file_without_experts(tmp_path: Path) -> None:
    (tmp_path / "composable.toml").write_text('[project]\nbackbone = "x"\n')
    project = Project.read(tmp_path).add(Requirement.parse("german^1"))
    assert project.experts["german"].constraint == Constraint("^1")


def test_what_cannot_be_edited_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "composable.toml"
    path.write_text(text := '[project]\nbackbone = "x"\nexperts = 3\n')
    with pytest.raises(ManifestError):
        Project.read(tmp_path).add(Requirement.parse("german^2"))
    assert path.read_text() == text


HEAD = '[project]\nbackbone = "x"\n'
TAIL = "\n# Where our own packages are.\n[bindings]\n"


@pytest.mark.parametrize(
    ("before", "changed", "added", "removed"),
    [
        pytest.param(
            f'{HEAD}\n[experts]\ngerman = "^1"  # news\n# french = "^1"\n{TAIL}',
            f'{HEAD}\n[experts]\ngerman = "^2"  # news\n# french = "^1"\n{TAIL}',
            f'{HEAD}\n[experts]\ngerman = "^1"  # news\ndutch = "^2"\n# french = "^1"\n{TAIL}',
            f'{HEAD}\n[experts]\n# french = "^1"\n{TAIL}',
            id="comments",
        ),
        pytest.param(
            f'{HEAD}\n[experts]\ngerman = {{ version = "^1", extras = [\n  "code",\n] }}\n{TAIL}',
            f'{HEAD}\n[experts]\ngerman = "^2"\n{TAIL}',
            f'{HEAD}\n[experts]\ngerman = {{ version = "^1", extras = [\n  "code",\n] }}\n'
            f'dutch = "^2"\n{TAIL}',
            f"{HEAD}\n[experts]\n{TAIL}",
            id="several-lines",
        ),
        pytest.param(
            f'{HEAD}\n[experts]\nnote = "^1"\n\n[experts.german]\nversion = "^1"  # news\n{TAIL}',
            f'{HEAD}\n[experts]\nnote = "^1"\n\n[experts.german]\nversion = "^2"  # news\n{TAIL}',
            f'{HEAD}\n[experts]\nnote = "^1"\ndutch = "^2"\n\n[experts.german]\nversion = "^1"'
            f"  # news\n{TAIL}",
            f'{HEAD}\n[experts]\nnote = "^1"\n{TAIL}',
            id="sub-table",
        ),
        pytest.param(
            f'experts = {{ german = "^1" }}  # all\n{HEAD}',
            f'experts = {{ german = "^2" }}  # all\n{HEAD}',
            f'experts = {{ german = "^1", dutch = "^2" }}  # all\n{HEAD}',
            f"experts = {{}}  # all\n{HEAD}",
            id="inline",
        ),
        pytest.param(
            f'{HEAD}[experts]\ngerman.version = "^1"\ngerman.extras = ["code"]\n',
            f'{HEAD}[experts]\ngerman.version = "^2"\n',
            f'{HEAD}[experts]\ngerman.version = "^1"\ngerman.extras = ["code"]\ndutch = "^2"\n',
            f"{HEAD}[experts]\n",
            id="dotted-keys",
        ),
        pytest.param(
            f'[experts]\nnote = "^1"\n{HEAD}[experts.german]\nversion = "^1"\n',
            f'[experts]\nnote = "^1"\n{HEAD}[experts.german]\nversion = "^2"\n',
            f'[experts]\nnote = "^1"\ndutch = "^2"\n{HEAD}[experts.german]\nversion = "^1"\n',
            f'[experts]\nnote = "^1"\n{HEAD}',
            id="split",
        ),
        pytest.param(
            f"{HEAD}\n[experts]\n# Ours.\n{TAIL}",
            f'{HEAD}\n[experts]\n# Ours.\ngerman = "^2"\n{TAIL}',
            f'{HEAD}\n[experts]\n# Ours.\ndutch = "^2"\n{TAIL}',
            None,
            id="empty",
        ),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_edits_keep_the_rest(
    tmp_path: Path, before: str, changed: str, added: str, removed: str | None, newline: str
) -> None:
    def edit(change: Callable[[Project], object]) -> str:
        path.write_bytes(before.replace("\n", newline).encode())
        change(Project.read(tmp_path))
        return path.read_bytes().decode()

    path = tmp_path / "composable.toml"
    assert edit(lambda p: p.add(Requirement.parse("german^2"))) == changed.replace("\n", newline)
    assert edit(lambda p: p.add(Requirement.parse("dutch^2"))) == added.replace("\n", newline)
    if removed is not None:
        assert edit(lambda p: p.remove("german")) == removed.replace("\n", newline)


def test_fields_of_a_sub_table(tmp_path: Path) -> None:
    path = tmp_path / "composable.toml"
    path.write_text(f'{HEAD}[registries]\na = "a"\n[experts.german]\nversion = "1"\n{TAIL}')
    Project.read(tmp_path).add(Requirement.parse("german[code]^2"), registry="a")
    fields = 'version = "^2"\nextras = ["code"]\nregistry = "a"\n'
    assert path.read_text() == f'{HEAD}[registries]\na = "a"\n[experts.german]\n{fields}{TAIL}'


def test_a_registry_that_is_not_named(written: Project) -> None:
    with pytest.raises(ManifestError, match="no registry 'nowhere'"):
        written.add(Requirement.parse("dutch"), registry="nowhere")
    assert written.path.read_text() == TEXT


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("[project]", "[projekt]", "project"),
        ('backbone = "tiny-bytes"', "backbone = 3", "project.backbone"),
        ('registry = "public"', 'registry = "pulic"', "project.registry"),
        ('registry = "team"', 'registry = "tema"', "experts.set-mm.registry"),
        ('private-base = "team"', 'private-base = "tema"', "bindings.private-base"),
        ('german = "^1.2"', 'german = "new"', "experts.german"),
        ('german = "^1.2"', "german = 1.2", "experts.german"),
        ('german = "^1.2"', 'Deutsch = "^1"', "experts.Deutsch"),
        ('german = "^1.2"', "german = { }", "experts.german.version"),
        (
            'german = "^1.2"',
            'german = { path = "../x", version = "1" }',
            "experts.german.version",
        ),
        (
            'german = "^1.2"',
            'german = { version = "1", editable = true }',
            "experts.german.editable",
        ),
        ("french =", "[experts.french]\nx =", "experts.french.version"),
    ],
)
def test_errors_say_where(tmp_path: Path, old: str, new: str, where: str) -> None:
    assert old in TEXT
    (tmp_path / "composable.toml").write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ManifestError) as caught:
        Project.read(tmp_path)
    assert caught.value.where == f"composable.toml: {where}"


def test_several_registries_need_a_default(tmp_path: Path) -> None:
    (tmp_path / "composable.toml").write_text(TEXT.replace('registry = "public"', "", 1))
    project = Project.read(tmp_path)
    assert project.registry_of("set-mm") == "team"
    with pytest.raises(ManifestError, match="no registry for 'german'"):
        project.registry_of("german")


def test_several_changes_are_one_write(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        project_module,
        "replace_text",
        lambda path, text: (written.append(text), replace_text(path, text)),
    )
    wanted = {name: Wanted(constraint=Constraint("^1")) for name in ("german", "french")}
    project = project.change(wanted)
    assert list(project.experts) == ["german", "french"]
    with pytest.raises(PackagingError, match="no expert 'dutch' in the project"):
        project.remove("german", "dutch")
    assert Project.read(project.root) == project, "all or nothing"
    assert project.remove("german", "french").experts == {}
    assert len(written) == 2


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null", "composable.toml", "."])
def test_a_project_file_that_is_none_hides_no_project_above(tmp_path: Path, target: str) -> None:
    Project.create(tmp_path, "tiny-bytes")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "composable.toml").symlink_to(target)
    with pytest.raises(PackagingError, match=r"inner.composable\.toml"):
        Project.find(inner)
