"""Files on their way in: chunks in the storage, put together and verified at the end.

Each chunk is an object of its own, so an upload resumes at any replica, whatever was killed. A
chunk is verified when it arrives where the manifest has its digest, and the whole file at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from composable.errors import IntegrityError
from composable.files.atomic import Sink
from composable.files.blobs import blob_path
from composable.interface.digest import digest_bytes
from composable.packaging.manifests.manifest import CHUNK_BYTES, PackageFile
from composable.packaging.registry.storage import WritableStorage
from composable.server.refusal import RefusedError

FOLDER: Final = "uploads"


def chunk_sizes(file: PackageFile) -> list[int]:
    """Return the bytes of each chunk of a file.

    Example:
        >>> chunk_sizes(PackageFile(name="a", size=CHUNK_BYTES + 2, digest="sha256:0"))
        [8388608, 2]
    """
    return [min(CHUNK_BYTES, file.size - at) for at in range(0, file.size, CHUNK_BYTES)]


def list_chunks(storage: WritableStorage, publication: str, file: PackageFile) -> list[int]:
    """Return the numbers of the chunks that have arrived."""
    names = storage.names_in(_folder(publication, file))
    return sorted(int(name) for name in names if name.isdigit())


def store_chunk(
    storage: WritableStorage, publication: str, file: PackageFile, number: int, data: bytes
) -> None:
    """Keep a chunk of a file. Sending one again has no effect.

    Raises:
        RefusedError: 404 for a number that the file does not have.
        IntegrityError: For bytes of another size or digest than the manifest states.
    """
    sizes = chunk_sizes(file)
    where = f"{file.name}, chunk {number}"
    if not 0 <= number < len(sizes):
        raise RefusedError(404, f"the file has {len(sizes)} chunks", where=where)
    if len(data) != sizes[number]:
        raise IntegrityError(f"{len(data):,} bytes, expected {sizes[number]:,}", where=where)
    expected = None
    if file.chunks:
        expected = f"sha256:{file.chunks[number]}"
    elif len(sizes) == 1:
        expected = file.digest
    if expected is not None and (found := digest_bytes(data)) != expected:
        raise IntegrityError(f"the bytes have digest {found}, expected {expected}", where=where)
    storage.create(f"{_folder(publication, file)}/{number:06}", data)


def assemble(
    storage: WritableStorage, publication: str, file: PackageFile, target: Path, *, is_known: bool
) -> None:
    """Write a file from its chunks, or from the blob that the registry has, and verify it.

    Args:
        storage: The storage of chunks and blobs.
        publication: Id of the publication.
        file: The file.
        target: Where to write it.
        is_known: Whether to read the registry's blob.

    Raises:
        RefusedError: 409 when chunks are missing.
        IntegrityError: When the bytes do not match the digest; its chunks are dropped then.
    """
    if is_known:
        paths = [blob_path(file.digest)]
    else:
        here, n = list_chunks(storage, publication, file), len(chunk_sizes(file))
        if here != list(range(n)):
            raise RefusedError(
                409,
                f"{len(here)} of {n} chunks have arrived",
                where=file.name,
                hint="upload the others, then commit again",
            )
        paths = [f"{_folder(publication, file)}/{number:06}" for number in here]
    try:
        with Sink(target, digest=file.digest, size=file.size) as sink:
            for path in paths:
                for piece in storage.stream(path):
                    sink.write(piece)
    except IntegrityError:
        if not is_known:
            drop_chunks(storage, publication, [file])
        raise


def drop_chunks(storage: WritableStorage, publication: str, files: Iterable[PackageFile]) -> None:
    """Remove the chunks of a publication's files."""
    for file in files:
        for name in storage.names_in(_folder(publication, file)):
            storage.remove(f"{_folder(publication, file)}/{name}")


def _folder(publication: str, file: PackageFile) -> str:
    return f"{FOLDER}/{publication}/{file.digest.removeprefix('sha256:')}"
