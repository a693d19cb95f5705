"""Text to tokens and back. Bytes only; imported backbones bring their own."""

from __future__ import annotations

from typing import Final

import numpy as np

from composable.errors import TextError
from composable.interface import canonical_json, digest_bytes

BEGIN: Final = 0


class ByteTokenizer:
    """One token per UTF-8 byte; byte 0, which text never holds, begins a document."""

    vocab_size: Final = 256

    @property
    def digest(self) -> str:
        """Digest of this tokenizer's definition."""
        definition = {"kind": "bytes", "vocab_size": self.vocab_size, "begin": BEGIN}
        return digest_bytes(canonical_json(definition))

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return tokens_T, the begin-of-document token first.

        Raises:
            TextError: For text that is empty or holds byte 0.
        """
        data = text.encode() if isinstance(text, str) else text
        if not data:
            raise TextError("the text is empty", hint="give at least one character")
        if 0 in data:
            raise TextError(
                f"the text holds a NUL byte at offset {data.index(0)}; it marks a document's begin",
                hint="strip NUL bytes, or treat the data as several documents",
            )
        return np.concatenate([[BEGIN], np.frombuffer(data, np.uint8)]).astype(np.int32)

    def decode(self, tokens_T: np.ndarray) -> str:
        """Return text; bytes that are no valid UTF-8 show as the replacement character."""
        data = bytes(int(token) for token in tokens_T if token != BEGIN)
        return data.decode(errors="replace")
