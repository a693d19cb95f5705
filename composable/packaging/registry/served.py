"""Publishing over HTTP, to a server that `composable registry serve` runs.

Reading is that of any web server. What is sent here can be sent again: an interrupted publication
continues with the chunks that have not arrived. Of a signed registry, statements, indexes and
metadata are signed on this machine and sent one by one, as they would be written to a folder; the
server verifies each.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from composable.errors import RegistryError, UnreachableError
from composable.files.reading import open_file
from composable.interface.digest import digest_bytes
from composable.packaging.manifests.manifest import CHUNK_BYTES, Manifest, PackageFile
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.advisories import Advisory
from composable.packaging.registry.http import WebStorage
from composable.packaging.registry.registry import Registry, choose_deltas
from composable.packaging.registry.release import (
    TIME_FORMAT,
    PreparedDelta,
    Release,
    format_deltas,
)
from composable.packaging.registry.signature_settings import SignatureSettings
from composable.packaging.registry.storage import Document, ReadFrom
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

API: Final = "api/v1"
# The server reads every byte several times before it answers a commit.
VERIFIED_BYTES_PER_SECOND: Final = 20 << 20
_JSON: Final = "application/json"
_OCTETS: Final = "application/octet-stream"


class ServedStorage(WebStorage):
    """A server, whose signatures can be written. Its releases are published by `ServedRegistry`."""

    # Whether the server confirmed what was written last, so that clients see it.
    has_confirmed = False

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder of its signatures, sorted."""
        answer = self.ask("POST", "signatures/list", {"folder": folder})
        return [str(name) for name in answer["names"]]

    def create(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists; of concurrent calls exactly one succeeds."""
        return self.replace(path, data, None)

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a file if it has not changed since it was read as `seen`."""
        known = None if seen is None else digest_bytes(seen.data)
        answer = self._put(path, data, known)
        if answer["written"] and not path.startswith("blobs/"):
            self.has_confirmed = bool(answer["confirmed"])
        return bool(answer["written"])

    def upload(
        self, path: str, source: ReadFrom, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Refuse: files are uploaded with the release that has them.

        Raises:
            RegistryError: Always.
        """
        raise RegistryError("takes files only with a release", where=f"{self.location}/{path}")

    def remove(self, path: str) -> None:
        """Remove a file of a change that waits."""
        self._put(path, None, None)

    def settle(self, path: str) -> None:
        """Do nothing: what a server answers is durable."""

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float = 0.0
    ) -> dict[str, Any]:
        """Send a request of the API and return the answer; empty if there is none.

        Raises:
            RegistryError: When the server refuses it, in its words.
            UnreachableError: When it cannot be reached.
        """
        sent = b"" if body is None else json.dumps(body).encode()
        data = self.send(method, f"{API}/{path}", sent, _JSON, seconds)
        if not data:
            return {}
        try:
            answer = json.loads(data)
            if not isinstance(answer, dict):
                raise ValueError("expected a JSON object")
        except (ValueError, RecursionError) as error:
            raise RegistryError(
                f"is not the API of a registry: {error}", where=f"{self.location}/{API}/{path}"
            ) from error
        return answer

    def _put(self, path: str, data: bytes | None, seen: str | None) -> dict[str, Any]:
        content = None if data is None else base64.b64encode(data).decode()
        return self.ask("POST", "signatures", {"path": path, "content": content, "seen": seen})


class ServedRegistry(Registry):
    """A registry on a server, for publishing.

    Args:
        storage: The server.
        signatures: How signatures are treated; None for a registry that has none.
    """

    def __init__(
        self, storage: ServedStorage, *, signatures: SignatureSettings | None = None
    ) -> None:
        super().__init__(storage, signatures=signatures)
        self.server = storage

    def publish(
        self,
        directory: Path,
        *,
        interface: RouterInterface | None = None,
        deltas: Mapping[str, PreparedDelta] | None = None,
        progress: ByteProgress | None = None,
    ) -> Manifest:
        """Publish the expert in a directory. Publishing the same content again changes nothing.

        Args:
            directory: As for `Registry.publish`.
            interface: The router interface to check manifest and tensors against.
            deltas: As for `Registry.publish`. The server makes the files, verifies and keeps them
                whole; where it cannot, it asks for the files.
            progress: Called with a file's name, bytes done and total bytes.

        Returns:
            The manifest as published.

        Raises:
            ManifestError: When the manifest is invalid or a file is missing.
            TensorFileError: When a tensor file is unsafe or has the wrong tensors.
            InterfaceError: When the expert does not fit the interface.
            RegistryError: When the server refuses it.
            SignatureError: When the registry is signed and nobody may publish that name.
            KeyFileError: When it is signed and the publisher's key is not here.
            UnreachableError: When the server cannot be reached.
        """
        manifest = pack_expert(directory, interface=interface)
        signatures = self.find_signatures() if self.exists else None
        statement = ""
        if signatures is not None:
            now = datetime.datetime.now(datetime.UTC).strftime(TIME_FORMAT)
            statement = signatures.sign_release(Release.of(manifest, now)).decode()
        fitting = choose_deltas(manifest, deltas or {})
        self._send_release(directory, manifest, statement, progress, fitting)
        if signatures is not None:
            release = self._find_recorded(manifest.name, manifest.version)
            if release is None:  # in quarantine: it is listed once vetting has passed
                signatures.awaits_vetting = True
            else:
                signatures.publish(release)
        return manifest

    def _send_release(
        self,
        directory: Path,
        manifest: Manifest,
        statement: str,
        progress: ByteProgress | None,
        deltas: Mapping[str, PreparedDelta],
    ) -> None:
        """Upload the files of a release and publish it, with the statement of its publisher."""
        request: dict[str, Any] = {"manifest": manifest.to_toml()}
        if deltas:
            chains = {name: format_deltas(delta.chain[:1]) for name, delta in deltas.items()}
            request["deltas"] = chains
        publication = self.ask("POST", "publications", request)
        if publication["is_published"]:
            return
        home = f"publications/{publication['id']}"
        missing = {entry["digest"]: entry["missing"] for entry in publication["files"]}
        for file in manifest.files:
            numbers = missing.get(file.digest, [])
            self.send_chunks(home, directory / file.name, file, numbers, progress)
        for delta in deltas.values():
            numbers = missing.get(delta.file.digest, [])
            self.send_chunks(home, delta.path, delta.file, numbers, progress)
        seconds = sum(file.size for file in manifest.files) / VERIFIED_BYTES_PER_SECOND
        try:
            self.ask("POST", f"{home}/commit", {"statement": statement}, seconds)
        except UnreachableError:
            raise
        except RegistryError:
            # An answer that was lost on its way may have been that it is published.
            now = self.ask("POST", "publications", request)
            if not now["is_published"]:
                self.server.send("DELETE", f"{API}/publications/{now['id']}", b"", _JSON)
                raise

    def yank(self, name: str, version: Version, reason: str = "") -> None:
        """Exclude a release from new resolutions; existing locks keep working.

        Raises:
            RegistryError: When the server refuses it.
        """
        with self._signing(name, version, is_yanked=True):
            self.ask("POST", f"packages/{name}/{version}/yank", {"reason": reason})

    def unyank(self, name: str, version: Version) -> None:
        """Include a yanked release in new resolutions again.

        Raises:
            RegistryError: When the server refuses it.
        """
        with self._signing(name, version, is_yanked=False):
            self.ask("POST", f"packages/{name}/{version}/unyank", {})

    def advise(self, advisory: Advisory) -> None:
        """Sign an advisory and send it; a server without signatures has no feed of them.

        Raises:
            UnknownExpertError: When the registry has no such package, or none of these releases.
            RegistryError: When the registry is unsigned.
            KeyFileError: When no root key is here.
        """
        signatures = self.find_signatures()
        if signatures is None:
            raise RegistryError(
                "takes no advisories: a server has a feed of them only if it is signed",
                where=self.location,
                hint=f"yank the release, with a reason: `composable yank {advisory.name}@VERSION`",
            )
        self.check_advisory(advisory)
        signatures.check_advisor()
        signatures.advise(advisory)

    def _find_recorded(self, name: str, version: Version) -> Release | None:
        releases = self._read_unsigned(name)
        return next((each for each in releases if each.version == version), None)

    def send_chunks(
        self,
        home: str,
        source: Path,
        file: PackageFile,
        numbers: list[int],
        progress: ByteProgress | None,
    ) -> None:
        """Send the chunks of a file that the server lacks."""
        done = file.size - sum(min(CHUNK_BYTES, file.size - n * CHUNK_BYTES) for n in numbers)
        with open_file(source) as stream:
            for number in numbers:
                stream.seek(number * CHUNK_BYTES)
                data = stream.read(CHUNK_BYTES)
                path = f"{API}/{home}/files/{file.digest}/{number}"
                self.server.send("PUT", path, data, _OCTETS)
                done += len(data)
                if progress is not None:
                    progress(file.name, done, file.size)

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float = 0.0
    ) -> dict[str, Any]:
        """Send a request of the API and return the answer; empty if there is none."""
        return self.server.ask(method, path, body, seconds)
