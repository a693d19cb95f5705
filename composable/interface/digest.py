"""Canonical bytes and their SHA-256, so that the same content has the same digest everywhere."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_bytes(data: bytes) -> str:
    """Return `sha256:` and 64 hex digits for `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def is_digest(text: object) -> bool:
    """Say whether `text` has the form that `digest_bytes` returns."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def canonical_json(value: Any) -> bytes:
    """Return the one UTF-8 spelling of a JSON value: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: For NaN and infinities, which JSON cannot say.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the digest of named arrays: names, dtypes, shapes and little-endian bytes, by name.

    Args:
        tensors: Name to array, in any order.
    """
    import numpy as np  # here, so that packaging reads digests without loading NumPy

    state = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        header = {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}
        state.update(canonical_json(header))
        state.update(array.reshape(-1).view(np.uint8).data)
    return "sha256:" + state.hexdigest()
