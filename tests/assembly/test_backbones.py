import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from composable.assembly.backbones import load_backbone
from composable.errors import ComposableError, IntegrityError, PackagingError
from composable.interface import digest_bytes
from composable.model.tensors import to_tensors


@pytest.fixture
def folder(release, tmp_path):
    return shutil.copytree(release.folder, tmp_path / "tiny")


def test_what_is_loaded_is_what_was_saved_rounded_to_bfloat16(release, tiny):
    tensors = to_tensors(release.backbone)
    assert tensors.keys() == to_tensors(tiny.backbone).keys()
    for name, array in tensors.items():
        if name != "class_map":
            rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(array, rounded, err_msg=name)
    np.testing.assert_array_equal(tensors["class_map"], np.arange(256))
    assert release.backbone.cfg == tiny.cfg


def test_saving_what_was_loaded_gives_the_same_interface(release, tmp_path):
    from composable.assembly.backbones import save_backbone

    interface = release.interface
    router = {
        name: getattr(interface, name)
        for name in (
            "discount",
            "top_k",
            "backbone_prior",
            "switch_rate",
            "output_bounds",
            "scout_max_width",
            "lora_max_rank",
        )
    }
    again = save_backbone(
        tmp_path / "again",
        release.backbone,
        name="tiny",
        version="1.0.0",
        anchor=release.anchor,
        router=router,
        texts={},
        description="",
        license_="",
    )
    assert again == interface
    weights = "weights.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (release.folder / weights).read_bytes()


def test_the_interface_names_trunk_and_backbone_apart(release, tmp_path):
    from composable.assembly.backbones import digests

    tensors = to_tensors(release.backbone, "BF16")
    before = digests(tensors, release.backbone.cfg)
    assert before["trunk"] == release.interface.trunk
    for name, hears_trunk in (
        ("embed", True),
        ("layers.0.ffn.w_up", True),
        ("layers.1.ffn.w_up", False),
        ("scout.w_in", False),
    ):
        changed = {**tensors, name: tensors[name] + tensors[name].dtype.type(1)}
        after = digests(changed, release.backbone.cfg)
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
