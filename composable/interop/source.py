"""What is read from either format: a config, a table of unread tensors, and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Args:
        dtype: Element type as its format names it: F32, BF16, F16, or a quantisation.
        shape: Shape, row-major.
        read: Returns its values as float32, float16 or bfloat16.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class SourceTokenizer:
    """A tokenizer as it comes with a checkpoint.

    Args:
        definition: JSON of the `tokenizers` library.
        begin: Token that begins a document.
        ends: Tokens at which a continuation is over.
        bos: Begin-of-sequence token, if one is declared; chat templates may write it.
        eos: End-of-sequence token, if one is declared; chat templates may write it.
        chat_template: The template of conversations, if there is one: Jinja2 source.
    """

    definition: str
    begin: str
    ends: tuple[str, ...]
    bos: str | None
    eos: str | None
    chat_template: str | None


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """A checkpoint of another project: its header is read, its tensors are not.

    Args:
        name: Its name in error messages.
        files: The files that hold the weights.
        is_gguf: Whether names and layouts are those of GGUF.
        config: Its config, with the names of Hugging Face.
        tensors: Its tensors by name.
        tokenizer: Its tokenizer, if it has one.
        license: SPDX expression; empty if not declared.
    """

    name: str
    files: tuple[Path, ...]
    is_gguf: bool
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    tokenizer: SourceTokenizer | None
    license: str


def choose_special_tokens(
    tokens: Mapping[str, int], bos: str | None, is_bos_added: bool, eos: tuple[str, ...]
) -> tuple[str | None, tuple[str, ...]]:
    """Return the token that begins a document and those that end a continuation.

    A document begins with what models of this kind saw between documents: their begin-of-sequence
    token where the tokenizer itself adds it, `<|endoftext|>` where there is one, or else the first
    of begin and end that is there.

    Args:
        tokens: Vocabulary.
        bos: Begin-of-sequence token, if one is declared.
        is_bos_added: Whether the tokenizer puts it before every text.
        eos: End-of-sequence tokens that are declared.
    """
    separator = "<|endoftext|>"
    wishes = [bos if is_bos_added else None, separator, bos, *eos]
    begin = next((token for token in wishes if token is not None and token in tokens), None)
    ends = [token for token in (*eos, separator) if token in tokens]
    return begin, tuple(dict.fromkeys(ends))
