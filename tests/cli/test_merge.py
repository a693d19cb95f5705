"""`composable merge`, and statistics that `composable check` writes."""

import pytest

from composable.corpora.documents import Document, write_documents
from tests.support.families import write_family


@pytest.fixture
def family(tiny_backbone, tmp_path):
    """Return a function that writes a base and two sides, and returns the arguments for them."""
    from composable.assembly.backbones import load_backbone

    def make(**options):
        loaded = load_backbone(str(tiny_backbone))
        folders = write_family(tmp_path / "family", loaded, **options)
        for name, words in (("ours", "the and of"), ("theirs", "be by on")):
            documents = [Document(str(i), f"{words} {i} " * (4 + i % 3)) for i in range(20)]
            write_documents(tmp_path / f"{name}.jsonl", documents)
        return [*folders, "--out", "out", "--backbone", tiny_backbone]

    return make


def data(*names):
    return [part for name in names for part in ("--data", f"{name}={name}.jsonl")]


def test_merge_by_text(works, family, tmp_path):
    arguments = [*family(noise=0.002), *data("ours", "theirs"), "--method", "linear"]
    found = works("merge", *arguments, "--html", "page.html").out
    assert "linear, scale" in found and "ON theirs" in found and "wrote base@1.0.1 to out" in found
    assert "95% BOUNDS" in found and "not worse" in found
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert 'merges = ["ours@1.0.0", "theirs@1.0.0"]' in (tmp_path / "out/expert.toml").read_text()


def test_merge_by_statistics_and_conflicts(cli, family, tmp_path):
    arguments = family(noise=3.0)
    backbone = arguments[-2:]
    for side in arguments[1:3]:
        outcome = cli("check", side, "--data", f"{side.name}.jsonl", "--statistics", *backbone)
        assert "will publish" in outcome.err and (side / "statistics.safetensors").exists()
    command = ("merge", *arguments, "--method", "regmean", "--html", "page.html")
    outcome = cli(*command)
    assert outcome.code == 1 and "no method gives" in outcome.err
    assert "TENSORS IN CONFLICT" in outcome.out and not (tmp_path / "out").exists()
    assert "Conflict" in (tmp_path / "page.html").read_text()
    table = cli(*command, "--json").json
    assert table["is_good"] is False and table["evidence"] == "statistics"
    assert {"text", "side", "before", "after", "outcome"} <= table["judgements"][0].keys()


def test_what_cannot_be_merged(cli, family):
    arguments = family()
    outcome = cli("merge", *arguments)
    assert outcome.code == 1 and "no statistics were published by ours@1.0.0" in outcome.err
    outcome = cli("merge", *arguments, "--data", "ours.jsonl")
    assert outcome.code == 2 and "expected NAME=FILES" in outcome.err
    assert "already exists" in cli("merge", *arguments, "--out", "family", *data("ours")).err
