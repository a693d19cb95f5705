"""Text to tokens and back: the protocol of tokenizers, and the tokenizer for bytes.

Tokenizers of imported backbones are in `subwords.py`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from composable.errors import TextError
from composable.files.text import check_text
from composable.interface import canonical_json, digest_bytes

BEGIN: Final = 0


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Markup before and after each turn of a conversation.

    It is plain data; unlike a template, it runs no code.

    Args:
        user: Markup around a turn of the user.
        assistant: Markup around a reply; the model continues after the first part.
        system: Markup around instructions; None if the model takes none.
        preamble: Markup before the first turn of a conversation without instructions, such as a
            turn with the model's default instructions.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None = None
    preamble: str = ""


class TextStream(Protocol):
    """Decodes tokens one at a time; a character is held back until all its bytes are there."""

    def push(self, token: int) -> str:
        """Return the text completed by this token: none, one or several characters."""

    def finish(self) -> str:
        """Return the text held back; incomplete bytes become the replacement character."""


class Tokenizer(Protocol):
    """The methods that a model needs of a tokenizer.

    Attributes:
        vocab_size: Number of token ids.
        begin: The token at the start of a document.
        ends: Tokens that end a continuation.
        chat: Format of conversations, or None if the model was not trained on any.
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
        """Digest of everything that determines the tokens of a text."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return tokens_T of a document, the start token first.

        Raises:
            TextError: For text that is empty or cannot be encoded.
        """

    def encode_markup(self, text: str) -> list[int]:
        """Return the tokens of markup, special tokens included, without the start token."""

    def decode(self, tokens_T: Sequence[int] | np.ndarray) -> str:
        """Return text; bytes that are not valid UTF-8 become the replacement character."""

    def stream(self, after: Sequence[int] | np.ndarray = ()) -> TextStream:
        """Return a fresh stream.

        Args:
            after: The tokens that it continues: what a token stands for may depend on them.
        """


class ByteTokenizer:
    """One token per UTF-8 byte; byte 0, which text may not contain, starts a document.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("hi").tolist()
        [0, 104, 105]
        >>> tokenizer.decode([0, 104, 105])
        'hi'
    """

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
        """Return tokens_T, the start token first.

        Raises:
            TextError: For text that is empty, or contains byte 0 or half of a character.
        """
        data = check_text(text).encode() if isinstance(text, str) else text
        if not data:
            raise TextError("the text is empty", hint="give at least one character")
        if 0 in data:
            raise TextError(
                f"the text has a NUL byte at offset {data.index(0)}; NUL starts a document",
                hint="remove NUL bytes, or split the text into documents",
            )
        return np.concatenate([[BEGIN], np.frombuffer(data, np.uint8)]).astype(np.int32)

    def encode_markup(self, text: str) -> list[int]:
        """Return the bytes of a text; there are no special tokens."""
        return list(text.encode())

    def decode(self, tokens_T: Sequence[int] | np.ndarray) -> str:
        """Return text; bytes that are not valid UTF-8 become the replacement character."""
        data = bytes(int(token) for token in tokens_T if token != BEGIN)
        return data.decode(errors="replace")

    def stream(self, after: Sequence[int] | np.ndarray = ()) -> TextStream:
        """Return a fresh stream; what is before it makes no difference to bytes."""
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
