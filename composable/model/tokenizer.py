"""Text to tokens and back: what a model asks of a tokenizer, and the one for bytes.

Tokenizers that imported backbones bring are in `subwords.py`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from composable.errors import TextError
from composable.interface import canonical_json, digest_bytes

BEGIN: Final = 0


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How the turns of a conversation are written: markup before and after each speaker's words.

    Markup is plain data; unlike a template, it runs nothing.

    Args:
        user: Markup around what the user says.
        assistant: Markup around what the model says; it continues after the first.
        system: Markup around instructions; None if the model takes none.
        preamble: Markup before the first turn of a conversation without instructions, such as a
            turn with the model's default instructions.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None = None
    preamble: str = ""


class TextStream(Protocol):
    """Tokens to text as they come: characters are held back until all their bytes are there."""

    def push(self, token: int) -> str:
        """Return the text that became whole with this token; often empty, or several characters."""

    def finish(self) -> str:
        """Return what was held back, made readable."""


class Tokenizer(Protocol):
    """What a model asks of a tokenizer.

    Attributes:
        vocab_size: Tokens it may return.
        begin: The token that begins a document.
        ends: Tokens at which a continuation is over.
        chat: How conversations are written, if the model was taught any way.
    """

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def begin(self) -> int: ...  # noqa: D102
    @property
    def ends(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def chat(self) -> ChatFormat | None: ...  # noqa: D102

    @property
    def digest(self) -> str:
        """Digest of all that decides which tokens a text becomes."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return tokens_T of a document, the begin token first.

        Raises:
            TextError: For text that is empty, or that it cannot read.
        """

    def encode_markup(self, text: str) -> list[int]:
        """Return the tokens of trusted text, without the begin token, special tokens included."""

    def decode(self, tokens_T: Sequence[int] | np.ndarray) -> str:
        """Return text; bytes that are no valid UTF-8 show as the replacement character."""

    def stream(self) -> TextStream:
        """Return a fresh stream."""


class ByteTokenizer:
    """One token per UTF-8 byte; byte 0, which text never holds, begins a document."""

    vocab_size: Final = 256
    begin: Final = BEGIN
    ends: Final[tuple[int, ...]] = ()
    chat: Final[ChatFormat | None] = None

    @property
    def digest(self) -> str:
        """Digest of this tokenizer's definition."""
        definition = {"kind": "bytes", "vocab_size": self.vocab_size, "begin": BEGIN}
        return digest_bytes(canonical_json(definition))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteTokenizer)

    def __hash__(self) -> int:
        return hash(self.digest)

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

    def encode_markup(self, text: str) -> list[int]:
        """Return the bytes of a text; there are no special ones."""
        return list(text.encode())

    def decode(self, tokens_T: Sequence[int] | np.ndarray) -> str:
        """Return text; bytes that are no valid UTF-8 show as the replacement character."""
        data = bytes(int(token) for token in tokens_T if token != BEGIN)
        return data.decode(errors="replace")

    def stream(self) -> TextStream:
        """Return a fresh stream."""
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
