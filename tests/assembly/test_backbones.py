import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import composable as cx
from composable.assembly.backbones import load_backbone, save_backbone
from composable.errors import (
    ComposableError,
    IntegrityError,
    InterfaceError,
    MissingProjectError,
    PackagingError,
)
from composable.interface import digest_bytes, hash_classes
from composable.model.backbone import Backbone
from composable.model.model import Model
from composable.model.tensors import to_tensors
from composable.vetting.evaluation import path_scorer, score_documents
from tests.support.tiny import router_of


@pytest.fixture
def folder(loaded, tmp_path):
    return shutil.copytree(loaded.folder, tmp_path / "tiny")


def test_what_is_loaded_is_what_was_saved_rounded_to_bfloat16(loaded, tiny):
    tensors = to_tensors(loaded.backbone)
    assert tensors.keys() == to_tensors(tiny.backbone).keys()
    for name, array in tensors.items():
        if name != "class_map":
            rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(array, rounded, err_msg=name)
    np.testing.assert_array_equal(tensors["class_map"], np.arange(256))
    assert loaded.backbone.cfg == tiny.cfg


def test_saving_what_was_loaded_gives_the_same_interface(loaded, tmp_path):
    interface = loaded.interface
    again = save_backbone(
        tmp_path / "again",
        loaded.backbone,
        name="tiny",
        version="1.0.0",
        anchor=loaded.anchor,
        router=router_of(loaded.interface),
        output_bounds=loaded.interface.output_bounds,
        texts={},
        description="",
        license_="",
    )
    assert again == interface
    weights = "weights.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (loaded.folder / weights).read_bytes()


@pytest.fixture(scope="module")
def subword_release(tiny, subwords, loaded, tmp_path_factory):
    """Return a package whose tokens are subwords, seen as 64 classes; nobody trained it."""
    cfg = dataclasses.replace(tiny.cfg, vocab_size=subwords.vocab_size)
    classes_V = hash_classes(cfg.vocab_size, 64)
    backbone = Backbone(cfg, classes_V, 64, rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("backbones") / "subwords"
    save_backbone(
        folder,
        backbone,
        name="subwords",
        version="1.0.0",
        anchor=loaded.anchor,
        router=router_of(loaded.interface),
        output_bounds=loaded.interface.output_bounds,
        texts={"README.md": "Subwords.\n"},
        description="For tests.",
        license_="Apache-2.0",
        tokenizer=subwords,
    )
    return load_backbone(str(folder))


def test_a_package_brings_its_tokenizer(subword_release, subwords):
    assert subword_release.tokenizer == subwords
    assert subword_release.interface.tokenizer == subwords.digest
    assert subword_release.interface.n_classes == 64
    with pytest.raises(InterfaceError, match="expected sha256"):
        Model(subword_release.backbone, subword_release.interface)


def test_bits_per_byte_count_bytes_whatever_the_tokens_are(subword_release):
    """An untrained backbone says about log V of every token; what differs is how many there are."""
    texts = [b"the of and to in is", "∀x ∃y φ→ψ".encode()]
    model = subword_release.plug()
    score = score_documents(path_scorer(model), texts, context=model.context)
    np.testing.assert_array_equal(score.n_bytes_B, [len(text) for text in texts])
    for text, nats in zip(texts, score.nats_B, strict=True):
        tokens_T = model.encode(text)
        logits_TV = np.asarray(model.path(tokens_T[None]), np.float64)[0]
        log_prob_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        expected = -log_prob_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]].sum()
        assert nats == pytest.approx(expected, abs=1e-3)


def test_an_expert_of_a_subword_backbone_is_routed_and_continued(subword_release, tiny):
    model = subword_release.plug(capacity=2)
    assert model.route(model.encode("naïve foxes")[None]).shape[-1] == 2
    assert isinstance(cx.generate(model, "the quick", 5), str)


