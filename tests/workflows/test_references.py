"""A new expert is compared with published ones: its peers and its previous releases."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx

from composable.assembly.experts import load_expert, save_expert
from composable.errors import (
    ManifestError,
    PackagingError,
    TrainingError,
    UnknownExpertError,
    VettingError,
)
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.registry.locations import open_for_publishing
from composable.training.config import TrainConfig
from composable.workflows.publish import publish_expert
from composable.workflows.references import compare_releases, find_parent, find_peers, find_previous
from composable.workflows.train import train_expert
from composable.workflows.vet import check_expert


@pytest.fixture(scope="module")
def registry(loaded, trained_folder, tmp_path_factory):
    """Return the folder of a registry that holds logic 1.0.0."""
    path = tmp_path_factory.mktemp("registry")
    publish_expert(trained_folder, loaded.interface, open_for_publishing(path))
    return path


@pytest.fixture
def folder(trained_folder, tmp_path):
    return shutil.copytree(trained_folder, tmp_path / "logic")


def edit_manifest(folder, old, new):
    text = (folder / "expert.toml").read_text()
    assert old in text
    (folder / "expert.toml").write_text(text.replace(old, new))


def spoil_body(loaded, folder, noise):
    """Add noise to an expert's body; its scout stays as it is."""
    expert = load_expert(loaded, folder)
    rng = np.random.default_rng(0)
    state = nnx.state(expert.body)
    for path, leaf in nnx.to_flat_state(state):
        if "w_down" in path:
            scale = noise * float(np.std(np.asarray(leaf[...])))
            leaf[...] = leaf[...] + scale * rng.normal(size=leaf[...].shape).astype(np.float32)
    nnx.update(expert.body, state)
    save_expert(folder, expert, Manifest.read(folder))


def found(verdict, name):
    return next(check for check in verdict.checks if check.name == name)


def check_against(loaded, folder, wanted, registry):
    previous = find_previous(loaded, folder, wanted, registry=str(registry))
    verdict = check_expert(loaded, folder, previous=previous)
    return compare_releases(folder, loaded.interface, previous, verdict)


def test_a_copy_that_behaves_on_public_text_is_detected_on_its_peers_text(
    loaded, trained_folder, folder, registry
):
    """Its scout is the published one, so it behaves on the anchor; its body does harm."""
    edit_manifest(folder, 'name = "logic"', 'name = "copycat"')
    spoil_body(loaded, folder, 3.0)
    heldout = trained_folder / ".work" / "heldout.jsonl"
    place = str(registry)
    blind = find_peers(loaded, "copycat", ["all"], {}, registry=place)
    assert [(n.release, n.texts) for n in blind] == [("logic@1.0.0", ())]
    seeing = find_peers(loaded, "copycat", ["logic"], {"logic": heldout}, registry=place)
    copied = found(check_expert(loaded, folder, peers=blind), "copied")
    assert not copied.passed, "a copy of a scout is detected without the peer's text"
    assert "1.00 with that of logic@1.0.0 (a copy" in copied.found
    card = json.loads((folder / "card.json").read_text())
    assert dataclasses.asdict(copied) in card["checks"]
    assert card["measured"]["beside"]["logic"]["likeness"] == 1
    verdict = check_expert(loaded, folder, peers=[*blind, *seeing])
    without, with_text = (c for c in verdict.checks if c.name == "beside logic")
    assert "none of its own text is available" in without.found
    assert not with_text.passed, with_text.found
    assert str(heldout) in with_text.found
    figures = json.loads((folder / "card.json").read_text())["measured"]["beside"]["logic"]
    assert figures["own"]["with"] > 1.005 * figures["own"]["without"]
    assert figures["anchor"]["with"] == pytest.approx(figures["anchor"]["without"], rel=5e-3)


