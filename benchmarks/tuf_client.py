#!/usr/bin/env python3
"""Our client of TUF metadata behind the command line that the suite tuf-conformance drives.

The suite is https://github.com/theupdateframework/tuf-conformance; it is not part of this project.
In a checkout of it, with its requirements installed:

    pytest tuf_conformance --entrypoint "python -m benchmarks.tuf_client"

Each case is also a test of ours, in `tests/packaging/trust/test_conformance.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile

from composable.errors import ComposableError
from composable.files import atomic
from composable.packaging.registry.http import WebStorage
from composable.packaging.trust.client import SignedDocuments


def download(client: SignedDocuments, arguments: argparse.Namespace) -> None:
    """Download documents, unless they are there already."""
    for name in arguments.target_name:
        found = client.find(name)
        if found is None:
            sys.exit(f"no document {name!r}")
        target = Path(arguments.target_dir) / quote(name, "")
        if target.is_file():
            data = target.read_bytes()
            if len(data) == found.file.length and is_intact(found.file, data):
                continue
        folder, _, file = name.rpartition("/")
        path = "/".join(filter(None, (folder, f"{next(iter(found.file.hashes.values()))}.{file}")))
        document = WebStorage(arguments.target_base_url).read(path)
        if document is None:
            sys.exit(f"{path} is missing")
        found.file.verify_length_and_hashes(document.data)
        atomic.write_bytes(target, document.data)


def is_intact(file: TargetFile, data: bytes) -> bool:
    try:
        file.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True


class MetadataServer(WebStorage):
    """A server of metadata whose names of roles are any text, and are quoted already."""

    def _url_of(self, path: str) -> str:
        return f"{self._base}/{path}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-base-url", default="")
    parser.add_argument("--target-dir", default="")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    arguments = parser.parse_args()
    if arguments.command == "init":
        atomic.write_bytes(
            arguments.metadata_dir / "root.json", arguments.trusted_root.read_bytes()
        )
        return
    base, _, folder = arguments.metadata_url.rstrip("/").rpartition("/")
    client = SignedDocuments(MetadataServer(base), arguments.metadata_dir, folder=folder)
    try:
        client.refresh()
        if arguments.command == "download":
            download(client, arguments)
    except ComposableError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
