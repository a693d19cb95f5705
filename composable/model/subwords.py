"""Tokenizers of imported backbones, defined by the JSON format of the `tokenizers` library.

A document that contains the characters of a special token, such as `<|endoftext|>`, is encoded as
those characters, so text can neither end a document nor forge a turn of a conversation. Special
tokens come only from `begin` and from the chat format's markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Self

import numpy as np

from composable.errors import ComposableError, ModelError, TextError
from composable.files.records import convert, convert_exactly, parse_table
from composable.files.text import check_text
from composable.interface import canonical_json, digest_bytes
from composable.model.tokenizer import ChatFormat, TextStream

_SPECIAL: Final = "special_tokens"
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class _SpecialTokens:
    """The content of `special_tokens.json`."""

    begin: str
    ends: tuple[str, ...]
    chat: ChatFormat | None


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        definition: Its JSON, the content of `tokenizer.json`.
        begin: The special token at the start of a document.
        ends: Tokens that end a continuation.
        chat: Format of conversations, or None if the model was not trained on any.

    Raises:
        ModelError: If the library is missing or cannot read the definition, or a token is unknown.
    """

    def __init__(
        self,
        definition: str,
        *,
        begin: str,
        ends: Sequence[str] = (),
        chat: ChatFormat | None = None,
    ) -> None:
        self._definition = definition
        self._text, self._markup = load_definition(definition), load_definition(definition)
        self._text.encode_special_tokens = True
        self._begin, self._ends = begin, tuple(ends)
        self.chat = chat
        self.begin = self._id_of(begin, "begin")
        self.ends = tuple(self._id_of(token, f"ends[{i}]") for i, token in enumerate(ends))
        self.vocab_size: int = self._text.get_vocab_size(with_added_tokens=True)

    def _id_of(self, token: str, where: str) -> int:
        index = self._markup.token_to_id(token)
        if index is None:
            raise ModelError(f"{token!r} is not a token", where=f"tokenizer.{where}")
        return int(index)

    @cached_property
    def digest(self) -> str:
        """Digest of the definition's canonical JSON and of the start token."""
        definition = digest_bytes(canonical_json(json.loads(self._definition)))
        return digest_bytes(
            canonical_json(
                {
                    "kind": "tokenizers",
                    "definition": definition,
                    "vocab_size": self.vocab_size,
                    "begin": self.begin,
                }
            )
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SubwordTokenizer):
            return False
        same_markup = (self.ends, self.chat) == (other.ends, other.chat)
        return self.digest == other.digest and same_markup

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_files(self) -> tuple[str, str]:
        """Return the definition and the special tokens as the texts of two JSON files."""
        special = {
            "begin": self._begin,
            "ends": list(self._ends),
            "chat": _chat_to_json(self.chat) if self.chat else None,
        }
        return self._definition, json.dumps(special, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_files(cls, definition: str, special: str) -> Self:
        """Read what `to_files` returned.

        Raises:
            ModelError: If the texts have another form.
        """
        table = parse_table(special, _SPECIAL, ModelError)
        if table.get("chat") is not None:
            chat = convert(table["chat"], dict[str, Any], f"{_SPECIAL}.chat", ModelError)
            table["chat"] = convert_exactly(chat, ChatFormat, f"{_SPECIAL}.chat", ModelError)
        tokens = convert_exactly(table, _SpecialTokens, _SPECIAL, ModelError)
        return cls(definition, begin=tokens.begin, ends=tokens.ends, chat=tokens.chat)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return tokens_T, the start token first.

        Raises:
            TextError: For text that is empty, not UTF-8, or contains half of a character.
            ModelError: For text that the tokenizer's own rules cannot split.
        """
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                raise TextError(f"the text is not UTF-8 at byte {error.start}") from error
        if not text:
            raise TextError("the text is empty", hint="give at least one character")
        with _explained():
            ids = self._text.encode(check_text(text), add_special_tokens=False).ids
        return np.array([self.begin, *ids], np.int32)

    def encode_markup(self, text: str) -> list[int]:
        """Return the tokens of markup, special tokens included, without the start token."""
        with _explained():
            ids: list[int] = self._markup.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens_T: Sequence[int] | np.ndarray) -> str:
        """Return text, special tokens left out."""
        with _explained():
            ids = [int(token) for token in tokens_T]
            return str(self._text.decode(ids, skip_special_tokens=True))

    def stream(self, after: Sequence[int] | np.ndarray = ()) -> TextStream:
        """Return a fresh stream that continues some tokens."""
        return _SubwordStream(self._text, [int(token) for token in after])


class _SubwordStream:
    """Decodes the tokens since the last whole character, with those before it as context.

    The context matters: decoders drop the blank before a first word, or join the bytes of several
    tokens. It is the last tokens that have text, whole characters of it.

    Args:
        tokenizer: Of the `tokenizers` library.
        after: The tokens before the first of the stream.
    """

    def __init__(self, tokenizer: Any, after: list[int]) -> None:
        self._tokenizer = tokenizer
        starts = range(len(after) - 1, -1, -1)
        self._context = next((after[i:] for i in starts if self._is_whole(after[i:])), after)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        return self._advance(is_last=False)

    def finish(self) -> str:
        return self._advance(is_last=True)

    def _advance(self, is_last: bool) -> str:
        before, text = self._decode(self._context), self._decode([*self._context, *self._held])
        if text.endswith(_REPLACEMENT) and not is_last:
            return ""
        added = self._held if self._is_whole(self._held) else [*self._context, *self._held]
        self._context, self._held = added, []
        return text[len(before) :]

    def _is_whole(self, tokens: list[int]) -> bool:
        """Return whether tokens have text by themselves that begins with a whole character."""
        text = self._decode(tokens)
        return bool(text) and not text.startswith(_REPLACEMENT)

    def _decode(self, tokens: list[int]) -> str:
        with _explained():
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _chat_to_json(chat: ChatFormat) -> dict[str, Any]:
    """Return the fields of chat markup.

    What older versions do not know is left out where it has its default. They reject a package that
    has it, by the name of the field.
    """
    fields: dict[str, Any] = {} if chat.system is None else {"system": chat.system}
    fields |= {"user": chat.user, "assistant": chat.assistant}
    return fields | ({"preamble": chat.preamble} if chat.preamble else {})


def load_definition(definition: str) -> Any:
    """Return a tokenizer of the `tokenizers` library that encodes every text whole, and alike.

    Settings of training that a definition may hold, truncation, padding and dropout, are reset.

    Args:
        definition: Its JSON, the content of `tokenizer.json`.

    Raises:
        ModelError: If the library is missing or cannot read the definition.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ModelError(
            "this backbone's tokenizer needs the `tokenizers` library",
            hint="pip install 'composable[interop]'",
        ) from error
    with _explained("not a tokenizer"):
        tokenizer = Tokenizer.from_str(definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if hasattr(tokenizer.model, "dropout"):
            tokenizer.model.dropout = None
        tokenizer.encode("a")  # some definitions are read and fail on the first text
    return tokenizer


@contextmanager
def _explained(problem: str = "the tokenizer fails on this text") -> Iterator[None]:
    """Raise a ModelError for whatever the library raises, such as for an expression too slow."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, ComposableError):
        raise
    except BaseException as error:  # the library raises nothing narrower, and its panics are wider
        raise ModelError(f"{problem}: {error}", where="tokenizer.json") from error
