"""Merging experts: what is chosen, written, and refused."""

import dataclasses
import shutil

import numpy as np
import pytest

from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, read_documents
from composable.errors import MergeConflictError, MergeError
from composable.packaging.manifests.manifest import Manifest
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.locations import open_for_publishing
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.version import Version
from composable.workflows.expert_matrices import to_matrices
from composable.workflows.merge import merge_experts
from composable.workflows.merge_page import write_page
from composable.workflows.merge_sides import require_published_base
from composable.workflows.statistics import write_statistics
from tests.support.families import write_family
from tests.support.tiny import PRIVATE_WORDS, PUBLIC_WORDS


@pytest.fixture(scope="module")
def texts(tiny):
    words = {"ours": PRIVATE_WORDS, "theirs": PUBLIC_WORDS}
    return {
        name: [Document(str(i), tiny.text(words[name], seed=i, length=30)) for i in range(20)]
        for name in words
    }


def describe(loaded, folders, texts):
    for folder in folders[1:]:
        write_statistics(loaded, folder, load_expert(loaded, folder), texts[folder.name])


def change(folder, **fields):
    path = folder / "expert.toml"
    path.write_text(dataclasses.replace(Manifest.read(folder), **fields).to_toml())


@pytest.mark.parametrize("kind", ["ffn", "lora"])
def test_small_changes_merge_by_text(loaded, texts, tmp_path, kind):
    base, *sides = write_family(tmp_path, loaded, noise=0.002, kind=kind)
    change(sides[0], license="Apache-2.0", domains=("noise", "more"))
    out = tmp_path / "out"
    report = merge_experts(loaded, base, sides, out, texts=texts)
    assert report.is_good and report.evidence == "text" and report.release == "base@1.1.0"
    assert {row.method for row in report.tried["body"]} == {"linear", "ties", "dare", "low-rank"}
    worst = [row.worst for row in report.tried["body"]]
    assert worst == sorted(worst)
    manifest = pack_expert(out, interface=loaded.interface)
    assert manifest.derives_from == "base@1.0.0"
    assert manifest.merges == ("ours@1.0.0", "theirs@1.0.0")
    assert manifest.license == "(MIT) AND (Apache-2.0)" and manifest.domains == ("noise", "more")
    merged, root = (to_matrices(loaded, load_expert(loaded, folder)) for folder in (out, base))
    assert not np.array_equal(merged["scout.w_in"], root["scout.w_in"])
    assert {(row.outcome, row.documents) for row in report.judgements} == {("not worse", 15)}
    judged = read_documents([out / ".work" / "heldout.jsonl"])
    assert len(judged) == 30 and not {"ours/0", "theirs/4"} & {document.id for document in judged}


def test_too_little_text_shows_nothing(loaded, texts, tmp_path):
    """Nor does the same text many times."""
    base, *sides = write_family(tmp_path, loaded, noise=0.002)
    few = {name: found[:8] for name, found in texts.items()}
    repeated = {name: 4 * found for name, found in few.items()}
    for given in (few, repeated):
        with pytest.raises(MergeConflictError, match="too little text to show") as caught:
            merge_experts(loaded, base, sides, tmp_path / "out", texts=given, methods=["linear"])
        judgements = caught.value.report.judgements
        assert {(row.outcome, row.documents) for row in judgements} == {("undecided", 6)}
        assert "6 documents, about 15 needed" in str(caught.value)
        assert "at least 20 documents of each text" in caught.value.hint
    single = {name: found[:1] for name, found in texts.items()}
    with pytest.raises(MergeConflictError) as caught:
        merge_experts(loaded, base, sides, tmp_path / "out", texts=single, methods=["linear"])
    assert caught.value.report.judgements[0].low is None


