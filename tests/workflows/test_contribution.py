"""A contributor's path and a user's: train, check, publish, load, generate."""

import json
import shutil

import numpy as np
import pytest

import composable as cx
from composable.assembly.experts import load_expert
from composable.errors import (
    InterfaceError,
    PackagingError,
    TensorFileError,
    TextError,
    TrainingError,
    VettingError,
)
from composable.packaging.registry.locations import open_for_publishing
from composable.training.config import TrainConfig
from composable.workflows.publish import publish_expert
from composable.workflows.train import train_expert
from composable.workflows.vet import check_expert


@pytest.fixture
def folder(trained_folder, tmp_path):
    return shutil.copytree(trained_folder, tmp_path / "logic")


@pytest.fixture(scope="module")
def registry(loaded, trained_folder, tmp_path_factory):
    """Return the folder of a registry that holds logic 1.0.0 and 1.1.0."""
    path = tmp_path_factory.mktemp("registry")
    newer = shutil.copytree(trained_folder, tmp_path_factory.mktemp("newer") / "logic")
    manifest = (newer / "expert.toml").read_text()
    (newer / "expert.toml").write_text(manifest.replace('"1.0.0"', '"1.1.0"'))
    for expert in (trained_folder, newer):
        publish_expert(expert, loaded.interface, open_for_publishing(path))
    return path


def load(loaded, registry, *experts):
    return cx.load(str(loaded.folder), experts=experts, registry=registry)


def test_what_was_published_is_what_is_loaded(loaded, trained_folder, registry):
    model = load(loaded, registry, "logic@1.0.0")
    assert model.experts == ["logic"]
    direct = cx.Model(loaded.backbone, loaded.interface, [load_expert(loaded, trained_folder)])
    tokens_BT = model.encode("∀x φ→ψ ⊢A∧B")[None]
    np.testing.assert_array_equal(model(tokens_BT), direct(tokens_BT))


def test_the_newest_release_that_fits_is_taken_and_found_again(loaded, registry):
    assert load(loaded, registry, "logic").experts == ["logic"]
    assert load(loaded, registry, "logic>=1.1,<2").experts == ["logic"]
    newest = cx.expert("logic", backbone=str(loaded.folder), registry=registry)
    older = cx.expert("logic@1.0.0", backbone=str(loaded.folder), registry=registry)
    assert newest.key != older.key, "keys are of the release, not of the tensors"
    for name in ("w_in", "b_out"):
        np.testing.assert_array_equal(
            getattr(newest.scout, name)[...], getattr(older.scout, name)[...]
        )


def test_the_whole_model_prefers_the_expert_on_its_own_text(loaded, registry):
    model = load(loaded, registry, "logic")
    index = model.names.index("logic")
    private = np.asarray(model.route(model.encode("∀x ∃y φ→ψ ⊢A∧B ⊥∨C")[None]))[0, :, index]
    public = np.asarray(model.route(model.encode("the of and to in is that it as")[None]))[
        0, :, index
    ]
    assert private[8:].mean() > 0.9
    assert public[8:].mean() < 0.1
    assert isinstance(cx.generate(model, "∀x", 5), str)


def test_no_experts_is_the_backbone_alone(loaded):
    assert cx.load(str(loaded.folder), experts=[]).experts == []


@pytest.mark.parametrize(
    ("requirement", "reason"),
    [("nobody", "There is no expert 'nobody'"), ("logic>=9", "logic"), ("No Name", "No Name")],
)
def test_what_cannot_be_had_is_refused(loaded, registry, requirement, reason):
    with pytest.raises(PackagingError, match=reason):
        load(loaded, registry, requirement)


def test_without_a_registry_the_cure_is_told(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackagingError) as caught:
        cx.load(str(loaded.folder), experts=["logic"])
    assert "COMPOSABLE_REGISTRY" in caught.value.hint


