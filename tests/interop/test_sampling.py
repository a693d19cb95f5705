"""Sampling settings have the meaning, and the order, that they have in transformers.

Needs PyTorch and transformers, which `make test` does without: `make parity` installs them apart.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from composable.model.decoding import continue_tokens
from composable.model.sampling import Sampling, make_draw, penalize_seen, restrict_logits

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of other people's code
]

N_TOKENS = 200  # of the vocabulary
ALL = {
    "repetition_penalty": 1.3,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
}
NEUTRAL = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def processors_of_transformers(settings):
    """Return the processors that `generate` of transformers applies, in its order."""
    import transformers

    cfg = transformers.LlamaConfig(
        **{"vocab_size": N_TOKENS, "hidden_size": 8, "intermediate_size": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 1},
    )
    config = transformers.GenerationConfig(do_sample=True, **settings)
    model = transformers.LlamaForCausalLM(cfg)
    return model._get_logits_processor(config, input_ids_seq_length=1)


def run_theirs(settings, seen_T, logits_V):
    import torch

    processors = processors_of_transformers(settings)
    scores = torch.from_numpy(logits_V)[None]
    return processors(torch.from_numpy(seen_T).long()[None], scores)[0].numpy()


@jax.jit
def run_ours(draw, seen_V, logits_V):
    return restrict_logits(draw, penalize_seen(draw.repetition_penalty, seen_V, logits_V))


def compare(settings, seen_T, logits_V):
    """Check that both give the same logits, and exclude the same tokens; return them."""
    settings = {**NEUTRAL, **settings}
    theirs_V = run_theirs(settings, seen_T, logits_V)
    draw = make_draw(Sampling(**settings), np.zeros(N_TOKENS, bool))
    ours_V = run_ours(draw, np.isin(np.arange(N_TOKENS), seen_T), logits_V)
    np.testing.assert_allclose(ours_V, theirs_V, rtol=1e-6)  # a rounding of each division
    return theirs_V


def random_inputs(seed):
    rng = np.random.default_rng(seed)
    logits_V = 3 * rng.normal(size=N_TOKENS).astype(np.float32)
    return rng.integers(0, N_TOKENS, 30), logits_V


@pytest.mark.parametrize("left_out", [None, *ALL])
@pytest.mark.parametrize("seed", range(3))
def test_all_settings_together_are_those_of_transformers(left_out, seed):
    settings = {name: value for name, value in ALL.items() if name != left_out}
    logits_V = compare(settings, *random_inputs(seed))
    assert 1 < np.isfinite(logits_V).sum() < N_TOKENS


@pytest.mark.parametrize(
    "settings",
    [
        *({"top_k": k} for k in (1, 7, N_TOKENS - 1, N_TOKENS, 10**6)),
        *({"top_p": p} for p in (1e-6, 0.3, 0.999)),
        *({"min_p": p} for p in (1e-6, 0.1, 1.0)),
        *({"repetition_penalty": r} for r in (0.5, 2.0)),
        {"temperature": 0.01, "min_p": 0.5},
        {},
    ],
    ids=str,
)
def test_each_setting_is_that_of_transformers(settings):
    compare(settings, *random_inputs(7))


@pytest.mark.parametrize("settings", [{"top_k": 20}, {"min_p": 0.3}, {"min_p": 1.0}], ids=str)
def test_ties_are_kept_as_in_transformers(settings):
    seen_T, logits_V = random_inputs(0)
    logits_V = compare(settings, seen_T, np.round(logits_V))
    assert np.isfinite(logits_V).sum() != settings.get("top_k")


@pytest.mark.parametrize("penalty", [1.0, 1.3, 3.0])
def test_greedy_text_is_that_of_transformers(penalty, tmp_path):
    """The penalty counts prompt and continuation; the prompt is longer than a prefill chunk."""
    import torch
    import transformers

    from composable.interop.checkpoint import Checkpoint, open_source
    from composable.workflows.import_backbone import load_checkpoint
    from tests.support.parity import SIZES, make_random, parts_of, random_tokens

    make_random("llama", tmp_path, "float32")
    prompt_T = random_tokens(SIZES["vocab_size"])[0, :40]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs_T = model.generate(
        torch.from_numpy(prompt_T).long()[None],
        do_sample=False,
        repetition_penalty=penalty,
        suppress_tokens=[SIZES["bos_token_id"], SIZES["eos_token_id"]],
        max_new_tokens=40,
    )[0, len(prompt_T) :].numpy()
    parts = parts_of(load_checkpoint(Checkpoint(open_source(tmp_path)), "F32"))
    tokenizer = SimpleNamespace(
        vocab_size=SIZES["vocab_size"], begin=SIZES["bos_token_id"], ends=(SIZES["eos_token_id"],)
    )
    sampling = Sampling(repetition_penalty=penalty)
    drawn = continue_tokens(parts, tokenizer, prompt_T, 40, sampling=sampling)
    ours_T = [token for token, _ in drawn]
    np.testing.assert_array_equal(ours_T, theirs_T[: len(ours_T)])
    assert len(ours_T) > 20
