"""Errors that a server answers with, and the status of each."""

from __future__ import annotations

from typing import Any

from composable.errors import (
    ComposableError,
    DiskError,
    RegistryError,
    UnknownExpertError,
    UnreachableError,
)


class RefusedError(RegistryError):
    """A request that is refused.

    Args:
        status: The HTTP status.
        message: What was wrong.
        where: Which part of the request, if any.
        hint: How to fix it, if known.
        retry_after: Seconds after which the request may be sent again, if that helps.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.status = status
        self.retry_after = retry_after


def status_of(error: ComposableError) -> int:
    """Return the HTTP status of an error.

    Example:
        >>> status_of(RefusedError(409, "is already published"))
        409
        >>> status_of(ComposableError("not a manifest"))
        422
    """
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, UnknownExpertError):
        return 404
    if isinstance(error, DiskError | UnreachableError):
        return 503  # ours, and it may pass
    return 422


def format_error(error: ComposableError) -> dict[str, Any]:
    """Return an error as data, with the keys of `--json`."""
    return {
        "error": {
            "kind": type(error).__name__,
            "message": error.message,
            "where": error.where,
            "hint": error.hint,
        }
    }


def missing(what: str) -> RefusedError:
    """Return the error for what does not exist, or must not be known to exist."""
    return RefusedError(404, f"no {what} here")