def test_statistics_show_nothing_of_changes_that_they_cannot_predict(loaded, texts, tmp_path):
    base, *sides = folders = write_family(tmp_path, loaded, noise=1.0)
    describe(loaded, folders, texts)
    with pytest.raises(MergeConflictError) as caught:
        merge_experts(loaded, base, sides, tmp_path / "out")
    outcomes = {row.outcome for row in caught.value.report.judgements}
    assert "not worse" not in outcomes
    assert "--data" in caught.value.hint and "--method group" in caught.value.hint


def test_small_changes_merge_by_statistics(loaded, texts, tmp_path):
    base, *sides = folders = write_family(tmp_path, loaded, noise=0.002)
    describe(loaded, folders, texts)
    report = merge_experts(loaded, base, sides, tmp_path / "out", methods=["regmean", "fisher"])
    assert report.evidence == "statistics"
    assert {row.method for row in report.tried["scout"]} == {"fisher", "regmean"}
    assert report.tried["body"][0].changes.keys() == {"ours@1.0.0", "theirs@1.0.0"}
    assert report.chosen["body"] == str(report.tried["body"][0].candidate)


def test_a_conflict_is_reported_and_nothing_is_written(loaded, texts, tmp_path):
    base, *sides = folders = write_family(tmp_path, loaded, noise=3.0)
    describe(loaded, folders, texts)
    with pytest.raises(MergeConflictError, match="no method gives") as caught:
        merge_experts(loaded, base, sides, tmp_path / "out")
    report = caught.value.report
    assert not (tmp_path / "out").exists() and "--method group" in caught.value.hint
    assert any(judgement.outcome == "worse" for judgement in report.judgements)
    assert {c.name.split(".")[0] for c in report.conflicts} == {"body", "scout"}
    assert max(max(c.losses.values()) for c in report.conflicts) > 0
    write_page(tmp_path / "page.html", report)
    page = (tmp_path / "page.html").read_text()
    assert "Conflict" in page and "<circle" in page and "scout.w_in" in page


def test_a_group_requires_its_sides_and_keeps_the_base(loaded, tmp_path):
    base, *sides = write_family(tmp_path, loaded, noise=3.0)
    out = tmp_path / "out"
    report = merge_experts(loaded, base, sides, out, methods=["group"])
    manifest = pack_expert(out, interface=loaded.interface)
    assert {name: str(range_) for name, range_ in manifest.requires.items()} == {
        "ours": "^1.0.0",
        "theirs": "^1.0.0",
    }
    assert manifest.version == Version("1.1.0") and report.chosen["scout"] == "group"
    for file in ("body.safetensors", "scout.safetensors"):
        assert (out / file).read_bytes() == (base / file).read_bytes()


def test_a_group_is_judged_by_the_same_rule(loaded, texts, tmp_path):
    base, *sides = write_family(tmp_path, loaded, noise=0.002)
    options = {"texts": texts, "methods": ["group"]}
    report = merge_experts(loaded, base, sides, tmp_path / "out", **options)
    assert {(row.outcome, row.documents) for row in report.judgements} == {("not worse", 15)}
    options["texts"] = {name: found[:12] for name, found in texts.items()}
    with pytest.raises(MergeConflictError, match="too little text"):
        merge_experts(loaded, base, sides, tmp_path / "second", **options)


def test_a_group_of_releases_of_one_package_is_refused(loaded, tmp_path):
    base, ours, theirs = write_family(tmp_path, loaded)
    change(theirs, name="ours", version=Version("1.1.0"))
    with pytest.raises(MergeError, match="different names"):
        merge_experts(loaded, base, [ours, theirs], tmp_path / "out", methods=["group"])


