"""Operations on signatures: what publishers and operators signed is sent here."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final

from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES
from composable.server.api.operation import Call, Operation
from composable.server.refusal import RefusedError


@dataclass(frozen=True)
class SignedContent:
    """A file of a registry's signatures, in base64; without content it is removed."""

    path: str
    content: str | None
    seen: str | None = None


@dataclass(frozen=True)
class SignedFolder:
    """A folder of a registry's signatures."""

    folder: str


def put_signed(call: Call) -> dict[str, Any]:
    """Store a statement, an index or metadata that its keys signed."""
    try:
        content = call.body.content
        data = None if content is None else base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise RefusedError(422, "is not base64", where="content") from error
    written = call.services.signing.put(call.caller, call.body.path, data, call.body.seen)
    return {"written": written.is_written, "confirmed": written.is_confirmed}


def list_signed(call: Call) -> dict[str, Any]:
    """List the files of a folder of signatures."""
    return {"names": call.services.signing.list_names(call.body.folder)}


OPERATIONS: Final = (
    Operation(
        method="POST",
        path="/signatures",
        run=put_signed,
        body=SignedContent,
        scope="publish",
        max_bytes=2 * MAX_DOCUMENT_BYTES,
    ),
    Operation(method="POST", path="/signatures/list", run=list_signed, body=SignedFolder),
)
