"""Registries: publish releases and find them.

The layout consists of plain files, so that any static host can serve it:

    config.json                      kind and version of the layout
    index/<shard>/<name>.jsonl       one line per release: all that the resolver needs
    blobs/<aa>/<sha256>              manifests and files by digest
    catalog.jsonl                    one line per package, for search and hints
    advisories.jsonl                 what is known against releases; optional, see `advisories.py`
    records/<name>/<version>.json    one release as published; created once, never changed
    records/<name>/<version>.yanked  exists while the release is yanked
    names/<key>                      the only name that may use a look-alike key

Clients read the first five. Publishers coordinate through `records/` and `names/`, whose files are
created exclusively: of two publishers of the same version, or of look-alike names, exactly one
succeeds. A name is claimed after the uploads, and released if its record cannot be created. The
index is derived from the records, and the catalogue from the indexes. A publisher creates its
record, writes the index from all records, then reads both again, and repeats while the index lacks
a record.

An object store replaces the index only if it is still the one that the publisher read, so no
acknowledged release is lost. A folder has no such operation without relying on locks. There, the
publisher that writes the index last reads the records again afterwards, and so finds every record
created before; the publisher of a later record has yet to write the index. If a publisher is killed
in between, the index may lack a record; readers of a folder check for this and read the records.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, cast

from composable.errors import (
    IntegrityError,
    ManifestError,
    MissingFileError,
    RegistryError,
    UnknownExpertError,
    did_you_mean,
)
from composable.files.blobs import blob_path
from composable.interface.digest import canonical_json, digest_bytes
from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.manifests.toml import MAX_TOML_BYTES
from composable.packaging.registry.advisories import (
    Advisory,
    check_advisory,
    compile_feed,
    parse_feed,
)
from composable.packaging.registry.index import (
    Entry,
    compile_index,
    describe_newest,
    format_catalog,
    index_path,
    is_index_behind,
    is_record_of,
    list_records,
    parse_entry,
    parse_index,
    read_record,
    record_path,
)
from composable.packaging.registry.lines import ADVISORIES_FILE, CATALOG_FILE, check_extent
from composable.packaging.registry.name_claims import check_name, claim_name, read_owner
from composable.packaging.registry.release import (
    TIME_FORMAT,
    PreparedDelta,
    Release,
    Signer,
    choose_newest,
)
from composable.packaging.registry.signature_settings import SignatureSettings
from composable.packaging.registry.storage import (
    CONFIG_FILE,
    Document,
    Folder,
    LocalFile,
    Storage,
    WritableStorage,
    put_blob,
)
from composable.packaging.registry.updates import check_size, update_document
from composable.packaging.versions.names import check_package_name, confusable_key
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface
    from composable.packaging.registry.signed import Signatures

SCHEMA: Final = 1
SIGNED_FIELD: Final = "signed"
# What the folder of a registry's verified state holds once its root keys are pinned.
ROOT_FILE: Final = "root.json"
SMALL_BLOB_ATTEMPTS: Final = 3
T = TypeVar("T")


class Registry:
    """The releases in a storage. Registries do not use the store or lock files.

    Args:
        storage: The storage of its files; a `WritableStorage` for publishing.
        files: The same storage without a cache, for what is signed; by default `storage`.
        signatures: How signatures are treated; None ignores them.

    Example:
        >>> from composable.packaging import open_registry
        >>> registry = open_registry("no-such-folder")
        >>> registry.location, registry.exists
        ('no-such-folder', False)
    """

    def __init__(
        self,
        storage: Storage,
        *,
        files: Storage | None = None,
        signatures: SignatureSettings | None = None,
    ) -> None:
        self.storage = storage
        self._files = files or storage
        self._settings = signatures
        self._is_checked = False
        self._says_signed = False
        self._signatures: Signatures | None = None

    @property
    def location(self) -> str:
        """The location, without secrets, for error messages."""
        return self.storage.location

    @property
    def commit(self) -> str | None:
        """The commit that is read, of a registry in a repository; None for any other."""
        return getattr(self.storage, "commit", None)

    @property
    def exists(self) -> bool:
        """Whether the registry exists; the first publication creates it."""
        return self.storage.read(CONFIG_FILE) is not None

    @property
    def awaits_operator(self) -> bool:
        """Whether clients see what was signed here only once the operator has confirmed it."""
        return self._signatures is not None and self._signatures.awaits_operator

    @property
    def awaits_vetting(self) -> bool:
        """Whether what was published here is listed and signed only once vetting has passed."""
        return self._signatures is not None and self._signatures.awaits_vetting

    def names(self) -> list[str]:
        """Return all package names, sorted.

        Raises:
            RegistryError: When the catalogue cannot be read.
        """
        return [entry.name for entry in self.entries()]

    def entries(self) -> list[Entry]:
        """Return all entries of the catalogue, sorted by name; none without a catalogue.

        Raises:
            RegistryError: When the catalogue cannot be read.
        """
        self._check_config()
        catalog = self._read(CATALOG_FILE)
        if catalog is not None:
            check_extent(catalog, f"{self.location}/{CATALOG_FILE}")
        return sorted(self._read_catalog(catalog).values(), key=lambda entry: entry.name)

    def versions(self, name: str) -> tuple[Release, ...]:
        """Return all releases of a package, oldest version first; none for an unknown name.

        Raises:
            RegistryError: When the index cannot be read.
        """
        signatures = self.find_signatures()
        if signatures is None:
            return self._read_unsigned(name)
        where = f"{self.location}/{index_path(name)}"
        document = signatures.read_index(name)
        if document is None:
            return ()
        check_extent(document, where)
        indexed = parse_index(document.data, name, where)
        return tuple(indexed[version] for version in sorted(indexed))

    def _read_unsigned(self, name: str) -> tuple[Release, ...]:
        """Return the releases in the index of a package, whether or not they are signed."""
        path = index_path(name)
        self._check_config()
        where = f"{self.location}/{path}"
        document = self.storage.read(path)
        indexed = parse_index(document.data if document is not None else b"", name, where)
        if isinstance(self.storage, Folder) and is_index_behind(self.storage, name, indexed):
            document = Document(compile_index(self.storage, name, document), None)
            indexed = parse_index(document.data, name, where)
        if document is not None:
            check_extent(document, where)
        return tuple(indexed[version] for version in sorted(indexed))

    def find_signatures(self) -> Signatures | None:
        """Return the signatures of this registry; None if it is unsigned.

        Raises:
            RegistryError: When it is unsigned, and unsigned registries are refused.
        """
        if self._settings is None:
            return None
        self._check_config()
        if self._signatures is None:
            is_pinned = (self._settings.state / ROOT_FILE).is_file()
            if not self._says_signed and not is_pinned:
                if self._settings.is_required:
                    raise RegistryError(
                        "is unsigned, and [policy] in composable.toml refuses that",
                        where=self.location,
                        hint="use a signed registry, or remove `signed = true` under [policy]; "
                        "its operator signs it with `composable registry init --signed`",
                    )
                return None
            self._signatures = self.open_signatures()
        return self._signatures

    def open_signatures(self) -> Signatures:
        """Return the signatures of this registry, which may have none yet.

        Raises:
            RegistryError: When this registry was opened without them.
        """
        from composable.packaging.registry.signed import Signatures

        if self._settings is None:
            raise RegistryError("cannot be signed", where=self.location)
        return Signatures(self._files, self._settings)

    def verify_release(self, release: Release) -> Signer | None:
        """Verify the statement of its publisher on a release; None if the registry is unsigned.

        Raises:
            SignatureError: When it is missing, signed by another, or about other content.
        """
        signatures = self.find_signatures()
        return None if signatures is None else signatures.verify_release(release)

    def _read(self, path: str) -> Document | None:
        """Return a document that a signed registry signs."""
        signatures = self.find_signatures()
        return self.storage.read(path) if signatures is None else signatures.read(path)

    def stream(self, digest: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a blob from offset `start` on; the caller verifies them.

        Raises:
            MissingFileError: When there is no such blob.
            UnreachableError: When the registry cannot be reached, or the response is truncated.
        """
        return self.storage.stream(blob_path(digest), start)

    def has_blob(self, digest: str) -> bool:
        """Return whether a blob can be read; its bytes are not verified.

        Raises:
            RegistryError: When the registry cannot be read.
        """
        pieces = self.stream(digest)
        try:
            next(pieces, b"")
            return True
        except MissingFileError:
            return False
        finally:
            if isinstance(pieces, Generator):
                pieces.close()  # it may hold a connection

    def read_blob(self, digest: str, label: str, limit: int) -> bytes:
        """Return the bytes of a small blob, verified.

        Args:
            digest: Its digest.
            label: Its name in error messages.
            limit: Maximum size in bytes.

        Raises:
            RegistryError: When there is no such blob.
            IntegrityError: When it is too large or does not match its digest.
        """
        for _ in range(SMALL_BLOB_ATTEMPTS):
            data = bytearray()
            for piece in self.stream(digest):
                data += piece
                if len(data) > limit:
                    raise IntegrityError(
                        f"{label} from {self.location} is larger than {limit:,} bytes"
                    )
            if digest_bytes(bytes(data)) == digest:
                return bytes(data)
        raise IntegrityError(
            f"{label} from {self.location} does not match its digest {digest}",
            hint="the registry is damaged or malicious; nothing was kept",
        )

    def read_manifest(self, release: Release) -> Manifest:
        """Fetch, verify and parse the manifest of a release.

        Raises:
            IntegrityError: When its bytes do not match the digest in the index.
            ManifestError: When they are not a manifest, or the index repeats it wrongly.
        """
        return self.fetch_manifest(release)[0]

    def fetch_manifest(self, release: Release) -> tuple[Manifest, bytes]:
        """Return the manifest of a release, and its bytes; errors as for `read_manifest`."""
        where = f"{release.name} {release.version} expert.toml"
        data = self.read_blob(release.manifest, where, MAX_TOML_BYTES)
        manifest = parse_manifest(data, where)
        if difference := release.find_difference(manifest):
            raise ManifestError(
                f"does not match the index of {self.location}: {difference}",
                where=where,
                hint="the registry is damaged or malicious",
            )
        return manifest, data

    def publish(
        self,
        directory: Path,
        *,
        interface: RouterInterface | None = None,
        deltas: Mapping[str, PreparedDelta] | None = None,
        progress: ByteProgress | None = None,
    ) -> Manifest:
        """Publish the expert in a directory: its files, its manifest, then its index line.

        Publishing the same content again succeeds and changes nothing.

        Args:
            directory: Contains `expert.toml`, `body.safetensors`, `scout.safetensors` and
                optionally `card.json` and `README.md`; other files are ignored.
            interface: The router interface to check manifest and tensors against. Its digest is
                recorded if the manifest has none.
            deltas: What makes files from others that the registry has, by name; these files are
                published as deltas. The release is the same as without.
            progress: Called with a file's name, bytes done and total bytes.

        Returns:
            The manifest as published.

        Raises:
            ManifestError: When the manifest is invalid or a file is missing.
            TensorFileError: When a tensor file is unsafe or has the wrong tensors.
            InterfaceError: When the expert does not fit the interface.
            RegistryError: When the registry is read only, when the version exists with other
                content, or when the name looks like that of another package.
        """
        storage = self.writable_storage()
        manifest = pack_expert(directory, interface=interface)
        now = datetime.datetime.now(datetime.UTC).strftime(TIME_FORMAT)
        fitting = choose_deltas(manifest, deltas or {})
        chains = {name: delta.chain for name, delta in fitting.items()}
        release = Release.of(manifest, now).with_deltas(chains)
        _check_readable(manifest, release)
        self.create()
        signatures = self.find_signatures()
        if signatures is not None:
            signatures.check_publisher(manifest.name)
        self.check_admissible(release)
        if signatures is not None:
            signatures.prepare(release)
        for file in manifest.files:
            delta = fitting.get(file.name)
            if delta is not None:
                path = blob_path(delta.file.digest)
                storage.upload(path, LocalFile(delta.path), delta.file, progress)
            if delta is None or delta.is_whole_needed:
                source = LocalFile(directory / file.name)
                storage.upload(blob_path(file.digest), source, file, progress)
        self.record(release, manifest.to_toml().encode())
        self.write_index(manifest.name)
        if signatures is not None:
            recorded = read_record(storage, manifest.name, manifest.version)
            assert recorded is not None
            is_yanked = list_records(storage, manifest.name)[manifest.version]
            signatures.publish(recorded.with_yank(is_yanked))
        return manifest

    def change(self, message: str, work: Callable[[], T]) -> T:
        """Make changes that belong together; where the storage can, all at once.

        Args:
            message: What changes, where the storage records it.
            work: Makes the changes; called again if those of somebody else came first.

        Returns:
            What `work` returns.
        """
        return work()

    def create(self) -> None:
        """Create an empty registry unless it exists.

        Raises:
            RegistryError: When it is read only, or has a layout that is not supported.
        """
        config = {"kind": "composable-registry", "schema": SCHEMA}
        self.writable_storage().create(CONFIG_FILE, canonical_json(config) + b"\n")
        self._check_config()

    def check_admissible(self, release: Release) -> None:
        """Refuse, before anything is uploaded, a release that cannot be published here.

        Args:
            release: The release.

        Raises:
            RegistryError: When the registry is read only, when it has the version with other
                content, when the name looks like that of another package, or when an index has no
                room left.
        """
        storage = self.writable_storage()
        existing = read_record(storage, release.name, release.version)
        self._check_same_content(release, existing)
        if existing is None:
            self._check_room(storage, release)
        check_name(storage, release.name)

    def record(self, release: Release, manifest: bytes, line: bytes | None = None) -> None:
        """Record a release whose files are stored; `write_index` makes it visible.

        Args:
            release: The release, admissible.
            manifest: The bytes of its manifest.
            line: Its record, if another registry has one already.

        Raises:
            RegistryError: When another publisher was first, with other content or with a name that
                looks like this one.
        """
        storage = self.writable_storage()
        put_blob(storage, release.manifest, manifest)
        with claim_name(storage, release.name):
            self._create_record(storage, release, line or release.to_line())

    def mark_yanked(self, name: str, version: Version, is_yanked: bool) -> None:
        """Mark a recorded release as yanked, or not; `write_index` makes it visible."""
        storage, path = self.writable_storage(), record_path(name, version, "yanked")
        if is_yanked:
            storage.create(path, b"")
        else:
            storage.remove(path)

    def write_index(self, name: str) -> None:
        """Update the index of a package, then the catalogue, until both match the records."""
        storage = self.writable_storage()
        update_document(storage, index_path(name), lambda seen: compile_index(storage, name, seen))
        self.write_catalog([name])

    def write_catalog(self, names: Collection[str]) -> None:
        """Update the entries of packages in the catalogue, and add those that it lacks."""
        storage = self.writable_storage()
        update_document(
            storage, CATALOG_FILE, lambda seen: self._compile_catalog(storage, seen, names)
        )

    def _create_record(self, storage: WritableStorage, release: Release, line: bytes) -> None:
        """Create the record of a release, unless there is one with the same content."""
        record = record_path(release.name, release.version)
        while not storage.create(record, line):
            seen = storage.read(record)
            existing = read_record(storage, release.name, release.version)
            self._check_same_content(release, existing)
            # A crash may have truncated the record, or it is damaged: the index may still have it.
            if existing is not None:
                line = existing.to_line()
            if seen and (is_record_of(seen, existing) or storage.replace(record, line, seen)):
                break

    def yank(self, name: str, version: Version, reason: str = "") -> None:
        """Exclude a release from new resolutions; existing locks keep working.

        Args:
            name: The package.
            version: The version.
            reason: Why. Only a server keeps it.

        Raises:
            UnknownExpertError: When there is no such release.
            RegistryError: When the registry is read only.
        """
        storage = self.writable_storage()
        self._check_release(storage, name, version)
        with self._signing(name, version, is_yanked=True):
            self.mark_yanked(name, version, True)
            self.write_index(name)

    def unyank(self, name: str, version: Version) -> None:
        """Include a yanked release in new resolutions again.

        Raises:
            UnknownExpertError: When there is no such release.
            RegistryError: When the registry is read only.
        """
        storage = self.writable_storage()
        self._check_release(storage, name, version)
        with self._signing(name, version, is_yanked=False):
            self.mark_yanked(name, version, False)
            self.write_index(name)

    def advisories(self) -> tuple[Advisory, ...] | None:
        """Return what is known against releases; None if the registry has no feed of advisories.

        Raises:
            RegistryError: When the feed cannot be read.
        """
        self._check_config()
        document = self._read(ADVISORIES_FILE)
        if document is None:
            return None
        where = f"{self.location}/{ADVISORIES_FILE}"
        check_extent(document, where)
        return parse_feed(document, where)

    def advisory(self, id_: str) -> Advisory:
        """Return one advisory.

        Raises:
            RegistryError: When the registry has none of that name.
        """
        known = {advisory.id: advisory for advisory in self.advisories() or ()}
        if id_ not in known:
            raise RegistryError(
                f"no advisory {id_!r}", where=self.location, hint=did_you_mean(id_, known)
            )
        return known[id_]

    def advise(self, advisory: Advisory) -> None:
        """Add an advisory to the feed, or change the one of that name.

        Raises:
            UnknownExpertError: When the registry has no such package, or none of these releases.
            RegistryError: When the registry is read only, or its feed is damaged.
        """
        storage = self.writable_storage()
        self.check_advisory(advisory)
        signatures = self.find_signatures()
        if signatures is not None:
            signatures.check_advisor()
        update_document(storage, ADVISORIES_FILE, lambda seen: compile_feed(advisory, seen))
        if signatures is not None:
            signatures.advise(advisory)

    def check_advisory(self, advisory: Advisory) -> None:
        """Refuse an advisory on what is not here.

        Raises:
            UnknownExpertError: When the registry has no such package, or none of these releases.
        """
        known = self.versions(advisory.name)
        if not known:
            raise UnknownExpertError(
                f"no expert {advisory.name!r}",
                where=self.location,
                hint=did_you_mean(advisory.name, self.names()),
            )
        check_advisory(advisory, known, self.location)

    @contextlib.contextmanager
    def _signing(self, name: str, version: Version, *, is_yanked: bool) -> Iterator[None]:
        """Check that the change in the block can be signed, and sign it afterwards."""
        signatures = self.find_signatures()
        if signatures is not None:
            signatures.check_publisher(name)
        yield
        if signatures is not None:
            release = self._find_recorded(name, version)
            assert release is not None
            signatures.sign_index(name, [release.with_yank(is_yanked)])

    def _find_recorded(self, name: str, version: Version) -> Release | None:
        """Return a release as it was published, signed or not."""
        return read_record(self.writable_storage(), name, version)

    def writable_storage(self) -> WritableStorage:
        """Return the storage for publishing.

        Raises:
            RegistryError: When the registry is read only.
        """
        if not hasattr(self.storage, "create"):
            raise RegistryError(
                "is read only",
                where=self.location,
                hint="publish to a folder, a bucket or a server of `composable registry serve`",
            )
        return cast(WritableStorage, self.storage)

    def _compile_catalog(
        self, storage: WritableStorage, seen: Document | None, names: Collection[str]
    ) -> bytes:
        """Return the catalogue with the entries of packages updated and missing ones added."""
        entries = self._read_catalog(seen)
        listed = {confusable_key(known) for known in entries}
        owners = [
            read_owner(storage, key) for key in storage.names_in("names") if key not in listed
        ]
        for other in {*names, *filter(None, owners)}:
            releases = self._read_unsigned(other)
            if releases:
                entries[other] = describe_newest(choose_newest(releases))
        return format_catalog(entries.values())

    def _read_catalog(self, document: Document | None) -> dict[str, Entry]:
        entries = {}
        lines = document.data.splitlines() if document is not None else []
        for number, line in enumerate(lines, 1):
            entry = parse_entry(line, f"{self.location}/{CATALOG_FILE}:{number}")
            entries[entry.name] = entry
        return entries

    def _check_release(self, storage: WritableStorage, name: str, version: Version) -> None:
        if read_record(storage, check_package_name(name), version) is None:
            have = ", ".join(str(release.version) for release in self.versions(name))
            raise UnknownExpertError(
                f"no release {name} {version}",
                where=self.location,
                hint=f"available: {have}" if have else did_you_mean(name, self.names()),
            )

    def _check_room(self, storage: WritableStorage, release: Release) -> None:
        """Refuse, before anything is uploaded, a release for which an index has no room left."""
        lines = {
            index_path(release.name): release.to_line(),
            CATALOG_FILE: format_catalog([describe_newest(release)]),
        }
        for path, line in lines.items():
            seen = storage.read(path)
            check_size(path, (len(seen.data) if seen else 0) + len(line), self.location)

    def _check_same_content(self, release: Release, existing: Release | None) -> None:
        """Refuse to publish other content under a version that exists."""
        if existing is not None and existing.manifest != release.manifest:
            raise RegistryError(
                f"{release.name} {release.version} is already published with other content",
                where=self.location,
                hint="published releases cannot change: increase the version",
            )

    def _check_config(self) -> None:
        """Check, once, that the layout of the storage is supported."""
        if self._is_checked:
            return
        document = self.storage.read(CONFIG_FILE)
        if document is None:
            raise RegistryError(
                "is not a registry: it has no config.json",
                where=self.location,
                hint="`composable publish` to a folder or a bucket creates one",
            )
        try:
            config = json.loads(document.data)
            schema = config["schema"] if config["kind"] == "composable-registry" else None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RegistryError("cannot be read", where=f"{self.location}/{CONFIG_FILE}") from error
        if schema != SCHEMA:
            raise RegistryError(
                f"layout {schema!r} is not supported, expected {SCHEMA}", where=self.location
            )
        self._says_signed = config.get(SIGNED_FIELD) is True
        self._is_checked = True


