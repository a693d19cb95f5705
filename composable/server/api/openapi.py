"""The OpenAPI description of the API, from the table of its operations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from composable.server.api.operation import Operation

PREFIX: Final = "/api/v1"
_PARTS: Final = re.compile(r"{(\w+)}")
_ERRORS: Final = {
    "400": "The request is malformed.",
    "401": "A token is needed, or the one that was sent is not valid.",
    "403": "The token does not allow this.",
    "404": "Does not exist, or is not visible to the caller.",
    "409": "In conflict with what exists.",
    "410": "Was taken down.",
    "413": "Too large.",
    "422": "Not valid.",
    "429": "Too many requests.",
    "503": "Database or storage do not answer.",
}


def describe_api(operations: Sequence[Operation], title: str, version: str) -> dict[str, Any]:
    """Return the description.

    Args:
        operations: All operations.
        title: Name of the registry.
        version: Version of composable.
    """
    bodies = sorted(
        {op.body for op in operations if op.body not in (None, bytes)},
        key=lambda body: str(body.__name__),
    )
    _, schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    schemas["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["kind", "message", "where", "hint"],
                "properties": {
                    "kind": {"type": "string"},
                    "message": {"type": "string"},
                    "where": {"type": ["string", "null"]},
                    "hint": {"type": ["string", "null"]},
                },
            }
        },
    }
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = paths.setdefault(PREFIX + operation.path, {})
        path[operation.method.lower()] = _describe(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe(operation: Operation) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    success: dict[str, Any] = {"description": "Done."}
    if operation.status != 204:
        success["content"] = {"application/json": {"schema": {"type": "object"}}}
    described: dict[str, Any] = {
        "operationId": operation.run.__name__,
        "summary": operation.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in _PARTS.findall(operation.path)
        ]
        + [
            {"name": name, "in": "query", "schema": dict(schema)}
            for name, schema in operation.query.items()
        ],
        "responses": {
            str(operation.status): success,
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }
    if operation.body is not None:
        kind, schema = "application/json", {}
        if operation.body is bytes:
            kind = "application/octet-stream"
        else:
            schema = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        described["requestBody"] = {"required": True, "content": {kind: {"schema": schema}}}
    described["security"] = [{"token": []}] if operation.scope else [{}, {"token": []}]
    return described
