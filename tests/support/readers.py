"""Every reader of the project's formats, with good inputs to start from.

`tests/packaging/manifests/test_hostile_input.py` and `benchmarks/fuzz.py` feed them damaged ones.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import foreign_models
from tests.support.subword_kinds import KINDS

_DIGEST = "sha256:" + "a1" * 32
_EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
MANIFEST = f"""[expert]
name = "german"
version = "1.2.0-rc.1+cuda"
description = "One line."
license = "Apache-2.0"
authors = ["A <a@example.org>"]
backbone = "tiny-bytes"
languages = ["de"]
domains = ["law"]
provides = ["german"]
derives-from = "germanic@1.0.0"

[interface]
name = "tiny-bytes"
requires = "^1"
digest = "{_DIGEST}"

[body]
kind = "lora"
rank = 2
dtype = "BF16"

[scout]
width = 8

[requires]
french = ">=1.2, <2"

[conflicts]
dutch = "*"

[training]
data = "text"
tokens = 1000000
seconds = 1.5
seed = 0

[[files]]
name = "body.safetensors"
size = 10
sha256 = "{"a1" * 32}"
"""
PROJECT = """[project]
backbone = "tiny-bytes"
registry = "main"

[registries]
main = "../registry"
other = "../other"

[experts]
german = "^1.2"
french = { version = "1.2.*", registry = "other" }

[bindings]
dutch = "other"
"""
LOCK = f"""schema = 1

[interface]
name = "tiny-bytes"
version = "1.2.0"
digest = "{_DIGEST}"

[registries]
main = "../registry"

[[expert]]
name = "german"
version = "1.0.0"
registry = "main"
manifest = "{_DIGEST}"
interface = "{_DIGEST}"
requires = {{ french = "^1" }}
wanted-by = ["composable.toml: *"]
files = [
  {{ name = "body.safetensors", size = 10, digest = "{_DIGEST}" }},
]
"""
INDEX_LINE = {
    "name": "german",
    "version": "1.0.0",
    "interface": {"name": "tiny-bytes", "requires": "^1", "digest": _DIGEST},
    "manifest": _DIGEST,
    "files": [{"name": "body.safetensors", "size": 10, "digest": _DIGEST}],
    "requires": {"french": "^1"},
    "conflicts": {},
    "yanked": False,
    "published": "2026-11-24T12:00:00Z",
    "description": "One line.",
    "tags": ["de"],
}
UNIVERSE = {
    "interface": {"tiny": "1.2.0"},
    "packages": {
        "a": {"1.0.0": {"requires": {"b": "^1"}, "interface": "^1"}, "1.1.0": {"yanked": True}},
        "b": {"1.0.0": {"conflicts": {"c": "*"}}},
    },
    "requires": {"a": "*"},
    "locked": {"a": "1.0.0"},
}
INTERFACE = {
    "name": "tiny-bytes",
    "version": "1.2.0",
    "backbone": _DIGEST,
    "trunk": _DIGEST,
    "tokenizer": _DIGEST,
    "class_map": _DIGEST,
    "anchor": _DIGEST,
    "vocab_size": 256,
    "n_classes": 16,
    "d_model": 4,
    "d_ff": 8,
    "tap": 1,
    "slots": [1, 2],
    "scout_max_width": 8,
    "lora_max_rank": 4,
    "discount": 0.98,
    "top_k": 2,
    "backbone_prior": 0.5,
    "switch_rate": 0.01,
    "output_bounds": [1.0, 1.0],
}
_INTERFACE_DIGEST = "sha256:7f285631271e24ea213756af8296503599821768b0b881c548ae8fec8bc5cafa"
CATALOG_LINE = {
    "name": "german",
    "version": "1.2.0",
    "interface": "tiny-bytes ^1",
    "description": "One line.",
    "tags": ["de"],
}
BACKBONE_CONFIG = {
    **{"vocab_size": 600, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2},
    **{"d_head": 8, "d_ff": 64, "tap": 1, "context": 64, "scout_width": 16},
    **{"rope_theta": 10_000.0, "norm_eps": 1e-5, "qk_norm": "head", "is_tied": False},
    "rope_scaling": {
        **{"factor": 8.0, "low_frequency": 1.0, "high_frequency": 4.0, "original_context": 32}
    },
}
SPECIAL_TOKENS = {
    "begin": "<|begin|>",
    "ends": ["<|end|>"],
    "chat": {"user": ["<u>", "\n"], "assistant": ["<a>", "\n"], "preamble": "hi\n"},
}
CARD = {
    "expert": "german@1.0.0",
    "interface": {"name": "tiny-bytes", "digest": _INTERFACE_DIGEST},
    "tensors": {"body.safetensors": _EMPTY, "scout.safetensors": _EMPTY},
    "passed": True,
    "checks": [{"name": "gain", "passed": True, "found": "2.1 bits", "expected": "above 0"}],
    "measured": {
        "bits_per_byte": {"own_backbone": 6.3, "own_expert": 2.4, "own_mix": None},
        "anchor_loss": 0.001,
    },
    "against": {"release": "german@0.9.0", "tensors": {"body.safetensors": _DIGEST}},
    "training": {
        **{"documents": 3, "tokens": 96, "seconds": 1.5, "last": {"loss": 1.0}},
        "scout": {"tokens": 90, "steps": 10, "heldout_bits": 2.0},
    },
}
_HEADER = json.dumps(
    {
        "__metadata__": {"format": "composable"},
        "slots.1.w": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "slots.2.w": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
    }
).encode()
TENSORS = len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(12)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One reader.

    Args:
        read: Reads bytes; may raise a `ComposableError` and nothing else.
        seeds: Good bytes to start from.
    """

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...] = field(repr=False)


