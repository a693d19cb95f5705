"""Manifests of an OCI registry: how releases and documents are stored as tagged manifests.

A release is a model artifact of ModelPack, so that tools which know nothing of composable can pull
it: one layer for each file, as it is. Its record is an annotation of the manifest. Every other
document is an artifact of one layer. A tag is made from a path, and back:

    records/german/1.2.0.json        german-1.2.0
    index/ge/german.jsonl            _index_ge_german.jsonl

No request is made here; `oci.py` makes them.

References:
    CNCF ModelPack, model-spec 0.0.7: spec.md, config.md and annotations.md.
    OCI image specification 1.1: manifest.md, and "Guidelines for Artifact Usage".
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from composable.errors import RegistryError
from composable.interface.digest import canonical_json, digest_bytes, is_digest
from composable.packaging.manifests.manifest import EXPERT_FILE, PackageFile
from composable.packaging.registry.release import Release

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
MODEL_TYPE: Final = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG_TYPE: Final = "application/vnd.cncf.model.config.v1+json"
DOCUMENT_TYPE: Final = "application/vnd.composable.document.v1"
EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
EMPTY: Final = b"{}"
# What registries accept at least.
MAX_MANIFEST_BYTES: Final = 4 << 20
MAX_TAG_LENGTH: Final = 128
_WEIGHTS: Final = "application/vnd.cncf.model.weight.v1.raw"
_SETTINGS: Final = "application/vnd.cncf.model.weight.config.v1.raw"
_TEXT: Final = "application/vnd.cncf.model.doc.v1.raw"
_KINDS: Final = {"safetensors": _WEIGHTS, "json": _SETTINGS, "toml": _SETTINGS}
_OCTETS: Final = "application/octet-stream"
_TITLE: Final = "org.opencontainers.image.title"
_FILE_PATH: Final = "org.cncf.model.filepath"
_RECORD: Final = "composable.record"
_REMOVED: Final = "composable.removed"
_RECORD_PATH: Final = re.compile(r"records/([a-z0-9-]+)/([0-9A-Za-z.-]+)\.json")
# A name has no dot, so the first one belongs to the version.
_RELEASE_TAG: Final = re.compile(r"([a-z][a-z0-9-]*)-([0-9]+\.[0-9A-Za-z.-]+)")
_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A manifest that was read.

    Args:
        digest: Digest of its bytes.
        layers: Its layers.
        record: The record of a release; None for a document.
        is_removed: Whether it stands for a file that was removed.
    """

    digest: str
    layers: tuple[PackageFile, ...]
    record: bytes | None = None
    is_removed: bool = False


def tag_of(path: str) -> str:
    """Return the tag of the manifest that holds a file.

    Raises:
        RegistryError: For a path that is too long.

    Example:
        >>> tag_of("records/german/1.2.0.json"), tag_of("records/german/1.2.0.yanked")
        ('german-1.2.0', '_records_german_1.2.0.yanked')
    """
    if found := _RECORD_PATH.fullmatch(path):
        tag = f"{found[1]}-{found[2]}"
    else:
        plain = (
            letter if letter in _PLAIN else "_" if letter == "/" else f"__{ord(letter):02x}"
            for letter in path
        )
        tag = f"_{''.join(plain)}"
    if len(tag) > MAX_TAG_LENGTH:
        raise RegistryError(
            f"the tag {tag[:60]}… has {len(tag)} characters, of which OCI registries allow "
            f"{MAX_TAG_LENGTH}",
            where=path[:200],
            hint="choose a shorter name or version, or another kind of registry",
        )
    return tag


def path_of(tag: str) -> str | None:
    """Return the path of the file that a tag holds; None for the tag of another program.

    Example:
        >>> path_of("german-1.2.0"), path_of("_index_ge_german.jsonl"), path_of("latest")
        ('records/german/1.2.0.json', 'index/ge/german.jsonl', None)
    """
    if found := _RELEASE_TAG.fullmatch(tag):
        return f"records/{found[1]}/{found[2]}.json"
    if not tag.startswith("_"):
        return None
    path = re.sub(
        "__([0-9a-f]{2})|_", lambda m: chr(int(m[1], 16)) if m[1] else "/", tag.removeprefix("_")
    )
    is_safe = all(part not in ("", ".", "..") for part in path.split("/"))
    return path if is_safe and tag_of(path) == tag else None


def make_release(
    line: bytes, release: Release, manifest_bytes: int, lacking: Collection[str] = ()
) -> tuple[bytes, bytes]:
    """Return the manifest of a release, and its configuration, which is a blob.

    Args:
        line: The record of the release.
        release: The same, parsed.
        manifest_bytes: The size of its `expert.toml`.
        lacking: Digests of files that the registry does not have, but their deltas.
    """
    expert = PackageFile(name=EXPERT_FILE, size=manifest_bytes, digest=release.manifest)
    files = (expert, *_list_layers(release, lacking))
    config = {
        "descriptor": {
            "createdAt": release.published,
            "name": release.name,
            "version": str(release.version),
            "family": release.interface.name,
            **({"description": release.description} if release.description else {}),
            **({"licenses": [release.license]} if release.license else {}),
        },
        "modelfs": {"type": "layers", "diffIds": [file.digest for file in files]},
        "config": {"format": "safetensors"},
    }
    data = canonical_json(config)
    annotations = {
        _TITLE: release.name,
        "org.opencontainers.image.version": str(release.version),
        "org.opencontainers.image.created": release.published,
        **({"org.opencontainers.image.licenses": release.license} if release.license else {}),
        _RECORD: line.decode(),
    }
    layers = [
        {
            "mediaType": _KINDS.get(file.name.rpartition(".")[2], _TEXT),
            "digest": file.digest,
            "size": file.size,
            "annotations": {_TITLE: file.name, _FILE_PATH: file.name},
        }
        for file in files
    ]
    return _format(MODEL_TYPE, MODEL_CONFIG_TYPE, data, layers, annotations), data


