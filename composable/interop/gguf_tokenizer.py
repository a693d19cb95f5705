"""The tokenizer of a GGUF file, rebuilt as one of the `tokenizers` library.

GGUF stores vocabulary, merges and kinds of tokens, and names the rule that splits text into words.
The rules that are known here are byte-level BPE; others are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from composable.errors import InteropError
from composable.interop.source import SourceTokenizer, choose_special_tokens

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
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise InteropError(
            f"{kind!r} is not a tokenizer that can be rebuilt, expected 'gpt2' (byte-level BPE)",
            where=f"{where}: tokenizer.ggml.model",
            hint="import the Hugging Face folder, which has a tokenizer.json",
        )
    if rule not in RULES:
        raise InteropError(
            f"{rule!r} is not a known rule of splitting text ({', '.join(sorted(RULES))})",
            where=f"{where}: tokenizer.ggml.pre",
            hint="import the Hugging Face folder, which has a tokenizer.json",
        )
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        raise InteropError("expected False", where=f"{where}: tokenizer.ggml.add_space_prefix")
    names = list(metadata["tokenizer.ggml.tokens"])
    tokens = {token: index for index, token in enumerate(names)}

    def named(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return names[index] if index is not None and 0 <= index < len(names) else None

    ends = tuple(token for key in ("eos", "eot") if (token := named(key)) is not None)
    is_bos_added = bool(metadata.get("tokenizer.ggml.add_bos_token"))
    begin, all_ends = choose_special_tokens(tokens, named("bos"), is_bos_added, ends)
    if begin is None:
        raise InteropError("no token begins or ends a document", where=f"{where}: tokenizer.ggml")
    template = metadata.get("tokenizer.chat_template")
    return SourceTokenizer(
        definition=_define(metadata, names, tokens, rule),
        begin=begin,
        ends=all_ends,
        bos=named("bos"),
        eos=named("eos"),
        chat_template=template if isinstance(template, str) else None,
    )


def _define(
    metadata: Mapping[str, Any], names: list[str], tokens: Mapping[str, int], rule: str
) -> str:
    """Return the JSON of the tokenizer."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, normalizers
        from tokenizers.models import BPE
    except ImportError as error:
        raise InteropError(
            "rebuilding a tokenizer needs the `tokenizers` library",
            hint="pip install 'composable[interop]'",
        ) from error
    make, is_whole_word_kept, is_normalised = RULES[rule]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    model = BPE(vocab=dict(tokens), merges=merges, ignore_merges=is_whole_word_kept)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = make()
    tokenizer.decoder = decoders.ByteLevel()
    if is_normalised:
        tokenizer.normalizer = normalizers.NFC()
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(names)
    for token, kind in zip(names, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    text: str = tokenizer.to_str()
    return text