def make_targets(scratch: Path) -> Mapping[str, Target]:
    """Return all readers by name.

    Args:
        scratch: An empty folder for those that read files.
    """
    from composable.cli.look import format_measured
    from composable.errors import ComposableError, ManifestError, ModelError
    from composable.files.records import parse_record, parse_table
    from composable.files.safetensors import check_tensors, read_header
    from composable.interface import RouterInterface, TensorSpec
    from composable.model.config import BackboneConfig
    from composable.model.subwords import SubwordTokenizer
    from composable.packaging import (
        BackbonePackage,
        Constraint,
        Lock,
        Manifest,
        Project,
        Requirement,
        Universe,
        Version,
        resolve,
    )
    from composable.packaging.registry.lines import check_document, format_document, format_line
    from composable.packaging.registry.registry import Registry
    from composable.packaging.registry.release import Release
    from composable.packaging.registry.storage import Document, Folder
    from composable.packaging.registry.tar import TarFile
    from composable.packaging.versions.names import (
        check_file_name,
        check_package_name,
        confusable_key,
    )
    from composable.vetting.card import Card, format_card, require_passed

    def text_of(data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ManifestError("not text") from error  # files that are no text stop before

    def json_of(data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ManifestError("not JSON") from error

    def read_version(data: bytes) -> None:
        version = Version(text_of(data))
        assert Version(str(version)) == version
        assert hash(Version(str(version))) == hash(version)
        assert not version < version

    def read_constraint(data: bytes) -> None:
        constraint = Constraint(text_of(data))
        assert str(Constraint(str(constraint))) == str(constraint)
        for text in ("0.0.0", "1.2.3-rc.1", "1.2.3", "99.0.0"):
            same = Constraint(str(constraint)).contains(Version(text))
            assert constraint.contains(Version(text)) == same
        assert constraint.pinned is None or constraint.contains(constraint.pinned)

    def read_requirement(data: bytes) -> None:
        requirement = Requirement.parse(text_of(data))
        assert Requirement.parse(str(requirement)) == requirement

    def read_names(data: bytes) -> None:
        name = check_package_name(text_of(data))
        assert confusable_key(name)
        assert Path(check_file_name(name)).name == name

    def read_manifest(data: bytes) -> None:
        manifest = Manifest.loads(text_of(data))
        assert Manifest.loads(manifest.to_toml()) == manifest

    def read_backbone(data: bytes) -> None:
        package = BackbonePackage.loads(text_of(data))
        assert BackbonePackage.loads(package.to_toml()) == package

    def read_project(data: bytes) -> None:
        (scratch / "composable.toml").write_bytes(data)
        project = Project.read(scratch)
        for requirement in project.requirements[:2]:
            with contextlib.suppress(ComposableError):  # some edits must be left to the user
                assert project.add(requirement).experts.keys() == project.experts.keys()
                (scratch / "composable.toml").write_bytes(data)
                assert requirement.name not in project.remove(requirement.name).experts
                (scratch / "composable.toml").write_bytes(data)

    def read_lock(data: bytes) -> None:
        lock = Lock.loads(text_of(data))
        assert Lock.loads(lock.to_toml()) == lock

    def read_index_line(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            fields = json.loads(data)
            fields.pop("check", None)
            data = format_line(fields)  # or nothing would get beyond the check
        release = Release.from_line(data, "german", "index:1")
        assert Release.from_line(release.to_line(), "german", "index:1") == release

    def read_universe(data: bytes) -> None:
        universe = Universe.from_dict(json_of(data))
        if sum(map(len, universe.packages.values())) < 30:
            resolve(universe)

    def read_interface(data: bytes) -> None:
        interface = RouterInterface.from_json(text_of(data))
        assert RouterInterface.from_json(interface.to_json()) == interface

    def read_backbone_config(data: bytes) -> None:
        cfg = BackboneConfig.from_dict(parse_table(data, "config.json", ModelError))
        assert BackboneConfig.from_dict(cfg.to_dict()) == cfg

    definition, interface = KINDS["unigram"](), RouterInterface.from_dict(INTERFACE)

    def read_special_tokens(data: bytes) -> None:
        tokenizer = SubwordTokenizer.from_files(definition, text_of(data))
        assert SubwordTokenizer.from_files(*tokenizer.to_files()) == tokenizer

    def read_card(data: bytes) -> None:
        with contextlib.suppress(ComposableError):
            format_measured(parse_table(data, "card.json"))
        (scratch / "card.json").write_bytes(data)
        for name in ("body", "scout"):
            (scratch / f"{name}.safetensors").write_bytes(b"")
        card = require_passed(scratch, interface)
        assert parse_record(Card, format_card(card), "card.json") == card

    def read_index(data: bytes) -> None:
        try:
            check_document("index/ge/german.jsonl", Document(data, None), "index")
        except ComposableError:
            # A row of what could be read is a document of its own that is whole.
            row = {"name": "german", "data": data.decode(errors="replace")}
            data = format_document([row, row])
            check_document("index/ge/german.jsonl", Document(data, None), "index")
        (scratch / "index" / "ge").mkdir(parents=True, exist_ok=True)
        (scratch / "index" / "ge" / "german.jsonl").write_bytes(data)
        Registry(Folder(scratch)).versions("german")

    def read_catalog(data: bytes) -> None:
        (scratch / "catalog.jsonl").write_bytes(data)
        Registry(Folder(scratch)).entries()

    def read_export(data: bytes) -> None:
        path = scratch / "export.tar"
        path.write_bytes(data)
        export = TarFile(path)
        for name in ("config.json", "index/ge/german.jsonl", "../x"):
            export.read(name)

    def read_tensor_file(data: bytes) -> None:
        path = scratch / "x.safetensors"
        path.write_bytes(data)
        header = read_header(path)
        specs = {
            name: TensorSpec(shape=info.shape, dtypes=(info.dtype,))
            for name, info in header.items()
        }
        check_tensors(path, specs)

    (scratch / "config.json").write_text('{"kind": "composable-registry", "schema": 1}')
    index_line = json.dumps(INDEX_LINE).encode()
    catalog_line = json.dumps(CATALOG_LINE).encode()
    backbone = MANIFEST.replace("[expert]", "[backbone]").partition("backbone =")[0]
    return {
        "version": Target(
            read=read_version, seeds=(b"1.2.3-rc.1+build", b"0.0.0", b"10.20.30-a.1.b")
        ),
        "constraint": Target(
            read=read_constraint,
            seeds=(b">=1.2, <2, !=1.5.0", b"~=1.2.3-rc.1", b"1.2.*", b"^0.0.3", b"*"),
        ),
        "requirement": Target(
            read=read_requirement, seeds=(b"german>=1.2,<2", b"german@1.2.0", b"german")
        ),
        "names": Target(read=read_names, seeds=(b"german-law", b"a1-b2")),
        "manifest": Target(read=read_manifest, seeds=(MANIFEST.encode(),)),
        "backbone": Target(read=read_backbone, seeds=(backbone.encode(),)),
        "project": Target(read=read_project, seeds=(PROJECT.encode(),)),
        "lock": Target(read=read_lock, seeds=(LOCK.encode(),)),
        "index-line": Target(read=read_index_line, seeds=(index_line,)),
        "index": Target(
            read=read_index,
            seeds=(format_document([INDEX_LINE, {**INDEX_LINE, "version": "1.1.0"}]),),
        ),
        "catalog": Target(read=read_catalog, seeds=(catalog_line + b"\n",)),
        "export": Target(read=read_export, seeds=(_make_tar(),)),
        "universe": Target(read=read_universe, seeds=(json.dumps(UNIVERSE).encode(),)),
        "interface": Target(read=read_interface, seeds=(json.dumps(INTERFACE).encode(),)),
        "backbone-config": Target(
            read=read_backbone_config, seeds=(json.dumps(BACKBONE_CONFIG).encode(),)
        ),
        "special-tokens": Target(
            read=read_special_tokens, seeds=(json.dumps(SPECIAL_TOKENS).encode(),)
        ),
        "card": Target(read=read_card, seeds=(json.dumps(CARD).encode(),)),
        "tensors": Target(read=read_tensor_file, seeds=(TENSORS,)),
        **{
            name: Target(read=read, seeds=seeds)
            for name, (read, seeds) in foreign_models.make_readers(scratch).items()
        },
    }


TARGET_NAMES = (
    "version", "constraint", "requirement", "names", "manifest", "backbone", "project", "lock",
    "index-line", "index", "catalog", "export", "universe", "interface",
    "backbone-config", "special-tokens", "card", "tensors",
    *foreign_models.READER_NAMES,
)  # fmt: skip


def _make_tar() -> bytes:
    with io.BytesIO() as file:
        for format_ in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            with tarfile.open(fileobj=file, mode="w|", format=format_) as tar:
                for name in ("config.json", "index/ge/german.jsonl", "n" * 150):
                    member = tarfile.TarInfo(name)
                    member.size = 20
                    tar.addfile(member, io.BytesIO(bytes(20)))
        return file.getvalue()
