"""The tokenizer of a GGUF file, rebuilt as one of the `tokenizers` library.

GGUF stores vocabulary, merges and kinds of tokens, and names the rule that splits text into words.
The rules that are known here are byte-level BPE; others are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from composable.errors import InteropError
from composable.interop.source import SourceTokenizer, choose_special_tokens
from composable.interop.tables import Index, convert

_PREFIX: Final = "tokenizer.ggml."
_TYPES: Final[dict[str, Any]] = {
    "tokens": list[str],
    "model": str | None,
    "pre": str | None,
    "merges": list[str] | None,
    "token_type": list[int] | None,
    "bos_token_id": Index | None,
    "eos_token_id": Index | None,
    "eot_token_id": Index | None,
    "add_bos_token": bool | None,
    "add_space_prefix": bool | None,
}
_IMPORT_FOLDER: Final = "import the Hugging Face folder, which has a tokenizer.json"
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens
# How Llama 3 and its kin split text: contractions, words with one character before, up to three
# digits, punctuation, line ends, spaces.
_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ONE_DIGIT: Final = _WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> Callable[[], Any]:
    def make() -> Any:
        from tokenizers import Regex, pre_tokenizers

        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return make


def _gpt2(*, single_digits: bool) -> Callable[[], Any]:
    def make() -> Any:
        from tokenizers import pre_tokenizers

        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, words]) if single_digits else words

    return make


# Name of the rule -> (how it splits, whether a word that is itself a token is not merged, whether
# text is brought into normal form C).
RULES: Final[dict[str, tuple[Callable[[], Any], bool, bool]]] = {
    "gpt-2": (_gpt2(single_digits=False), False, False),
    "smollm": (_gpt2(single_digits=True), False, False),
    "llama-bpe": (_split(_WORDS), True, False),
    "dbrx": (_split(_WORDS), False, False),
    "qwen2": (_split(_ONE_DIGIT), False, True),
}


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> SourceTokenizer | None:
    """Return the tokenizer that the metadata describes, or None where there is none.

    Raises:
        InteropError: If its kind or its rule is not known, or the library is missing.
    """
    if f"{_PREFIX}tokens" not in metadata:
        return None
    fields = {
        name: convert(metadata.get(f"{_PREFIX}{name}"), kind, f"{where}: {_PREFIX}{name}")
        for name, kind in _TYPES.items()
    }
    _require_known(fields, where)
    names = fields["tokens"]
    tokens = {token: index for index, token in enumerate(names)}
    if len(tokens) < len(names):
        raise InteropError(
            f"{len(names) - len(tokens)} tokens are there twice", where=f"{where}: {_PREFIX}tokens"
        )

    def named(key: str) -> str | None:
        index = fields[f"{key}_token_id"]
        if index is None:
            return None
        if index >= len(names):
            raise InteropError(
                f"{index} is not one of the {len(names)} tokens",
                where=f"{where}: {_PREFIX}{key}_token_id",
            )
        name: str = names[index]
        return name

    bos, eos = named("bos"), named("eos")
    ends = tuple(token for token in (eos, named("eot")) if token is not None)
    begin, all_ends = choose_special_tokens(tokens, bos, bool(fields["add_bos_token"]), ends)
    if begin is None:
        raise InteropError(
            "no token begins or ends a document",
            where=f"{where}: {_PREFIX}bos_token_id",
            hint=_IMPORT_FOLDER,
        )
    template = metadata.get("tokenizer.chat_template")
    return SourceTokenizer(
        definition=_define(fields, tokens, where),
        begin=begin,
        ends=all_ends,
        bos=bos,
        eos=eos,
        chat_template=template if isinstance(template, str) else None,
    )


def _require_known(fields: Mapping[str, Any], where: str) -> None:
    """Reject a tokenizer of another kind, and one whose rule is unknown or not stated."""
    kind, rule = fields["model"], fields["pre"]
    if kind != "gpt2":
        raise InteropError(
            f"{kind!r} is not a tokenizer that can be rebuilt, expected 'gpt2' (byte-level BPE)",
            where=f"{where}: {_PREFIX}model",
            hint=_IMPORT_FOLDER,
        )
    if rule is None:
        raise InteropError(
            "missing field: the file does not state how text is split into words, which decides "
            "the tokens",
            where=f"{where}: {_PREFIX}pre",
            hint="convert the model again with a llama.cpp of today, or state the rule with "
            f"`gguf-new-metadata --pre-tokenizer RULE` ({', '.join(sorted(RULES))})",
        )
    if rule not in RULES:
        raise InteropError(
            f"{rule!r} is not a known rule of splitting text ({', '.join(sorted(RULES))})",
            where=f"{where}: {_PREFIX}pre",
            hint=_IMPORT_FOLDER,
        )
    if fields["add_space_prefix"]:
        raise InteropError(
            "True is not implemented, expected False",
            where=f"{where}: {_PREFIX}add_space_prefix",
            hint=_IMPORT_FOLDER,
        )
    if fields["merges"] is None:
        raise InteropError("missing field", where=f"{where}: {_PREFIX}merges", hint=_IMPORT_FOLDER)


def _define(fields: Mapping[str, Any], tokens: Mapping[str, int], where: str) -> str:
    """Return the JSON of the tokenizer."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, normalizers
        from tokenizers.models import BPE
    except ImportError as error:
        raise InteropError(
            "rebuilding a tokenizer needs the `tokenizers` library",
            hint="pip install 'composable[interop]'",
        ) from error
    make, is_whole_word_kept, is_normalised = RULES[fields["pre"]]
    kinds = fields["token_type"] or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise InteropError(
            f"{len(kinds)} kinds of {len(tokens)} tokens", where=f"{where}: {_PREFIX}token_type"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    try:
        model = BPE(vocab=dict(tokens), merges=merges, ignore_merges=is_whole_word_kept)
    except Exception as error:  # the library raises nothing narrower
        raise InteropError(f"{error}", where=f"{where}: {_PREFIX}merges") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = make()
    tokenizer.decoder = decoders.ByteLevel()
    if is_normalised:
        tokenizer.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    text: str = tokenizer.to_str()
    return text
