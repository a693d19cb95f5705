"""Operations of publishing: open, upload, commit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from composable.interface.digest import is_digest
from composable.packaging.manifests.manifest import CHUNK_BYTES
from composable.server.api.operation import Call, Operation
from composable.server.refusal import missing


@dataclass(frozen=True)
class NewPublication:
    """A packed manifest, whether a new package is private, and deltas by the file they make."""

    manifest: str
    private: bool = False
    deltas: dict[str, list[dict[str, Any]]] | None = None


@dataclass(frozen=True)
class Commit:
    """The statement of the publisher, signed; empty where releases are unsigned."""

    statement: str = ""


def open_publication(call: Call) -> dict[str, Any]:
    """Open a publication, or find the one that is open for the same manifest."""
    return call.services.publishing.start(
        call.caller,
        call.body.manifest,
        is_private=call.body.private,
        deltas=call.body.deltas,
    )


def get_publication(call: Call) -> dict[str, Any]:
    """Return which chunks a publication still needs."""
    return call.services.publishing.describe(call.caller, call.path["id"])


def put_chunk(call: Call) -> None:
    """Upload a chunk of a file; sending it again has no effect."""
    digest, number = call.path["digest"], call.path["number"]
    if not is_digest(digest) or not (number.isascii() and number.isdigit() and len(number) < 8):
        raise missing("chunk of that digest and number")
    call.services.publishing.receive(call.caller, call.path["id"], digest, int(number), call.body)


def commit(call: Call) -> dict[str, Any]:
    """Verify all files and publish the release, at once and for good."""
    return call.services.publishing.commit(
        call.caller, call.path["id"], statement=call.body.statement.encode()
    )


def cancel(call: Call) -> None:
    """Give up a publication."""
    call.services.publishing.cancel(call.caller, call.path["id"])


_ONE: Final = "/publications/{id}"
OPERATIONS: Final = (
    Operation(
        method="POST",
        path="/publications",
        run=open_publication,
        body=NewPublication,
        scope="publish",
    ),
    Operation(method="GET", path=_ONE, run=get_publication, scope="publish"),
    Operation(
        method="PUT",
        path=f"{_ONE}/files/{{digest}}/{{number}}",
        run=put_chunk,
        body=bytes,
        scope="publish",
        status=204,
        max_bytes=CHUNK_BYTES,
    ),
    Operation(method="POST", path=f"{_ONE}/commit", run=commit, body=Commit, scope="publish"),
    Operation(method="DELETE", path=_ONE, run=cancel, scope="publish", status=204),
)
