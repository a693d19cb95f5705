"""The manifests `expert.toml` and `backbone.toml`: the metadata of packages. Data only.

An author writes a manifest without files and, before packing, without the interface digest;
`publish` fills both in. No value of a manifest is executed or imported, and none is joined to a
path before it is checked here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from composable.errors import ManifestError, PackagingError, did_you_mean
from composable.interface.contract import BODY_KINDS, DTYPES, BodyKind
from composable.interface.digest import digest_bytes, is_digest
from composable.packaging.manifests.licenses import MAX_LICENSE_LENGTH
from composable.packaging.manifests.toml import Table, format_toml, parse_toml, read_toml_text
from composable.packaging.versions.constraint import Constraint, Requirement
from composable.packaging.versions.names import check_file_name, check_package_name
from composable.packaging.versions.version import Version

EXPERT_FILE: Final = "expert.toml"
BACKBONE_FILE: Final = "backbone.toml"
BODY_FILE: Final = "body.safetensors"
SCOUT_FILE: Final = "scout.safetensors"
STATISTICS_FILE: Final = "statistics.safetensors"
# The files that an expert may publish besides its manifest; the first two are required.
EXPERT_FILES: Final = (BODY_FILE, SCOUT_FILE, STATISTICS_FILE, "card.json", "README.md")
MAX_FILES: Final = 256
MAX_TAG_LENGTH: Final = 256
MAX_DESCRIPTION_LENGTH: Final = 500
# Files are hashed in chunks of this size as well as whole, so that an interrupted download resumes
# at a chunk, and damage is located to one.
CHUNK_BYTES: Final = 8 << 20
# What the name of a file's delta ends in, where that is kept beside other files.
DELTA_SUFFIX: Final = ".delta"
_TAG: Final = re.compile(r"[A-Za-z0-9]+([ ._+-][A-Za-z0-9]+)*")
_HEX: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A way to make a file from another one, see `composable.files.delta`.

    Args:
        digest: `sha256:…` of the delta.
        size: Bytes of the delta.
        base: `sha256:…` of the file that it starts from.
        base_size: Bytes of that file.
    """

    digest: str
    size: int
    base: str
    base_size: int

    def as_file(self, name: str) -> PackageFile:
        """Return the delta as a file, beside the file `name` that it makes."""
        return PackageFile(name=f"{name}{DELTA_SUFFIX}", size=self.size, digest=self.digest)


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """One file of a package.

    Args:
        name: Flat file name.
        size: Bytes.
        digest: `sha256:…` of its bytes.
        chunks: SHA-256 in hex of every 8 MiB of it; empty for a file of one chunk, or if only the
            digest is known. Ignored by equality, since the digest determines them.
        deltas: How a registry that may not have the file makes it: the first delta makes it from
            its base, the next one makes that base, and so on. A manifest lists none: they say how
            a file is kept, not what it is. Ignored by equality.
    """

    name: str
    size: int
    digest: str
    chunks: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)
    deltas: tuple[Delta, ...] = dataclasses.field(default=(), compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class InterfaceNeed:
    """The router interface that an expert plugs into.

    Args:
        name: Name of the interface.
        requires: Range of its versions.
        digest: Digest of the interface that the expert was trained against; None until packed.
    """

    name: str
    requires: Constraint
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class BodySpec:
    """The kind of body of an expert.

    Args:
        kind: `ffn`, a full feed-forward layer per slot, or `lora`, a low-rank change of one.
        rank: Rank of a `lora` body; None for `ffn`.
        dtype: `F32` or `BF16`.
    """

    kind: BodyKind
    rank: int | None = None
    dtype: str = "F32"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an expert was trained, as stated by its author.

    Args:
        data: Description of the data.
        tokens: Number of training tokens.
        seconds: Wall time in seconds.
        seed: Seed of every random choice.
        device: Device that it was trained on.
    """

    data: str = ""
    tokens: int | None = None
    seconds: float | None = None
    seed: int | None = None
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an expert was imported from, if it was not trained with composable.

    Args:
        format: The other project's format, such as `peft`.
        base: Name of the model that it was made for, in the other project.
        config: Digest of its config.
        weights: Digest of its tensors.
        sample: Digest of the text that the scout was trained on.
    """

    format: str
    base: str = ""
    config: str
    weights: str
    sample: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a proposal became a release: who proposed it, from what, and what it was accepted on.

    Args:
        proposal: Digest of the proposal's statement.
        proposer: The public key that signed it; empty if it was unsigned.
        base: The release that it was a change of, as `NAME@VERSION`.
        verdict: Digest of the verdict of its review.
    """

    proposal: str
    proposer: str = ""
    base: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `expert.toml`.

    Args:
        name: Package name.
        version: Version of the expert.
        backbone: Name of the backbone that it was trained for.
        interface: The router interface that it plugs into.
        body: Kind of its body.
        scout_width: Hidden width of its scout.
        description: One line.
        license: SPDX expression, which `composable publish` requires; empty if none is stated.
        authors: Names, with addresses if the authors like.
        languages: Natural or programming languages, as tags.
        domains: Subjects, as tags.
        provides: Names of capabilities, for search.
        derives_from: The release that training started from, as `NAME@VERSION`.
        merges: The releases that it was merged from, all of which derive from that one.
        requires: Ranges of experts that this one depends on, by name.
        extras: Ranges of experts that each optional extra depends on in addition, by extra.
        conflicts: Experts that it cannot be installed with, by name.
        training: Provenance.
        origin: What it was imported from, if it was not trained with composable.
        provenance: How it became a release, if it was proposed and accepted.
        files: The package's files except the manifest; empty until packed.

    Example:
        >>> manifest = Manifest(
        ...     name="german",
        ...     version=Version("1.0.0"),
        ...     backbone="tiny-bytes",
        ...     interface=InterfaceNeed(name="tiny-bytes", requires=Constraint("^1")),
        ...     body=BodySpec(kind="ffn"),
        ...     scout_width=64,
        ... )
        >>> Manifest.loads(manifest.to_toml()) == manifest
        True
    """

    name: str
    version: Version
    backbone: str
    interface: InterfaceNeed
    body: BodySpec
    scout_width: int
    description: str = ""
    license: str = ""
    authors: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    derives_from: str | None = None
    merges: tuple[str, ...] = ()
    requires: Mapping[str, Constraint] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, Mapping[str, Constraint]] = dataclasses.field(default_factory=dict)
    conflicts: Mapping[str, Constraint] = dataclasses.field(default_factory=dict)
    training: Training | None = None
    origin: Origin | None = None
    provenance: Provenance | None = None
    files: tuple[PackageFile, ...] = ()

    @property
    def is_packed(self) -> bool:
        """Whether files and interface digest are filled in."""
        return bool(self.files) and self.interface.digest is not None

    @property
    def digest(self) -> str:
        """Digest of the canonical text, as registries and locks record it."""
        return digest_bytes(self.to_toml().encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an `expert.toml`, given its path or that of its directory.

        Raises:
            ManifestError: When it is missing or invalid.
        """
        return cls.loads(*_read_text(path, EXPERT_FILE))

    @classmethod
    def loads(cls, text: str, where: str = EXPERT_FILE) -> Self:
        """Parse a manifest from TOML text.

        Args:
            text: The text.
            where: Name of the file, for errors.

        Raises:
            ManifestError: `where` is the name of the file and the dotted path of the field.
        """
        top = parse_toml(text, where)
        expert, interface = top.table("expert"), top.table("interface")
        body, scout = top.table("body"), top.table("scout")
        manifest = cls(
            **_read_head(expert),
            backbone=check_package_name(expert.text("backbone"), expert.where("backbone")),
            languages=read_tags(expert, "languages"),
            domains=read_tags(expert, "domains"),
            provides=read_tags(expert, "provides"),
            derives_from=_read_release(expert, "derives-from"),
            merges=_read_merges(expert),
            interface=InterfaceNeed(
                name=check_package_name(interface.text("name"), interface.where("name")),
                requires=interface.value("requires", Constraint),
                digest=interface.value("digest", check_digest, None),
            ),
            body=_read_body(body),
            scout_width=scout.integer("width", minimum=1),
            requires=top.ranges("requires"),
            extras=read_extras(top.table("extras", {})),
            conflicts=top.ranges("conflicts"),
            training=_read_training(top.table("training")) if "training" in top else None,
            origin=_read_origin(top.table("origin")) if "origin" in top else None,
            provenance=_read_provenance(top.table("provenance")) if "provenance" in top else None,
            files=_read_files(top),
        )
        for table in (expert, interface, body, scout):
            table.finish()
        top.finish(also=("training", "origin", "provenance"))
        extras = {f"extras.{extra}": ranges for extra, ranges in manifest.extras.items()}
        named = {"requires": manifest.requires, "conflicts": manifest.conflicts, **extras}
        for field, ranges in named.items():
            if manifest.name in ranges:
                raise ManifestError(
                    "an expert cannot name itself", where=top.where(f"{field}.{manifest.name}")
                )
        return manifest

    def to_toml(self) -> str:
        """Return the canonical text: in a fixed order, without empty fields."""
        rank = {"rank": self.body.rank} if self.body.rank is not None else {}
        training = dataclasses.asdict(self.training) if self.training else {}
        head = {
            **_format_head(self),
            "backbone": self.backbone,
            "languages": list(self.languages) or None,
            "domains": list(self.domains) or None,
            "provides": list(self.provides) or None,
            "derives-from": self.derives_from,
            "merges": list(self.merges) or None,
        }
        interface = {
            "name": self.interface.name,
            "requires": str(self.interface.requires),
            "digest": self.interface.digest,
        }
        return format_toml(
            [
                ("expert", head),
                ("interface", interface),
                ("body", {"kind": self.body.kind, **rank, "dtype": self.body.dtype}),
                ("scout", {"width": self.scout_width}),
                ("requires", {name: str(r) for name, r in sorted(self.requires.items())}),
                *(
                    (f"extras.{extra}", {name: str(r) for name, r in sorted(ranges.items())})
                    for extra, ranges in sorted(self.extras.items())
                ),
                ("conflicts", {name: str(r) for name, r in sorted(self.conflicts.items())}),
                ("training", {key: value for key, value in training.items() if value != ""}),
                ("origin", dataclasses.asdict(self.origin) if self.origin else {}),
                ("provenance", _format_provenance(self.provenance)),
                *_format_files(self.files),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class BackbonePackage:
    """The contents of `backbone.toml`.

    Args:
        name: Package name, also that of the interface that it publishes.
        version: Version of the backbone.
        description: One line.
        license: SPDX expression; empty if none is stated.
        authors: Names, with addresses if the authors like.
        files: The package's files except the manifest; empty until packed.

    Example:
        >>> package = BackbonePackage(name="tiny-bytes", version=Version("1.4.0"))
        >>> print(package.to_toml(), end="")
        [backbone]
        name = "tiny-bytes"
        version = "1.4.0"
    """

    name: str
    version: Version
    description: str = ""
    license: str = ""
    authors: tuple[str, ...] = ()
    files: tuple[PackageFile, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of the canonical text."""
        return digest_bytes(self.to_toml().encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a `backbone.toml`, given its path or that of its directory.

        Raises:
            ManifestError: When it is missing or invalid.
        """
        return cls.loads(*_read_text(path, BACKBONE_FILE))

    @classmethod
    def loads(cls, text: str, where: str = BACKBONE_FILE) -> Self:
        """Parse a manifest from TOML text; raises the same errors as `Manifest.loads`."""
        top = parse_toml(text, where)
        backbone = top.table("backbone")
        package = cls(**_read_head(backbone), files=_read_files(top))
        backbone.finish()
        top.finish()
        return package

    def to_toml(self) -> str:
        """Return the canonical text."""
        return format_toml([("backbone", _format_head(self)), *_format_files(self.files)])


def _read_text(path: Path, name: str) -> tuple[str, str]:
    """Return the text of a manifest and the name of its file."""
    path = path / name if path.is_dir() else path
    return read_toml_text(path), path.name


def _read_head(table: Table) -> dict[str, Any]:
    """Read the fields that experts and backbones share."""
    return {
        "name": check_package_name(table.text("name"), table.where("name")),
        "version": table.version("version"),
        "description": table.text("description", "", max_length=MAX_DESCRIPTION_LENGTH),
        "license": table.text("license", "", max_length=MAX_LICENSE_LENGTH),
        "authors": table.texts("authors"),
    }


def _format_head(package: Manifest | BackbonePackage) -> dict[str, Any]:
    return {
        "name": package.name,
        "version": str(package.version),
        "description": package.description or None,
        "license": package.license or None,
        "authors": list(package.authors) or None,
    }


def check_digest(text: str) -> str:
    """Return `text` if it is a digest.

    Raises:
        ManifestError: For any other text.
    """
    if not is_digest(text):
        raise ManifestError(f"{text[:80]!r} is not a digest (sha256: and 64 hex digits)")
    return text


def read_tags(table: Table, field: str) -> tuple[str, ...]:
    """Return a field as a list of tags, empty when it is missing.

    Raises:
        ManifestError: For text that is not a tag.
    """
    tags = table.texts(field)
    for index, tag in enumerate(tags):
        if len(tag) > MAX_TAG_LENGTH or _TAG.fullmatch(tag) is None:
            raise ManifestError(
                f"{tag[:80]!r} is not a tag", where=table.where(f"{field}[{index}]")
            )
    return tags


def _read_release(table: Table, field: str) -> str | None:
    """Read one exact release, such as that of `derives-from`; None if the field is missing."""
    text = table.text(field, None)
    return None if text is None else _check_release(text, table.where(field))


def _read_merges(expert: Table) -> tuple[str, ...]:
    """Read `merges`: several exact releases, or none."""
    return tuple(
        _check_release(text, expert.where(f"merges[{i}]"))
        for i, text in enumerate(expert.texts("merges"))
    )


def _check_release(text: str, where: str) -> str:
    """Return a text as `NAME@VERSION` if it names one release."""
    try:
        found = Requirement.parse(text)
    except PackagingError as error:
        raise ManifestError(error.message, where=where, hint=error.hint) from error
    if found.constraint.pinned is None:
        raise ManifestError(
            f"{text!r} is not one release, expected an exact version",
            where=where,
            hint=f"write '{found.name}@1.2.0'",
        )
    return f"{found.name}@{found.constraint.pinned}"


def _read_body(table: Table) -> BodySpec:
    kind = table.text("kind")
    if kind not in BODY_KINDS:
        raise ManifestError(
            f"{kind[:80]!r} is not a body kind, expected {' or '.join(BODY_KINDS)}",
            where=table.where("kind"),
            hint=did_you_mean(kind, BODY_KINDS),
        )
    dtype = table.text("dtype", "F32")
    if dtype not in DTYPES:
        raise ManifestError(
            f"{dtype[:80]!r} is not one of {', '.join(DTYPES)}", where=table.where("dtype")
        )
    if kind == "ffn" and "rank" in table:
        raise ManifestError("only a lora body has a rank", where=table.where("rank"))
    rank = table.integer("rank", minimum=1) if kind == "lora" else None
    return BodySpec(kind=kind, rank=rank, dtype=dtype)


def read_extras(table: Table) -> dict[str, dict[str, Constraint]]:
    """Return the additional requirements of each extra, by its name.

    Raises:
        ManifestError: For an invalid name or range, or an extra without requirements.
    """
    extras = {}
    for extra in table.names():
        check_package_name(extra, table.where(extra))
        extras[extra] = table.ranges(extra)
        if not extras[extra]:
            raise ManifestError("the extra requires no package", where=table.where(extra))
    return extras


def _read_training(table: Table) -> Training:
    training = Training(
        data=table.text("data", ""),
        tokens=table.integer("tokens", None),
        seconds=table.number("seconds", None),
        seed=table.integer("seed", None),
        device=table.text("device", "", max_length=200),
    )
    table.finish()
    return training


def _read_origin(table: Table) -> Origin:
    digests = {field: table.value(field, check_digest) for field in ("config", "weights", "sample")}
    origin = Origin(
        format=table.text("format", max_length=40),
        base=table.text("base", "", max_length=500),
        **digests,
    )
    table.finish()
    return origin


def _read_provenance(table: Table) -> Provenance:
    provenance = Provenance(
        proposal=table.value("proposal", check_digest),
        proposer=table.text("proposer", "", max_length=100),
        base=_read_release(table, "base") or table.text("base"),
        verdict=table.value("verdict", check_digest),
    )
    table.finish()
    return provenance


def _format_provenance(provenance: Provenance | None) -> dict[str, str]:
    fields = {} if provenance is None else dataclasses.asdict(provenance)
    return {name: text for name, text in fields.items() if text}


def _read_files(top: Table) -> tuple[PackageFile, ...]:
    """Read `[[files]]`; refuse two names that differ only in case."""
    files: dict[str, PackageFile] = {}
    tables = top.tables("files")
    if len(tables) > MAX_FILES:
        raise ManifestError(
            f"{len(tables)} files, expected at most {MAX_FILES}", where=top.where("files")
        )
    for table in tables:
        name = check_file_name(table.text("name"), table.where("name"))
        if name.lower() in files or name.lower() in (EXPERT_FILE, BACKBONE_FILE):
            raise ManifestError(f"{name!r} is listed twice", where=table.where("name"))
        sha256 = table.text("sha256")
        if _HEX.fullmatch(sha256) is None:
            raise ManifestError(
                f"{sha256[:80]!r} is not 64 hex digits", where=table.where("sha256")
            )
        size = table.integer("size")
        files[name.lower()] = PackageFile(
            name=name, size=size, digest=f"sha256:{sha256}", chunks=_read_chunks(table, size)
        )
        table.finish()
    return tuple(sorted(files.values(), key=lambda file: file.name))


def _read_chunks(table: Table, size: int) -> tuple[str, ...]:
    chunks = table.texts("chunks")
    if chunks and len(chunks) != -(-size // CHUNK_BYTES):
        raise ManifestError(
            f"{len(chunks)} digests, expected one for every {CHUNK_BYTES:,} of {size:,} bytes",
            where=table.where("chunks"),
        )
    for index, chunk in enumerate(chunks):
        if _HEX.fullmatch(chunk) is None:
            raise ManifestError(
                f"{chunk[:80]!r} is not 64 hex digits", where=table.where(f"chunks[{index}]")
            )
    return chunks


def _format_files(files: tuple[PackageFile, ...]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (
            "[files]",
            {
                "name": file.name,
                "size": file.size,
                "sha256": file.digest.removeprefix("sha256:"),
                "chunks": list(file.chunks) or None,
            },
        )
        for file in sorted(files, key=lambda file: file.name)
    ]
