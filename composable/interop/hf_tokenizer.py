"""Tokenizers as files that `AutoTokenizer` reads, including the one for bytes.

A text becomes the same tokens as here, including the one that begins a document: where the
definition does not add it, a post-processor does. Chat markup becomes a template.
"""

from __future__ import annotations

import json
from typing import Any, Final

from composable.errors import InteropError
from composable.model.subwords import SubwordTokenizer, load_definition
from composable.model.tokenizer import BEGIN, ByteTokenizer, ChatFormat, Tokenizer

_BYTE_BEGIN: Final = "<|begin|>"


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the text of `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        InteropError: For a tokenizer that those files cannot describe.
    """
    if isinstance(tokenizer, SubwordTokenizer):
        definition, special_text = tokenizer.to_files()
        special = json.loads(special_text)
        begin, ends = special["begin"], special["ends"]
    elif isinstance(tokenizer, ByteTokenizer):
        definition, begin, ends = json.dumps(_define_bytes()), _BYTE_BEGIN, []
    else:
        raise InteropError(f"{type(tokenizer).__name__} is not a tokenizer that can be exported")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "add_bos_token": True,
        "eos_token": ends[0] if ends else None,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat is not None:
        config["chat_template"] = _template(tokenizer.chat)
    return {
        "tokenizer.json": _begin_with(begin, tokenizer.begin, definition),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _begin_with(begin: str, index: int, definition: str) -> str:
    """Return a definition that puts a token before every text; unchanged if it does already."""
    tokenizer = load_definition(definition)
    whole, bare = (tokenizer.encode("a", add_special_tokens=adds).ids for adds in (True, False))
    if whole == [index, *bare]:
        return definition
    data = json.loads(definition)
    own = data.get("post_processor") or {}
    parts = own.get("processors", []) if own.get("type") == "Sequence" else [own] if own else []
    kept = [part for part in parts if part.get("type") == "ByteLevel"]  # these only move offsets
    special = {"SpecialToken": {"id": begin, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    template = {
        "type": "TemplateProcessing",
        "single": [special, text[0]],
        "pair": [special, *text],
        "special_tokens": {begin: {"id": begin, "ids": [index], "tokens": [begin]}},
    }
    processors = {"type": "Sequence", "processors": [*kept, template]}
    return json.dumps({**data, "post_processor": processors if kept else template})


def _define_bytes() -> dict[str, Any]:
    """Return the definition of one token per byte: byte-level BPE without merges."""
    # The library writes bytes as printable characters: itself where it is one, or else the next
    # free character from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    begin = {"id": BEGIN, "content": _BYTE_BEGIN, "special": True, "normalized": False}
    matching = {"single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**begin, **matching}],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            # Byte 0 never occurs in text; its number is that of the token that begins one.
            "vocab": {
                _BYTE_BEGIN if byte == BEGIN else letter: byte
                for byte, letter in sorted(letters.items())
            },
            "merges": [],
        },
    }


def _template(chat: ChatFormat) -> str:
    """Return a Jinja template that writes turns as a chat format does."""
    roles = {"system": chat.system, "user": chat.user, "assistant": chat.assistant}
    turns = "".join(
        f"{{% {'if' if i == 0 else 'elif'} message['role'] == '{role}' %}}{_write_turn(marks)}"
        for i, (role, marks) in enumerate(roles.items())
    )
    prompt = f"{{% if add_generation_prompt %}}{{{{ {_quote(chat.assistant[0])} }}}}{{% endif %}}"
    preamble = ""
    if chat.preamble:
        is_plain = "not messages or messages[0]['role'] != 'system'"
        preamble = f"{{% if {is_plain} %}}{{{{ {_quote(chat.preamble)} }}}}{{% endif %}}"
    return f"{preamble}{{% for message in messages %}}{turns}{{% endif %}}{{% endfor %}}{prompt}"


def _write_turn(marks: tuple[str, str] | None) -> str:
    """Return the part of a template that writes one turn, or rejects it."""
    if marks is None:
        return "{{ raise_exception('this model takes no instructions') }}"
    before, after = map(_quote, marks)
    return f"{{{{ {before} + message['content'] + {after} }}}}"


def _quote(text: str) -> str:
    """Return a text as a Jinja literal; JSON spells it in a way that Jinja reads."""
    return json.dumps(text)