@pytest.mark.parametrize("file", ["tokenizer.json", "special_tokens.json"])
def test_another_tokenizer_is_refused(subword_release, tmp_path, file):
    folder = shutil.copytree(subword_release.folder, tmp_path / "subwords")
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace("<|end|>", "<|eos|>"))
    with pytest.raises(IntegrityError, match=file):
        load_backbone(str(folder))
    changed = text.replace('"begin": "<|begin|>"', '"begin": "<|end|>"')
    if file == "special_tokens.json":
        (folder / file).write_text(text)
        replace(folder, file, changed)
        with pytest.raises(IntegrityError, match=r"interface\.json: tokenizer"):
            load_backbone(str(folder))


def test_the_interface_names_trunk_and_backbone_apart(loaded, tmp_path):
    from composable.assembly.backbones import digests

    tensors = to_tensors(loaded.backbone, "BF16")
    before = digests(tensors, loaded.backbone.cfg)
    assert before["trunk"] == loaded.interface.trunk
    for name, hears_trunk in (
        ("embed", True),
        ("layers.0.ffn.w_up", True),
        ("layers.1.ffn.w_up", False),
        ("scout.w_in", False),
    ):
        changed = {**tensors, name: tensors[name] + tensors[name].dtype.type(1)}
        after = digests(changed, loaded.backbone.cfg)
        assert after["backbone"] != before["backbone"], name
        assert (after["trunk"] != before["trunk"]) is hears_trunk, name
        assert after["class_map"] == before["class_map"], name


@pytest.mark.parametrize("name", ["weights.safetensors", "interface.json", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_refused_by_file(folder, name, damage):
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(IntegrityError) as caught:
        load_backbone(str(folder))
    assert name in caught.value.where


def test_a_damaged_anchor_is_refused_when_it_is_read(folder):
    (folder / "anchor.jsonl").write_text('{"id": "a", "text": "b"}\n')
    with pytest.raises(IntegrityError, match=r"anchor\.jsonl"):
        _ = load_backbone(str(folder)).anchor


@pytest.mark.parametrize("field", ["backbone", "trunk", "class_map"])
def test_weights_of_another_interface_are_refused(folder, field):
    """Even where the manifest lists the changed interface, so that no file is damaged."""
    interface = json.loads((folder / "interface.json").read_text())
    interface[field] = "sha256:" + "0" * 64
    replace(folder, "interface.json", json.dumps(interface))
    with pytest.raises(IntegrityError) as caught:
        load_backbone(str(folder))
    assert caught.value.where.endswith(f"interface.json: {field}")


def test_a_config_that_is_no_config_is_refused(folder):
    cfg = json.loads((folder / "config.json").read_text())
    replace(folder, "config.json", json.dumps({**cfg, "d_model": 0}))
    with pytest.raises(ComposableError, match=r"config\.d_model"):
        load_backbone(str(folder))


def test_a_config_of_another_shape_is_refused(folder):
    cfg = json.loads((folder / "config.json").read_text())
    replace(folder, "config.json", json.dumps({**cfg, "d_ff": 32}))
    with pytest.raises(PackagingError, match=r"weights\.safetensors"):
        load_backbone(str(folder))


def replace(folder, name, text):
    """Replace a file and list it in the manifest."""
    old = digest_bytes((folder / name).read_bytes()).removeprefix("sha256:")
    size = (folder / name).stat().st_size
    (folder / name).write_text(text)
    new = digest_bytes(text.encode()).removeprefix("sha256:")
    manifest = (folder / "backbone.toml").read_text().replace(old, new)
    (folder / "backbone.toml").write_text(manifest.replace(f"size = {size}", f"size = {len(text)}"))


def test_an_unknown_backbone_is_refused_with_what_there_is():
    with pytest.raises(PackagingError, match="no backbone 'nothing-here'"):
        load_backbone("nothing-here")


def test_outside_a_project_a_named_backbone_is_loaded_alone(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cx.load(str(loaded.folder)).names == ("backbone",)
    with pytest.raises(MissingProjectError, match=r"no composable\.toml"):
        cx.load()