REFUSED = {
    "another base": (
        {"derives_from": "base@0.9.0"},
        "derives from base@0.9.0, expected base@1.0.0",
    ),
    "no base": ({"derives_from": None}, "derives from no release"),
    "the same release": ({"name": "ours"}, "ours@1.0.0 is given twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_manifests_that_do_not_go_together_are_refused(loaded, tmp_path, case):
    fields, message = REFUSED[case]
    base, *sides = write_family(tmp_path, loaded)
    change(sides[1], **fields)
    with pytest.raises(MergeError, match=message):
        merge_experts(loaded, base, sides, tmp_path / "out")


def test_other_interfaces_kinds_and_equal_tensors_are_refused(loaded, texts, tmp_path):
    base, ours, theirs = write_family(tmp_path, loaded)
    out = tmp_path / "out"
    need = Manifest.read(theirs).interface
    change(theirs, interface=dataclasses.replace(need, name="other"))
    with pytest.raises(MergeError, match="router interface other"):
        merge_experts(loaded, base, [ours, theirs], out)
    change(theirs, interface=dataclasses.replace(need, digest="sha256:" + "0" * 64))
    with pytest.raises(MergeError, match="another version of the interface"):
        merge_experts(loaded, base, [ours, theirs], out)
    low = write_family(tmp_path / "low", loaded, kind="lora")[2]
    with pytest.raises(MergeError, match=r"a lora body of rank 2.*a ffn body") as caught:
        merge_experts(loaded, base, [ours, low], out)
    assert "can be merged" in caught.value.hint
    change(theirs, interface=need)
    for file in ("body.safetensors", "scout.safetensors"):
        shutil.copy(ours / file, theirs / file)
    with pytest.raises(MergeError, match="same tensors as ours"):
        merge_experts(loaded, base, [ours, theirs], out)
    with pytest.raises(MergeError, match="two at least"):
        merge_experts(loaded, base, [ours], out)
    with pytest.raises(MergeError, match="not a method"):
        merge_experts(loaded, base, [ours, theirs], out, methods=["mean"])


def test_what_sides_state_is_joined_or_refused(loaded, tmp_path):
    base, ours, theirs = write_family(tmp_path, loaded)
    change(ours, requires={"words": Constraint(">=1.2")}, conflicts={"old": Constraint("<1")})
    change(theirs, requires={"words": Constraint("<3"), "more": Constraint("^2")})
    merge_experts(loaded, base, [ours, theirs], tmp_path / "out", methods=["group"], name="both")
    manifest = Manifest.read(tmp_path / "out")
    assert {name: str(range_) for name, range_ in manifest.requires.items()} == {
        **{"words": ">=1.2, <3", "more": "^2"},
        **{"ours": "^1.0.0", "theirs": "^1.0.0"},
    }
    assert manifest.name == "both" and manifest.version == Version("1.0.0")
    change(theirs, conflicts={"old": Constraint("<2")})
    with pytest.raises(MergeError, match="conflicts with old <2, another with old <1"):
        merge_experts(loaded, base, [ours, theirs], tmp_path / "second", methods=["group"])


def test_a_folder_that_is_not_the_published_base_is_refused(loaded, tmp_path):
    base, ours, _ = write_family(tmp_path, loaded)
    require_published_base(base)  # no registry knows better
    registry = open_for_publishing(str(tmp_path / "registry"))
    registry.publish(base, interface=loaded.interface)
    require_published_base(base, registry.location)
    require_published_base(ours, registry.location)
    shutil.copy(ours / "body.safetensors", base / "body.safetensors")
    with pytest.raises(MergeError, match="other digests") as caught:
        require_published_base(base, registry.location)
    assert "give base@1.0.0 as BASE" in caught.value.hint


def test_without_evidence_nothing_is_merged(loaded, texts, tmp_path):
    base, *sides = write_family(tmp_path, loaded)
    with pytest.raises(MergeError, match=r"no statistics were published by ours@1.0.0") as caught:
        merge_experts(loaded, base, sides, tmp_path / "out")
    assert "--data ours=FILES" in caught.value.hint
    with pytest.raises(MergeError, match="fisher needs the statistics"):
        merge_experts(loaded, base, sides, tmp_path / "out", texts=texts, methods=["fisher"])
