import collections
import dataclasses
import json
import shutil

import numpy as np
import pytest

from composable.assembly.backbones import load_backbone
from composable.corpora.documents import Document
from composable.errors import InteropError, ModelError
from composable.interop.checkpoint import Checkpoint, open_source
from composable.interop.tokenizer import check_round_trips, make_tokenizer
from composable.model.tensors import to_tensors
from composable.workflows import capacity
from composable.workflows.capacity import require_capacity
from composable.workflows.import_backbone import ImportPlan, import_backbone, read_public_text
from tests.support.subword_kinds import KINDS

pytestmark = pytest.mark.slow

PLAN = ImportPlan(name="small", scout_width=16, scout_tokens=4000, scout_steps=80, license="MIT")


@pytest.fixture(scope="module")
def documents(tiny):
    words = "the of and to in is that for it as was with be by on not he his but at are this"
    return [Document(f"public/{i}", tiny.text(words, seed=i, length=400)) for i in range(20)]


@pytest.fixture
def imported(write_checkpoint, documents, tmp_path):
    """Return a function that imports a checkpoint: its folder, the package's, card and stages."""

    def run(family="llama", plan=PLAN, **options):
        folder, _ = write_checkpoint(family, **options)
        stages = collections.Counter()
        card = import_backbone(
            folder,
            tmp_path / "package",
            plan,
            documents[:16],
            documents[16:],
            cache=tmp_path / "cache",
            progress=lambda label, done, total: stages.update([label]),
        )
        return folder, tmp_path / "package", card, stages

    return run


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_package_holds_the_checkpoints_numbers_and_a_scout_that_learned(imported, family):
    folder, package, card, stages = imported(family)
    loaded = load_backbone(str(package))
    checkpoint = Checkpoint(open_source(folder), scout_width=16)
    tensors = to_tensors(loaded.backbone)
    for name, array in checkpoint.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    assert loaded.backbone.cfg == checkpoint.cfg
    assert loaded.interface.name == "small"
    assert loaded.interface.digest == card["interface"]["digest"]
    assert len(loaded.interface.output_bounds) == len(loaded.interface.slots)
    assert loaded.tokenizer == make_tokenizer(open_source(folder))
    assert [doc.id for doc in loaded.anchor] == [f"public/{i}" for i in range(16, 20)]
    assert card["scout"]["heldout_bits_per_class"] < card["scout"]["uniform_bits_per_class"] - 2
    assert card["measured"]["bytes"] == sum(len(doc.text.encode()) for doc in loaded.anchor)
    assert json.loads((package / "card.json").read_text()) == card
    assert "MIT" in (package / "backbone.toml").read_text()
    assert {"features", "scout", "bounds", "weights", "score"} <= stages.keys()


def test_the_trunk_runs_once_for_one_text(imported, documents, tmp_path):
    folder, _, first, stages = imported()
    assert stages["features"] > 0
    again = collections.Counter()
    second = import_backbone(
        folder,
        tmp_path / "again",
        PLAN,
        documents[:16],
        documents[16:],
        cache=tmp_path / "cache",
        progress=lambda label, done, total: again.update([label]),
    )
    assert again["features"] == 0
    assert second["interface"] == first["interface"]


def test_the_same_source_gives_the_same_package(imported, write_checkpoint, tmp_path):
    _, package, _, _ = imported()
    files = {path.name: path.read_bytes() for path in package.iterdir()}
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "llama")
    shutil.rmtree(package)
    imported()
    for name, data in files.items():
        if name not in ("card.json", "backbone.toml"):  # the card says how long it took
            assert (package / name).read_bytes() == data, name


def test_weights_can_be_rounded_and_computed_in_bfloat16(imported):
    plan = dataclasses.replace(PLAN, dtype="BF16", compute_dtype="BF16", scout_steps=0)
    _, package, card, _ = imported(plan=plan)
    assert card["model"]["stored_as"] == "BF16"
    assert card["scout"]["heldout_bits_per_class"] is None
    loaded = load_backbone(str(package))
    assert loaded.backbone.embed[...].dtype == "bfloat16"
    assert loaded.backbone.scout.w_in[...].dtype == "float32"
    assert np.isfinite(np.asarray(loaded.plug()(loaded.tokenizer.encode("the of")[None]))).all()


def test_what_does_not_fit_is_refused_before_it_is_read(write_checkpoint, tmp_path, monkeypatch):
    folder, _ = write_checkpoint("llama")
    checkpoint = Checkpoint(open_source(folder))
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(
        InteropError, match=rf"take {checkpoint.n_bytes:,} bytes, but 1,000 are free"
    ):
        require_capacity(checkpoint, tmp_path / "not" / "yet", checkpoint.cfg)
    monkeypatch.undo()
    monkeypatch.setattr(capacity, "available_memory", lambda: 1000)
    n_parameters = checkpoint.n_bytes // 4
    slots = 2 * 3 * 32 * 64
    expected = rf"takes {4 * (n_parameters + slots):,} bytes of memory in F32, but 1,000"
    with pytest.raises(InteropError, match=expected):
        require_capacity(checkpoint, tmp_path, checkpoint.cfg)


def test_a_tokenizer_that_loses_text_is_refused(subwords):
    assert check_round_trips(subwords, ["more"]) == {"texts": 7, "exact": 7}
    tokenizers = pytest.importorskip("tokenizers")
    definition = tokenizers.Tokenizer.from_str(subwords.to_files()[0])
    definition.decoder = tokenizers.decoders.Fuse()
    lossy = type(subwords)(definition.to_str(), begin="<|begin|>")
    with pytest.raises(InteropError, match="came back as"):
        check_round_trips(lossy, [])


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_tokenizers_round_trip(subwords, kind):
    tokenizer = type(subwords)(KINDS[kind](), begin="<|begin|>")
    texts = [" x", "  ", "a\n b", "\n", "   x"]  # all but the blanks before a first word come back
    assert check_round_trips(tokenizer, texts)["exact"] >= 8


def test_a_normal_form_is_allowed_for_and_counted(subwords):
    tokenizers = pytest.importorskip("tokenizers")
    definition = tokenizers.Tokenizer.from_str(subwords.to_files()[0])
    definition.normalizer = tokenizers.normalizers.NFC()
    composed = type(subwords)(definition.to_str(), begin="<|begin|>")
    assert check_round_trips(composed, ["cafe\N{COMBINING ACUTE ACCENT}"]) == {
        "texts": 7,
        "exact": 6,
    }


def test_what_is_missing_is_said(write_checkpoint, tmp_path):
    folder, _ = write_checkpoint("llama")
    with pytest.raises(ModelError, match="'<s>' is not a token"):
        make_tokenizer(open_source(folder), begin="<s>")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InteropError, match=r"no tokenizer\.json") as caught:
        make_tokenizer(open_source(folder))
    assert "tokenizer_config.json" in caught.value.hint


def test_public_text_is_split_by_document(documents, tmp_path):
    from composable.corpora.documents import write_documents

    write_documents(tmp_path / "text.jsonl", documents)
    train, heldout = read_public_text([tmp_path / "text.jsonl"])
    assert len(train) + len(heldout) == len(documents)
    assert heldout
