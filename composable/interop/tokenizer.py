"""The tokenizer of a checkpoint as one of ours, and a check that it reproduces text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from composable.errors import InteropError
from composable.interop.chat import derive_chat_format
from composable.interop.source import CheckpointSource
from composable.model.subwords import SubwordTokenizer

# Texts that every tokenizer must reproduce.
_SAMPLES: Final = (
    "The quick brown fox; 12,345 jumps.\n\n  Indented\tand tabbed.\r\n",
    "Füße, naïve, œuvre, Straße, Łódź, ¿Qué?",
    "Съешь же ещё этих мягких французских булок",
    "いろはにほへと ちりぬるを 天地玄黃 宇宙洪荒",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # 𝔘𝔫𝔦 👩‍👩‍👧",
    "∀x ∃y (φ→ψ) ⊢ A∧B",
)


def make_tokenizer(
    source: CheckpointSource,
    begin: str | None = None,
    *,
    report: Callable[[str], None] | None = None,
) -> SubwordTokenizer:
    """Return the tokenizer of a checkpoint, with its chat markup.

    Args:
        source: The checkpoint.
        begin: Token that begins a document; by default the one that the source declares.
        report: Called with the reason if there is no chat markup.

    Raises:
        InteropError: If the checkpoint has no tokenizer.
    """
    if source.tokenizer is None:
        raise InteropError(
            "there is no tokenizer.json beside the weights",
            where=source.name,
            hint="put the model's tokenizer.json and tokenizer_config.json into the folder",
        )
    found, chat = source.tokenizer, None
    begin = begin or found.begin
    try:
        chat = derive_chat_format(found.chat_template, begin=begin, bos=found.bos, eos=found.eos)
    except InteropError as error:
        if report is not None:
            report(str(error))
    return SubwordTokenizer(found.definition, begin=begin, ends=found.ends, chat=chat)


def check_round_trips(tokenizer: SubwordTokenizer, texts: Sequence[str]) -> dict[str, int]:
    """Check that decoding tokens reproduces the text, and count exact round trips.

    A tokenizer may bring a text into a normal form. What comes back then is another text, but one
    with the same tokens: to the model the two are the same. A blank before the first word may be
    lost, as SentencePiece adds one there; elsewhere it may not.

    Raises:
        InteropError: If what comes back has other tokens than the text.
    """
    texts = [*_SAMPLES, *texts]
    exact = 0
    for text in texts:
        exact += tokenizer.decode(tokenizer.encode(text)) == text
        inside = f".{text}"
        tokens_T = tokenizer.encode(inside)
        back = tokenizer.decode(tokens_T)
        if back != inside and not (back and np.array_equal(tokenizer.encode(back), tokens_T)):
            pairs = enumerate(zip(inside, back, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(inside), len(back)))
            raise InteropError(
                f"{inside[at : at + 20]!r} came back as {back[at : at + 20]!r} at character "
                f"{max(at - 1, 0)}; the tokenizer cannot represent every text",
                where="tokenizer",
                hint="use a model whose tokenizer has bytes to fall back on (byte-level BPE, or "
                "byte_fallback); if this model's has, import it from its own tokenizer.json",
            )
    return {"texts": len(texts), "exact": exact}
