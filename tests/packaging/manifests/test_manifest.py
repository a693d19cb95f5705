"""Manifests: strict, located errors, one spelling."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composable.errors import ManifestError
from composable.packaging import BackbonePackage, Constraint, Manifest, Version
from composable.packaging.manifests.manifest import PackageFile

SHA = "ab" * 32
FULL = f"""
[expert]
name = "german"
version = "1.2.0-rc.1"
description = "German \\"prose\\" and Ümläute\\u007f"
license = "Apache-2.0"
backbone = "tiny-bytes"
authors = ["A. Author <a@example.org>"]
languages = ["de"]
domains = ["news"]
provides = ["translation"]
derives-from = "european@1.0.0"
merges = ["bavarian@1.1.0", "swiss@1.0.2"]

[interface]
name = "tiny-bytes"
requires = ">=1.2, <2"
digest = "sha256:{SHA}"

[body]
kind = "lora"
rank = 8
dtype = "BF16"

[scout]
width = 64

[requires]
european = "^1"

[conflicts]
old-german = "*"

[training]
data = "News of 2020"
tokens = 490000
seconds = 95.5
seed = 7
device = "2 cores"

[[files]]
name = "scout.safetensors"
size = 12
sha256 = "{SHA}"

[[files]]
name = "body.safetensors"
size = 9
sha256 = "{SHA}"
"""
SOURCE = """
[expert]
name = "german"
version = "1.0.0"
backbone = "tiny-bytes"
[interface]
name = "tiny-bytes"
requires = "1.2"
[body]
kind = "ffn"
[scout]
width = 64
"""


def test_every_field() -> None:
    manifest = Manifest.loads(FULL)
    assert manifest.name == "german"
    assert manifest.version == Version("1.2.0-rc.1")
    assert manifest.description == 'German "prose" and Ümläute\x7f'
    assert manifest.interface.requires == Constraint(">=1.2, <2")
    assert (manifest.body.kind, manifest.body.rank, manifest.body.dtype) == ("lora", 8, "BF16")
    assert manifest.requires == {"european": Constraint("^1")}
    assert manifest.derives_from == "european@1.0.0"
    assert manifest.merges == ("bavarian@1.1.0", "swiss@1.0.2")
    assert manifest.training is not None
    assert manifest.training.seconds == 95.5
    assert [file.name for file in manifest.files] == ["body.safetensors", "scout.safetensors"]
    assert manifest.files[0] == PackageFile(name="body.safetensors", size=9, digest=f"sha256:{SHA}")
    assert manifest.is_packed


def test_round_trip_has_one_spelling() -> None:
    for text in (FULL, SOURCE):
        manifest = Manifest.loads(text)
        again = Manifest.loads(manifest.to_toml())
        assert again == manifest
        assert again.to_toml() == manifest.to_toml()
        assert again.digest == manifest.digest


def test_what_an_author_may_leave_out() -> None:
    manifest = Manifest.loads(SOURCE)
    assert not manifest.is_packed
    assert manifest.interface.digest is None
    assert manifest.interface.requires == Constraint("^1.2")


def test_read_from_a_directory(tmp_path: Path) -> None:
    (tmp_path / "expert.toml").write_text(SOURCE)
    assert Manifest.read(tmp_path) == Manifest.read(tmp_path / "expert.toml")
    with pytest.raises(ManifestError, match="no such file"):
        Manifest.read(tmp_path / "nowhere.toml")
    (tmp_path / "expert.toml").write_bytes(b"\xff")
    with pytest.raises(ManifestError, match="not UTF-8"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "where", "message"),
    [
        ('name = "german"', 'name = "German"', "expert.name", "not a package name"),
        ('name = "german"', 'name = "../x"', "expert.name", "not a package name"),
        ('version = "1.2.0-rc.1"', 'version = "1.2"', "expert.version", "write '1.2.0'"),
        ('version = "1.2.0-rc.1"', "version = 1.2", "expert.version", "is not text"),
        ('license = "Apache-2.0"', 'licence = "x"', "expert.licence", "did you mean 'license'"),
        ('backbone = "tiny-bytes"', "", "expert.backbone", "missing"),
        ('authors = ["A.', 'authors = [1, "A.', "expert.authors[0]", "not text"),
        ('languages = ["de"]', 'languages = ["de\\n"]', "expert.languages[0]", "not a tag"),
        ('"european@1.0.0"', '"european"', "expert.derives-from", "not one release"),
        ('"swiss@1.0.2"', '"swiss"', "expert.merges[1]", "not one release"),
        ('"swiss@1.0.2"', '"swiss@one"', "expert.merges[1]", "one"),
        ('requires = ">=1.2, <2"', 'requires = "1 - 2"', "interface.requires", ">=1, <=2"),
        (f'digest = "sha256:{SHA}"', 'digest = "sha256:x"', "interface.digest", "not a digest"),
        ('kind = "lora"', 'kind = "lorra"', "body.kind", "did you mean 'lora'"),
        ('kind = "lora"', 'kind = "ffn"', "body.rank", "only a lora body"),
        ("rank = 8", "", "body.rank", "missing"),
        ("rank = 8", "rank = 0", "body.rank", "at least 1"),
        ("rank = 8", "rank = true", "body.rank", "not a whole number"),
        ('dtype = "BF16"', 'dtype = "F64"', "body.dtype", "not one of"),
        ("width = 64", "width = 6.4", "scout.width", "not a whole number"),
        ("[scout]", "[scuot]", "scout", "'scuot'"),
        ('european = "^1"', 'european = "new"', "requires.european", "not a version range"),
        ('european = "^1"', 'Ü = "^1"', 'requires."\\u00dc"', "TOML"),
        ('european = "^1"', '"../x" = "^1"', 'requires."../x"', "not a package name"),
        ('european = "^1"', 'german = "^1"', "requires.german", "cannot name itself"),
        ("seconds = 95.5", "seconds = -1.0", "training.seconds", "at least 0"),
        ("seconds = 95.5", "seconds = nan", "training.seconds", "finite"),
        ("tokens = 490000", "tokns = 1", "training.tokns", "did you mean 'tokens'"),
        ('name = "scout.s', 'name = "../scout.s', "files[0].name", "not a file name"),
        ('name = "scout.safetensors"', 'name = "Body.safetensors"', "files[1].name", "twice"),
        ('name = "scout.safetensors"', 'name = "expert.toml"', "files[0].name", "twice"),
        ("size = 12", "size = -12", "files[0].size", "at least 0"),
        ("size = 12", f"size = {2**63 - 1}\nmode = 1", "files[0].mode", "unknown field"),
    ],
)
def test_errors_say_where(old: str, new: str, where: str, message: str) -> None:
    assert old in FULL
    with pytest.raises(ManifestError) as caught:
        Manifest.loads(FULL.replace(old, new, 1))
    if message == "TOML":  # a bare key may not hold such a letter
        assert caught.value.where == "expert.toml"
    else:
        assert caught.value.where == f"expert.toml: {where}"
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "[expert]\n[expert]", "expert = 1", "expert = []", "a = " + "[" * 10_000,
        "x" * 5_000_000, "[expert]\nname = 'a'\nname = 'b'", "requires = []" + SOURCE,
        SOURCE + "[requires]\na = 1", SOURCE + "[extra]\n", SOURCE + "files = 1\n",
        "files = [1]" + SOURCE,
    ],
)  # fmt: skip
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.loads(text)
    assert str(caught.value.where).startswith("expert.toml")


@given(st.text(max_size=60), st.integers(0, len(FULL)), st.integers(0, 20))
def test_damage_raises_only_our_error(insert: str, at: int, cut: int) -> None:
    with contextlib.suppress(ManifestError):
        Manifest.loads(FULL[:at] + insert + FULL[at + cut :])


@given(st.text(max_size=200))
def test_any_text_survives_writing(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    manifest = Manifest.loads(SOURCE)
    changed: Any = {"description": text}
    import dataclasses

    described = dataclasses.replace(manifest, **changed)
    assert Manifest.loads(described.to_toml()).description == text


def test_backbone_package() -> None:
    text = f"""
[backbone]
name = "tiny-bytes"
version = "1.0.0"
description = "A small one"
license = "Apache-2.0"

[[files]]
name = "backbone.safetensors"
size = 3
sha256 = "{SHA}"
"""
    package = BackbonePackage.loads(text)
    assert BackbonePackage.loads(package.to_toml()) == package
    with pytest.raises(ManifestError) as caught:
        BackbonePackage.loads(text.replace("license", "licence"))
    assert caught.value.where == "backbone.toml: backbone.licence"