def test_a_peer_in_a_folder_comes_with_its_text_and_an_unrelated_newcomer_passes(
    loaded, trained_folder, folder
):
    edit_manifest(folder, 'name = "logic"', 'name = "newcomer"')
    expert = load_expert(loaded, folder)
    expert.scout.w_out[...] = 0 * expert.scout.w_out[...]  # it knows no text
    save_expert(folder, expert, Manifest.read(folder))
    (peer,) = find_peers(loaded, "newcomer", [str(trained_folder)], {})
    assert peer.source.endswith("heldout.jsonl")
    verdict = check_expert(loaded, folder, peers=[peer])
    assert found(verdict, "beside logic").passed, found(verdict, "beside logic")


def test_a_derived_expert_may_have_the_scout_of_its_parent(loaded, folder, registry, tmp_path):
    """By the manifest of either, and of a sibling, but of no other expert."""

    def is_passed(newcomer, derives_from, wanted):
        (peer,) = find_peers(
            loaded, newcomer, [wanted], {}, derives_from=derives_from, registry=str(registry)
        )
        verdict = check_expert(loaded, folder, peers=[peer])
        return found(verdict, "copied").passed

    edit_manifest(folder, 'name = "logic"', 'name = "sequents"')
    assert is_passed("sequents", "logic@0.9.0", "logic")
    assert not is_passed("sequents", "sets@0.9.0", "logic")
    sibling = shutil.copytree(folder, tmp_path / "sibling")
    edit_manifest(sibling, 'name = "sequents"', 'name = "sibling"\nderives-from = "logic@1.0.0"')
    assert is_passed("sequents", "logic@1.0.0", str(sibling))
    edit_manifest(folder, 'name = "sequents"', 'name = "logic"')
    assert is_passed("logic", None, str(sibling))


PARENT = 'name = "next"\nderives-from = "logic@1.0.0"'


def test_training_starts_from_the_release_that_an_expert_derives_from(
    loaded, trained_folder, registry, folder, tmp_path
):
    texts = trained_folder.parent / "logic.jsonl"
    still = TrainConfig(steps=1, batch_size=8, window=32, learning_rate=1e-12)
    shutil.rmtree(folder / ".work")
    edit_manifest(folder, 'name = "logic"', PARENT)
    anew = shutil.copytree(folder, tmp_path / "anew")
    parent = find_parent(loaded, Manifest.read(folder), registry=str(registry))
    record = train_expert(loaded, folder, [texts], still, parent=parent)
    assert record.derives_from == "logic@1.0.0"
    first = load_expert(loaded, trained_folder)
    second = load_expert(loaded, folder)
    for (path, was), (_, now) in zip(
        nnx.to_flat_state(nnx.state(first.body)),
        nnx.to_flat_state(nnx.state(second.body)),
        strict=True,
    ):
        np.testing.assert_allclose(now[...], was[...], atol=1e-6, err_msg=str(path))
    for name in ("w_in", "b_out"):  # training left the parent that it was given as it was
        was, kept = (getattr(x.scout, name)[...] for x in (first, parent))
        np.testing.assert_array_equal(kept, was)
    plain = train_expert(loaded, anew, [texts], still)
    assert plain.derives_from is None
    # The scout reads on from where it was, and ends better than one that begins.
    assert record.scout.heldout_bits < plain.scout.heldout_bits
    with pytest.raises(TrainingError, match="parent is not the one"):
        train_expert(loaded, folder, [texts], still)


def test_training_starts_only_from_an_existing_release_of_the_same_kind(loaded, registry, folder):
    def parent():
        return find_parent(loaded, Manifest.read(folder), registry=str(registry))

    assert parent() is None
    edit_manifest(folder, 'name = "logic"', PARENT.replace("1.0.0", "7.0.0"))
    with pytest.raises(PackagingError, match="logic"):
        parent()
    edit_manifest(folder, "7.0.0", "1.0.0")
    edit_manifest(folder, 'kind = "ffn"', 'kind = "lora"\nrank = 4')
    with pytest.raises(ManifestError, match="is ffn, scout 16 wide; this is lora of rank 4"):
        parent()


