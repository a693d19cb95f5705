"""Definitions of small tokenizers of every kind that checkpoints have.

`byte-level` is the fixture `subwords`; the others treat blanks as SentencePiece does.
"""

import json

from tests.support.tiny import PRIVATE_WORDS, PUBLIC_WORDS

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
SPECIAL = ("<unk>", "<|begin|>", "<|end|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:")
WORDS = list(dict.fromkeys(f"{PUBLIC_WORDS} {PRIVATE_WORDS}".split()))
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        STRIP,
    ],
}
BEGIN_FIRST = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [1], "tokens": ["<|begin|>"]}},
}


def unigram():
    """Return a Unigram model with bytes to fall back on, as llm-jp's."""
    scores = [(token, 0.0) for token in SPECIAL] + [(byte, -15.0) for byte in BYTES]
    scores += [(BLANK, -4.0)] + [(letter, -9.0) for letter in LETTERS]
    scores += [(BLANK + word, -5.0 - i / 50) for i, word in enumerate(WORDS) if word]
    model = {"type": "Unigram", "unk_id": 0, "vocab": scores, "byte_fallback": True}
    blanks = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "always", "split": True}
    return _define(model, pre_tokenizer=blanks)


def sentencepiece_bpe():
    """Return BPE with blanks written by a normaliser and bytes to fall back on, as Llama 2's."""
    merges, vocab = [], [*SPECIAL, *BYTES, BLANK, *LETTERS]
    for word in WORDS:
        whole = BLANK
        for letter in word:
            if letter not in LETTERS:
                break
            if (whole, letter) not in merges:
                merges.append((whole, letter))
                vocab.append(whole + letter)
            whole += letter
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(dict.fromkeys(vocab))},
        "merges": [list(pair) for pair in merges],
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    prepend = {"type": "Prepend", "prepend": BLANK}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    normalizer = {"type": "Sequence", "normalizers": [prepend, replace]}
    return _define(model, normalizer=normalizer)


def _define(model, **parts):
    added = [
        {
            **{"id": index, "content": token, "special": True},
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for index, token in enumerate(SPECIAL)
    ]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": BEGIN_FIRST,
            "decoder": DECODER,
            "model": model,
            **parts,
        }
    )


KINDS = {"unigram": unigram, "sentencepiece-bpe": sentencepiece_bpe}
