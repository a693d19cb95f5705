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
    """Return the SHA-256 of `data` as `sha256:` and 64 hex digits.

    Example:
        >>> digest_bytes(b"")[:20]
        'sha256:e3b0c44298fc1'
    """
    return "sha256:" + hashlib.sha256(data).hexdigest()


def is_digest(text: object) -> bool:
    """Return whether `text` has the form that `digest_bytes` returns.

    Example:
        >>> is_digest(digest_bytes(b"")), is_digest("sha256:1234")
        (True, False)
    """
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def canonical_json(value: Any) -> bytes:
    """Return the one UTF-8 spelling of a JSON value: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: For NaN and infinities, which JSON cannot represent.

    Example:
        >>> canonical_json({"b": 1, "a": [0.5, None]})
        b'{"a":[0.5,null],"b":1}'
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the digest of named arrays: names, dtypes, shapes and little-endian bytes, by name.

    Args:
        tensors: Name to array, in any order.

    Example:
        >>> import numpy as np
        >>> is_digest(digest_tensors({"w": np.zeros((2, 3))}))
        True
    """
    import numpy as np  # here, so that packaging reads digests without loading NumPy

    state = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        header = {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}
        state.update(canonical_json(header))
        state.update(array.reshape(-1).view(np.uint8).data)
    return "sha256:" + state.hexdigest()
