"""Publishing over HTTP, to a server that `composable registry serve` runs.

Reading is that of any web server. What is sent here can be sent again: an interrupted publication
continues with the chunks that have not arrived.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from composable.errors import RegistryError, UnreachableError
from composable.files.reading import open_file
from composable.packaging.manifests.manifest import CHUNK_BYTES, Manifest, PackageFile
from composable.packaging.manifests.packing import pack_expert
from composable.packaging.registry.advisories import Advisory
from composable.packaging.registry.http import WebStorage
from composable.packaging.registry.registry import Registry
from composable.packaging.versions.version import Version
from composable.progress import ByteProgress

if TYPE_CHECKING:
    from composable.interface.contract import RouterInterface

API: Final = "api/v1"
# The server reads every byte several times before it answers a commit.
VERIFIED_BYTES_PER_SECOND: Final = 20 << 20
_JSON: Final = "application/json"
_OCTETS: Final = "application/octet-stream"


class ServedRegistry(Registry):
    """A registry on a server, for publishing.

    Args:
        storage: The server.
    """

    def __init__(self, storage: WebStorage) -> None:
        super().__init__(storage)
        self.server = storage

    def publish(
        self,
        directory: Path,
        *,
        interface: RouterInterface | None = None,
        progress: ByteProgress | None = None,
    ) -> Manifest:
        """Publish the expert in a directory. Publishing the same content again changes nothing.

        Args:
            directory: As for `Registry.publish`.
            interface: The router interface to check manifest and tensors against.
            progress: Called with a file's name, bytes done and total bytes.

        Returns:
            The manifest as published.

        Raises:
            ManifestError: When the manifest is invalid or a file is missing.
            TensorFileError: When a tensor file is unsafe or has the wrong tensors.
            InterfaceError: When the expert does not fit the interface.
            RegistryError: When the server refuses it.
            UnreachableError: When the server cannot be reached.
        """
        manifest = pack_expert(directory, interface=interface)
        request = {"manifest": manifest.to_toml()}
        publication = self.ask("POST", "publications", request)
        if publication["is_published"]:
            return manifest
        home = f"publications/{publication['id']}"
        missing = {entry["digest"]: entry["missing"] for entry in publication["files"]}
        for file in manifest.files:
            numbers = missing.get(file.digest, [])
            self.send_chunks(home, directory / file.name, file, numbers, progress)
        seconds = sum(file.size for file in manifest.files) / VERIFIED_BYTES_PER_SECOND
        try:
            self.ask("POST", f"{home}/commit", {}, seconds)
        except UnreachableError:
            raise
        except RegistryError:
            # An answer that was lost on its way may have been that it is published.
            now = self.ask("POST", "publications", request)
            if not now["is_published"]:
                self.server.send("DELETE", f"{API}/publications/{now['id']}", b"", _JSON)
                raise
        return manifest

    def yank(self, name: str, version: Version, reason: str = "") -> None:
        """Exclude a release from new resolutions; existing locks keep working.

        Raises:
            RegistryError: When the server refuses it.
        """
        self.ask("POST", f"packages/{name}/{version}/yank", {"reason": reason})

    def unyank(self, name: str, version: Version) -> None:
        """Include a yanked release in new resolutions again.

        Raises:
            RegistryError: When the server refuses it.
        """
        self.ask("POST", f"packages/{name}/{version}/unyank", {})

    def advise(self, advisory: Advisory) -> None:
        """Refuse: a server has no feed of advisories.

        Raises:
            RegistryError: Always.
        """
        raise RegistryError(
            "takes no advisories: a server has no feed of them",
            where=self.location,
            hint=f"yank the release, with a reason: `composable yank {advisory.name}@VERSION`",
        )

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
        sent = b"" if body is None else json.dumps(body).encode()
        data = self.server.send(method, f"{API}/{path}", sent, _JSON, seconds)
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