def test_another_release_of_the_same_expert_may_keep_its_scout(loaded, folder, registry):
    """It is never plugged in beside itself."""
    edit_manifest(folder, 'version = "1.0.0"', 'version = "1.0.1"')
    peers = find_peers(loaded, "logic", ["all"], {}, registry=str(registry))
    previous = find_previous(loaded, folder, "logic", registry=str(registry))
    assert check_expert(loaded, folder, peers=peers, previous=previous).passed


def test_peers_that_do_not_exist_are_refused(loaded, folder, registry, tmp_path):
    with pytest.raises(VettingError, match="cannot be its own peer"):
        find_peers(loaded, "logic", [str(folder)], {})
    with pytest.raises(VettingError, match="text of 'sets'"):
        find_peers(loaded, "else", [str(folder)], {"sets": tmp_path / "sets.txt"})
    assert find_peers(loaded, "logic", ["all"], {}, registry=str(registry)) == []


def test_no_change_and_a_better_description_are_patches(loaded, folder, registry):
    step = check_against(loaded, folder, "logic", registry)
    assert (step.needed, step.changes, step.is_enough) == ("patch", (), True)
    edit_manifest(folder, "For tests.", "For many tests.")
    edit_manifest(folder, 'version = "1.0.0"', 'version = "1.0.1"')
    assert check_against(loaded, folder, "logic@1.0.0", registry).is_enough


def test_a_worse_release_needs_a_major_version(loaded, folder, registry):
    spoil_body(loaded, folder, 3.0)
    edit_manifest(folder, 'version = "1.0.0"', 'version = "1.1.0"')
    step = check_against(loaded, folder, "logic", registry)
    assert (step.needed, str(step.version), step.is_enough) == ("major", "2.0.0", False)
    assert any("bits per byte on its own text" in reason for reason in step.reasons)
    with pytest.raises(VettingError, match="too small a step from logic") as caught:
        publish_expert(folder, loaded.interface, open_for_publishing(registry))
    assert "bits per byte on its own text" in caught.value.message
    assert 'version = "2.0.0"' in caught.value.hint


def test_equally_good_weights_are_a_patch(loaded, folder, registry, tmp_path):
    """Noise that no document notices; with another registry, which they are published to."""
    spoil_body(loaded, folder, 1e-4)
    edit_manifest(folder, 'version = "1.0.0"', 'version = "1.0.1"')
    copy = shutil.copytree(registry, tmp_path / "registry")
    step = check_against(loaded, folder, "logic", copy)
    assert (step.needed, step.is_enough) == ("patch", True), step
    publish_expert(folder, loaded.interface, open_for_publishing(copy))


def test_a_previous_release_is_found_by_name(loaded, folder, registry, tmp_path):
    with pytest.raises(UnknownExpertError, match="no release logic"):
        find_previous(loaded, folder, "logic@3.0.0", registry=str(registry))
    with pytest.raises(VettingError, match="another expert"):
        find_previous(loaded, folder, "sets", registry=str(registry))
    edit_manifest(folder, 'version = "1.0.0"', 'version = "0.9.0"')
    with pytest.raises(UnknownExpertError) as caught:
        find_previous(loaded, folder, "logic", registry=str(registry))
    assert "there are 1.0.0" in caught.value.hint


def test_a_body_that_is_not_finite_fails_by_its_format(loaded, folder):
    expert = load_expert(loaded, folder)
    slot = expert.body.slots["1"]
    slot.w_up[...] = slot.w_up[...].at[0, 0].set(np.nan)
    data = (folder / "body.safetensors").read_bytes()
    broken = dataclasses.replace(Manifest.read(folder), files=())
    try:
        save_expert(folder, expert, broken)
    except Exception:  # what writes tensors may refuse them, too
        size = int.from_bytes(data[:8], "little") + 8
        (folder / "body.safetensors").write_bytes(data[:size] + b"\xff" * (len(data) - size))
    verdict = check_expert(loaded, folder)
    (check,) = verdict.checks
    assert (check.name, check.passed) == ("format", False)
    assert "body.safetensors" in check.found
    with pytest.raises(VettingError, match="format"):
        publish_expert(folder, loaded.interface, open_for_publishing(folder.parent / "registry"))
