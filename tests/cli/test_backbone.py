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


def test_quantize_makes_another_backbone(cli, works, tiny_backbone):
    from composable.assembly.backbones import load_backbone

    exact = load_backbone(str(tiny_backbone))
    outcome = works("backbone", "quantize", tiny_backbone, "--honour-experts", "--json").json
    assert outcome["folder"] == "tiny-int8"
    card, quantized = outcome["card"], load_backbone("tiny-int8")
    assert card["model"]["weights_bytes"] < 0.8 * card["model"]["source_bytes"]
    assert 0 < card["measured"]["kl"] < 0.01
    for digest in ("digest", "backbone", "trunk"):
        assert getattr(quantized.interface, digest) != getattr(exact.interface, digest)
    assert quantized.interface.honours_digest(exact.interface.digest)
    assert works("generate", "the of", "--backbone", "tiny-int8", "--alone", "--max-tokens", 4).out

    out = works("backbone", "quantize", tiny_backbone, "--to", "bf16", "--name", "half", "--quiet")
    assert not out.out
    half = load_backbone("half")
    assert half.backbone.cfg.matrix_dtype == "BF16"
    assert not half.interface.honours_digest(exact.interface.digest)

    outcome = cli("backbone", "quantize", "half")
    assert outcome.code == 1
    assert "BF16 already" in outcome.err
    outcome = cli("export-hf", "out", "--backbone", "half", "--alone")
    assert outcome.code == 1
    assert "config.matrix_dtype" in outcome.err


def test_no_expert_is_trained_on_a_quantized_backbone(cli, works, tiny_backbone, text):
    works("backbone", "quantize", tiny_backbone, "--quiet")
    works("new", "expert", "--backbone", "tiny-int8")
    outcome = cli("train", "expert", "--data", text, "--steps", 1)
    assert outcome.code == 1
    assert "matrices are kept in I8" in outcome.err
    assert "hint: train for the release that it was made from" in outcome.err