def test_the_registry_may_come_from_the_environment(loaded, registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPOSABLE_REGISTRY", str(registry))
    assert cx.load(str(loaded.folder), experts=["logic"]).experts == ["logic"]


def test_training_leaves_what_is_published_apart_from_what_is_not(trained_folder):
    names = {path.name for path in trained_folder.iterdir()}
    assert names == {
        "expert.toml",
        "README.md",
        "body.safetensors",
        "scout.safetensors",
        "card.json",
        ".work",
    }
    record = json.loads((trained_folder / ".work" / "training.json").read_text())
    assert record["documents"] < 30, "some are held out"
    assert record["tokens"] == 60 * 8 * 32
    assert record["last"]["step"] == 60


def test_held_out_text_never_reaches_training(trained_folder):
    lines = (trained_folder / ".work" / "heldout.jsonl").read_text().splitlines()
    record = json.loads((trained_folder / ".work" / "training.json").read_text())
    assert len(lines) >= 1
    assert record["documents"] + len(lines) == 30


def test_what_was_not_vetted_is_not_published(loaded, folder, tmp_path):
    (folder / "card.json").unlink()
    with pytest.raises(VettingError):
        publish_expert(folder, loaded.interface, open_for_publishing(tmp_path / "registry"))
    assert not (tmp_path / "registry").exists() or not any((tmp_path / "registry").iterdir())


def test_one_document_cannot_be_split(loaded, folder, tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    cfg = TrainConfig(steps=1, batch_size=1, window=4, learning_rate=1e-3)
    with pytest.raises(TextError, match="one document"):
        train_expert(loaded, folder, [tmp_path / "one.txt"], cfg)


def test_checking_needs_text(loaded, folder):
    shutil.rmtree(folder / ".work")
    with pytest.raises(TextError, match="no held-out text"):
        check_expert(loaded, folder)


def edit_manifest(folder, old, new):
    text = (folder / "expert.toml").read_text()
    assert old in text
    (folder / "expert.toml").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('requires = "^1.0"', 'requires = "^2.0"'),
        ('requires = "^1.0"', 'requires = "^1.0"\ndigest = "sha256:' + "0" * 64 + '"'),
        ('[interface]\nname = "tiny"', '[interface]\nname = "huge"'),
        ("width = 16", "width = 17"),
    ],
    ids=["version", "digest", "name", "scout width"],
)
def test_an_expert_for_another_interface_is_refused(loaded, folder, old, new):
    edit_manifest(folder, old, new)
    with pytest.raises(InterfaceError):
        load_expert(loaded, folder)


@pytest.mark.parametrize(
    ("old", "new"), [("width = 16", "width = 8"), ('kind = "ffn"', 'kind = "lora"\nrank = 2')]
)
def test_tensors_that_are_not_those_of_the_manifest_are_refused(loaded, folder, old, new):
    edit_manifest(folder, old, new)
    with pytest.raises(TensorFileError):
        load_expert(loaded, folder)


def test_a_packed_experts_damage_is_told_by_file(loaded, registry):
    from composable.assembly.load import install_experts
    from composable.errors import IntegrityError
    from composable.packaging.versions.constraint import Requirement

    environment = install_experts(loaded, [Requirement.parse("logic")], registry)
    path = environment.expert_path("logic") / "body.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        load_expert(loaded, environment.expert_path("logic"))
    assert caught.value.where.endswith("body.safetensors")


def test_training_does_not_resume_on_other_text(loaded, folder, tmp_path):
    cfg = TrainConfig(steps=2, batch_size=8, window=16, learning_rate=1e-3)
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"Not what it began with, says file {name}. " * 9)
    with pytest.raises(TrainingError, match="not the one that training started with"):
        train_expert(loaded, folder, [tmp_path / "one.txt", tmp_path / "two.txt"], cfg)


@pytest.mark.parametrize("is_editable", [False, True])
def test_an_expert_in_development_is_loaded_from_its_folder(
    loaded, folder, tmp_path, monkeypatch, is_editable
):
    """Editable, a training run shows at once; otherwise, at the next lock."""
    from composable.packaging.project.edits import add_experts, read_wanted
    from composable.packaging.project.project import Project

    monkeypatch.chdir(tmp_path)
    project = Project.create(tmp_path, str(loaded.folder))
    wanted = read_wanted(project, ["./logic"], is_editable=is_editable)
    _, lock = add_experts(project, wanted, loaded.interface)
    lock.write(project.lock_path)
    first = cx.load()
    tokens_BT = first.encode("∀x φ→ψ")[None]
    logits_BTV = first(tokens_BT)
    other = cx.load(str(loaded.folder), ["logic"])
    np.testing.assert_array_equal(other(tokens_BT), logits_BTV)
    body = folder / "body.safetensors"
    data = bytearray(body.read_bytes())
    data[-3] ^= 0x40  # of the mantissa, so it stays a number
    body.write_bytes(data)
    if not is_editable:
        with pytest.raises(PackagingError, match="has changed since it was locked"):
            cx.load()
    else:
        assert not np.array_equal(cx.load()(tokens_BT), logits_BTV)
