"""An imported backbone computes what transformers computes, for every family, from its own files.

Needs PyTorch and transformers, which `make test` does without: `make parity` installs them apart.
"""

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed; run `make parity`")
pytest.importorskip("transformers", reason="transformers is not installed; run `make parity`")

from composable.interop.chat import write_conversation
from tests.support.chat_models import MODELS, read_template

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's code

# Sums of 64 products in another order, four layers deep; logits are of order 1.
SAME_LOGITS = 1e-4
SAME_KL = 1e-6  # float32 rounding of the logarithms, summed over the vocabulary
# Both round in bfloat16, at different places: each is about as far from exact as the other.
ROUNDINGS_APART = 3.0


@pytest.mark.parametrize("family", ["llama", "smollm", "qwen3", "olmo2"])
def test_logits_are_those_of_transformers_in_float32(family, tmp_path):
    from tests.support.parity import compare_family

    row = compare_family(family, "float32", tmp_path / family)
    assert row["logit_std"] > 0.5  # or a difference would not show
    assert row["max_abs_logit_diff"] <= SAME_LOGITS
    assert row["cached_decode_max_diff"] <= SAME_LOGITS
    assert abs(row["kl"]) <= SAME_KL


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_bfloat16_is_as_far_from_exact_as_that_of_transformers(family, tmp_path):
    from tests.support.parity import compare_family

    row = compare_family(family, "bfloat16", tmp_path / family)
    assert row["our_rounding"] <= ROUNDINGS_APART * row["their_rounding"]
    assert row["max_abs_logit_diff"] <= ROUNDINGS_APART * row["their_rounding"]
    assert row["cached_decode_max_diff"] <= ROUNDINGS_APART * row["their_rounding"]
    assert abs(row["kl"]) <= 1e-2


def test_tokens_are_those_of_transformers(write_checkpoint, tmp_path):
    """But for special tokens that a text spells out: there they are text, here and nowhere else."""
    import transformers

    from composable.interop.checkpoint import open_source
    from composable.interop.tokenizer import make_tokenizer

    folder, _ = write_checkpoint("llama")
    ours = make_tokenizer(open_source(folder))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in ("the quick brown fox", "naïve Füße ∀x ∃y φ→ψ", "  \n\t x = {1: 2}"):
        np.testing.assert_array_equal(ours.encode(text)[1:], theirs(text)["input_ids"])


@pytest.mark.parametrize("name", MODELS)
def test_conversations_are_those_of_transformers(name, write_checkpoint):
    """But for the date of today, which markup does not know."""
    import transformers

    bos, eos, begin, chat = MODELS[name]
    folder, _ = write_checkpoint("llama")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=read_template(name),
        **{"eos_token": eos} | ({} if bos is None else {"bos_token": bos}),
    )
    texts = ["Who?", "I.", "And now?", "Still I.", "Good."]
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    for n in (1, 3, 5):
        for system in (None, *(("Be brief.",) if chat.system else ())):
            before = [] if system is None else [{"role": "system", "content": system}]
            rendered = theirs.apply_chat_template(
                [*before, *turns[:n]],
                tokenize=False,
                add_generation_prompt=True,
                **({"date_string": "26 Jul 2024"} if name == "llama3_2" else {}),
            )
            written = write_conversation(chat, texts[:n], system=system)
            assert rendered in (written, begin + written)
