"""Bills of materials: valid by the published schemas, complete, and the same for the same lock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composable.errors import LockError, PackagingError, RegistryError
from composable.files.blobs import blob_path
from composable.interface import RouterInterface
from composable.packaging import (
    Lock,
    Project,
    Registry,
    Requirement,
    Store,
    lock_project,
    sync_project,
)
from composable.packaging.bom.cyclonedx import format_cyclonedx
from composable.packaging.bom.inventory import Inventory, read_source_date, take_inventory
from composable.packaging.bom.spdx import format_spdx

DATA = "Letters of *\U0001f4ee* 1890–1914,\\n\\u0007 scanned"
PROVENANCE = f'[training]\ndata = "{DATA}"\n[origin]\nformat = "peft"\nbase = "a/b"\n' + "".join(
    f'{field} = "sha256:{"3" * 64}"\n' for field in ("config", "weights", "sample")
)
CARD = {
    "measured": {
        "bits_per_byte": {
            "own_expert": 1.5,
            "own_mix": "high",
            "anchor_mix": float("inf"),
            "a": 10**400,
        },
        "anchor_loss": 0.25,
        "documents": {"own_digest": "sha256:" + "4" * 64},
    },
    "checks": [{"name": "gain", "passed": True}, {"name": 3}, "gain"],
    "training": {"recipe": ["?"]},
}


@pytest.fixture
def locked(
    registry: Registry,
    make_expert: Callable[..., Path],
    project: Project,
    interface: RouterInterface,
) -> tuple[Project, Lock]:
    """A project with a dependency, a hostile card, odd licences and build metadata."""
    base = make_expert("base", "1.0.0+build.7", license_="LicenseRef-Team-1 OR (mit)")
    needs = {"base": "^1"}
    german = make_expert("german", license_="GPL-3.0-only", requires=needs, extra=PROVENANCE)
    (german / "card.json").write_text(json.dumps(CARD))
    odd = make_expert("odd", license_="ask \U0001f600 us", seed=4)
    (odd / "card.json").write_text('["no card"]')
    bare = make_expert("bare", seed=6)
    for folder in (base, german, odd, bare):
        registry.publish(folder, interface=interface)
    for name in ("german", "odd", "bare"):
        project = project.add(Requirement.parse(name))
    return project, lock_project(project, interface)


@pytest.fixture
def inventory(locked: tuple[Project, Lock], store: Store, interface: RouterInterface) -> Inventory:
    return take_inventory(*locked, store, interface)


def component(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (part for part in document["components"] if part["name"] == name)
    return found


@pytest.mark.parametrize("time", [None, "2026-11-24T12:00:00Z"])
def test_cyclonedx_fits_the_published_schema(inventory: Inventory, time: str | None) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    pytest.importorskip("jsonschema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    text = format_cyclonedx(inventory, "0.2.0", time)
    assert validator.validate_str(text) is None
    broken = json.loads(text)
    broken["components"][0]["modelCard"]["modelParameters"]["approach"]["type"] = "by magic"
    assert validator.validate_str(json.dumps(broken)) is not None, "model cards are validated"
    assert (json.loads(text)["metadata"].get("timestamp")) == time


@pytest.mark.parametrize("time", [None, "2026-11-24T12:00:00Z"])
def test_spdx_fits_the_specification(inventory: Inventory, time: str | None) -> None:
    parser = pytest.importorskip("spdx_tools.spdx.parser.jsonlikedict.json_like_dict_parser")
    validation = pytest.importorskip("spdx_tools.spdx.validation.document_validator")
    text = format_spdx(inventory, "0.2.0", time)
    document = parser.JsonLikeDictParser().parse(json.loads(text))
    assert validation.validate_full_spdx_document(document) == []
    assert document.creation_info.created.year == (2026 if time else 1970)
    assert len(document.packages) == 1 + 5 + sum(len(part.files) for part in inventory.parts)


def test_what_cyclonedx_lists(
    inventory: Inventory, locked: tuple[Project, Lock], interface: RouterInterface
) -> None:
    _, lock = locked
    document = json.loads(format_cyclonedx(inventory, "0.2.0"))
    assert [part["name"] for part in document["components"]] == [
        "tiny-bytes",
        *("bare", "base", "german", "odd"),
    ]
    german = component(document, "german")
    assert german["type"] == "machine-learning-model"
    assert german["hashes"] == [{"alg": "SHA-256", "content": lock["german"].manifest[7:]}]
    assert {f["name"]: f["hashes"][0]["content"] for f in german["components"]} == {
        file.name: file.digest[7:] for file in lock["german"].files
    }
    assert german["licenses"] == [{"expression": "GPL-3.0-only", "acknowledgement": "declared"}]
    assert german["pedigree"]["ancestors"] == [{"type": "machine-learning-model", "name": "a/b"}]
    card = german["modelCard"]
    data = card["modelParameters"]["datasets"]
    assert [entry["name"] for entry in data] == ["training text", "sample", "held-out text"]
    assert data[0]["description"] == json.loads(f'"{DATA}"')
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics == [
        {"type": "bits per byte", "value": "1.5", "slice": "own expert"},
        {"type": "relative loss on public text", "value": "0.25", "slice": "anchor"},
    ]
    properties = {entry["name"]: entry["value"] for entry in german["properties"]}
    assert properties["composable:registry"] == "../registry"
    assert properties["composable:check:gain"] == "passed"
    assert properties["composable:interface-digest"] == interface.digest
    odd = component(document, "odd")
    assert odd["licenses"][0]["license"]["name"] == "ask \U0001f600 us"
    assert "licenses" not in component(document, "bare"), "no licence is assumed"
    assert component(document, "tiny-bytes")["licenses"][0]["expression"] == "Apache-2.0"
    refs = {part["name"]: part["bom-ref"] for part in document["components"]}
    assert refs["base"].startswith("pkg:generic/composable/base@1.0.0%2Bbuild.7?checksum=sha256:")
    needs = {entry["ref"]: entry["dependsOn"] for entry in document["dependencies"]}
    assert needs[refs["german"]] == sorted([refs["tiny-bytes"], refs["base"]])
    required = ("tiny-bytes", "german", "odd", "bare")
    assert needs["composed-model"] == sorted(refs[name] for name in required)


def test_what_spdx_lists(inventory: Inventory, locked: tuple[Project, Lock]) -> None:
    _, lock = locked
    document = json.loads(format_spdx(inventory, "0.2.0"))
    packages = {package["name"]: package for package in document["packages"]}
    names = ("german", "base", "odd", "bare")
    declared = {name: packages[name]["licenseDeclared"] for name in names}
    assert declared == {
        "german": "GPL-3.0-only",
        "base": "LicenseRef-Team-1 OR (MIT)",
        "odd": "NOASSERTION",
        "bare": "NONE",
    }
    assert packages["german"]["checksums"][0]["checksumValue"] == lock["german"].manifest[7:]
    assert "training text: Letters of" in packages["german"]["comment"]
    (own,) = document["hasExtractedLicensingInfos"]
    assert own["licenseId"] == "LicenseRef-Team-1"
    ids = {name: package["SPDXID"] for name, package in packages.items()}
    relations = {tuple(relation.values()) for relation in document["relationships"]}
    assert (ids["german"], "DEPENDS_ON", ids["base"]) in relations
    assert (ids["german"], "CONTAINS", ids["german/body.safetensors"]) in relations


@pytest.mark.parametrize("write", [format_cyclonedx, format_spdx])
def test_the_same_lock_gives_the_same_bytes(
    write: Callable[..., str],
    locked: tuple[Project, Lock],
    inventory: Inventory,
    store: Store,
    interface: RouterInterface,
    registry: Registry,
    make_expert: Callable[..., Path],
) -> None:
    project, lock = locked
    text = write(inventory, "0.2.0")
    sync_project(project, lock, store, interface=interface)
    (registry.storage.root / "index").rename(registry.storage.root / "hidden")
    (registry.storage.root / "blobs").rename(registry.storage.root / "hidden-too")
    again = take_inventory(project, Lock.loads(lock.to_toml()), store, interface)
    assert write(again, "0.2.0") == text, "from the store alone, without a registry"
    fewer = project.remove("odd")
    smaller = take_inventory(fewer, lock.without(["odd"]), store, interface)
    assert write(smaller, "0.2.0") != text
    assert smaller.id != inventory.id


def test_experts_of_folders(
    make_expert: Callable[..., Path], project: Project, store: Store, interface: RouterInterface
) -> None:
    for name, is_editable in {"copied": False, "edited": True}.items():
        folder = make_expert(name, license_="MIT")
        (folder / "card.json").write_text(json.dumps(CARD))
        requirement = Requirement.parse(name)
        project = project.add(requirement, path=str(folder), is_editable=is_editable)
    lock = lock_project(project, interface)
    copied, edited = take_inventory(project, lock, store, interface).experts
    assert (copied.manifest, edited.manifest) == (lock["copied"].manifest, None)
    assert edited.facts["editable"] == "true"
    assert len(copied.metrics) == len(edited.metrics) == 2
    assert edited.purl == "pkg:generic/composable/edited@1.0.0"


def test_what_does_not_fit_its_lock(
    locked: tuple[Project, Lock], store: Store, interface: RouterInterface, registry: Registry
) -> None:
    project, lock = locked
    edited = Lock.loads(lock.to_toml().replace('license = "GPL-3.0-only"', 'license = "MIT"'))
    with pytest.raises(LockError, match="license is MIT in the lock"):
        take_inventory(project, edited, store, interface)
    with pytest.raises(LockError, match="no longer required"):
        take_inventory(project.remove("odd"), lock, store, interface)
    (registry.storage.root / blob_path(lock["odd"].digests["card.json"])).unlink()
    with pytest.raises(RegistryError, match="no such file"):
        take_inventory(
            project.add(Requirement.parse("odd")), lock, Store(store.root / "2"), interface
        )


@pytest.mark.parametrize(
    ("text", "time"),
    [("", None), ("0", "1970-01-01T00:00:00Z"), ("1700000000", "2023-11-14T22:13:20Z")],
)
def test_the_time_of_a_document(
    monkeypatch: pytest.MonkeyPatch, text: str, time: str | None
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    assert read_source_date() == time


@pytest.mark.parametrize("text", ["now", "-1", "1.5", "9" * 30, "١"])
def test_a_bad_time(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(PackagingError, match="is not a time in seconds"):
        read_source_date()