def make_document(path: str, data: bytes) -> bytes:
    """Return the manifest of a document."""
    return _format(DOCUMENT_TYPE, EMPTY_TYPE, EMPTY, [_describe(_OCTETS, data)], {_TITLE: path})


def make_removed(path: str) -> bytes:
    """Return the manifest that stands for a file that was removed; many registries delete none."""
    annotations = {_TITLE: path, _REMOVED: "true"}
    return _format(DOCUMENT_TYPE, EMPTY_TYPE, EMPTY, [_describe(EMPTY_TYPE, EMPTY)], annotations)


def parse_artifact(data: bytes, path: str, where: str) -> Artifact:
    """Parse and check a manifest.

    Args:
        data: Its bytes.
        path: The file that it should hold.
        where: Its location, for errors.

    Raises:
        RegistryError: When it is not a manifest of that file: an image, an index, or another
            program's artifact; or when it lists other files than its release.
    """
    try:
        fields = json.loads(data)
        kind, artifact = fields.get("mediaType", MANIFEST_TYPE), fields.get("artifactType")
        if kind != MANIFEST_TYPE:
            raise ValueError(f"it is of type {str(kind)[:80]!r}, expected {MANIFEST_TYPE!r}")
        found = _RECORD_PATH.fullmatch(path)
        annotations = fields.get("annotations", {})
        is_removed = annotations.get(_REMOVED) == "true"
        expected = MODEL_TYPE if found and not is_removed else DOCUMENT_TYPE
        if artifact != expected:
            raise ValueError(f"it holds {str(artifact)[:80]!r}, expected {expected!r}")
        layers = tuple(_read_layer(layer) for layer in fields["layers"])
        digest = digest_bytes(data)
        if is_removed:
            return Artifact(digest=digest, layers=layers, is_removed=True)
        if found is None:
            if annotations.get(_TITLE) != path or len(layers) != 1:
                raise ValueError(f"it is another document, {str(annotations.get(_TITLE))[:80]!r}")
            return Artifact(digest=digest, layers=layers)
        record = str(annotations[_RECORD]).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise RegistryError(
            f"is not what composable stores under that tag: {reason}",
            where=where,
            hint="another program, or an attacker, has written this tag",
        ) from error
    release = Release.from_line(record, found[1], where)
    if not _are_layers_of(release, {layer.digest for layer in layers}):
        raise RegistryError(
            "lists other files than the record of its release",
            where=where,
            hint="the registry is damaged or malicious",
        )
    return Artifact(digest=digest, layers=layers, record=record)


def list_blobs(file: PackageFile) -> list[PackageFile]:
    """Return the deltas that make a file, and what the last of them starts from.

    All are layers of the release, so that no registry removes them while it has the release,
    whatever becomes of the releases that they came from.
    """
    blobs = [
        PackageFile(name=f"{file.name}.delta{n or ''}", size=delta.size, digest=delta.digest)
        for n, delta in enumerate(file.deltas)
    ]
    last = file.deltas[-1]
    return [*blobs, PackageFile(name=f"{file.name}.base", size=last.base_size, digest=last.base)]


def _list_layers(release: Release, lacking: Collection[str]) -> list[PackageFile]:
    """Return the layers of a release, without its manifest."""
    layers = []
    for file in sorted(release.files, key=lambda file: file.name):
        if file.digest in lacking:
            layers += list_blobs(file)
        else:
            layers += [file, *(list_blobs(file)[:1] if file.deltas else ())]
    return layers


def _are_layers_of(release: Release, digests: set[str]) -> bool:
    """Return whether layers have what a release needs, and nothing else."""
    lacking = {file.digest for file in release.files if file.deltas} - digests
    expected = {release.manifest, *(layer.digest for layer in _list_layers(release, lacking))}
    return digests == expected


def _read_layer(layer: Any) -> PackageFile:
    digest, size = layer["digest"], layer["size"]
    if not is_digest(digest) or type(size) is not int or size < 0:
        raise ValueError("a layer has no SHA-256 or no size")
    name = str(layer.get("annotations", {}).get(_TITLE, digest))[:100]
    return PackageFile(name=name, size=size, digest=digest)


def _describe(kind: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest_bytes(data), "size": len(data)}


def _format(
    artifact: str,
    config_type: str,
    config: bytes,
    layers: list[dict[str, Any]],
    annotations: dict[str, str],
) -> bytes:
    return canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": artifact,
            "config": _describe(config_type, config),
            "layers": layers,
            "annotations": annotations,
        }
    )
