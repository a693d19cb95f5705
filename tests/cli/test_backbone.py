"""`backbone import`: a package and a card from a checkpoint, and what it refuses."""

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def text(tiny, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(tiny.text("the of and to in is that", seed=i, length=400))
    return folder


def test_import_makes_a_backbone_that_generates(cli, works, write_checkpoint, text):
    folder, _ = write_checkpoint("smollm")
    small = ("--public-text", text, "--scout-tokens", 2000, "--scout-steps", 20)
    outcome = works("backbone", "import", folder, "--name", "small", *small, "--json").json
    assert outcome["folder"] == "small"
    assert outcome["card"]["source"]["family"] == "llama"
    alone = ("--backbone", "small", "--alone", "--max-tokens", 4)
    assert works("generate", "the of", *alone).out.endswith("\n")

    outcome = cli("backbone", "import", folder, "--name", "small", *small, "--begin", "<s>")
    assert outcome.code == 1
    assert "'<s>' is not a token" in outcome.err


def test_import_refuses_what_it_does_not_know(cli, tmp_path):
    outcome = cli("backbone", "import", tmp_path / "nothing", "--name", "Bad Name")
    assert outcome.code == 1
    assert "--name" in outcome.err
    (tmp_path / "text.txt").write_text("text")
    outcome = cli(
        *("backbone", "import", tmp_path / "nothing", "--name", "small", "--json"),
        *("--public-text", tmp_path / "text.txt"),
    )
    assert outcome.json["error"]["kind"] == "InteropError"
    assert outcome.json["error"]["where"].endswith("nothing")