def choose_deltas(
    manifest: Manifest, deltas: Mapping[str, PreparedDelta]
) -> dict[str, PreparedDelta]:
    """Return the deltas that make files of a manifest, which may have changed since."""
    digests = {file.name: file.digest for file in manifest.files}
    return {name: d for name, d in deltas.items() if digests.get(name) == d.target}


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse the bytes of a published manifest.

    Raises:
        ManifestError: When they are not a manifest.
    """
    try:
        return Manifest.loads(data.decode(), where)
    except UnicodeDecodeError as error:
        raise ManifestError(f"not UTF-8 text: {error}", where=where) from error


def _check_readable(manifest: Manifest, release: Release) -> None:
    """Refuse, before anything is uploaded, what clients would refuse to read.

    Raises:
        ManifestError: When the packed manifest is too large or cannot be parsed.
        RegistryError: When the line of the index cannot be parsed.
    """
    text = manifest.to_toml()
    if len(text.encode()) > MAX_TOML_BYTES:
        raise ManifestError(
            f"has {len(text.encode()):,} bytes when it is packed, at most {MAX_TOML_BYTES:,} are "
            "allowed",
            where=EXPERT_FILE,
            hint="shorten its texts and lists",
        )
    Manifest.loads(text)
    Release.from_line(release.to_line(), release.name, EXPERT_FILE)
