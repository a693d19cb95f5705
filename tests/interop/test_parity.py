"""An imported backbone computes what transformers computes, for every family, from its own files.

Needs PyTorch and transformers, which `make test` does without: `make parity` installs them apart.
"""

import json

import numpy as np
import pytest

from composable.errors import InteropError
from composable.interop.chat import write_conversation
from composable.interop.checkpoint import Checkpoint, open_source
from tests.support.chat_models import MODELS, read_template
from tests.support.subword_kinds import KINDS

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of other people's code
]

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


TEXTS = (
    "the quick brown fox",
    "naïve Füße ∀x ∃y φ→ψ",
    "  \n\t x = {1: 2}",
    " of and to",
    "日本 \U0001f469 the",
    "the  river. ",
)


@pytest.mark.parametrize("kind", ["byte-level", *KINDS])
def test_tokens_are_those_of_transformers(write_checkpoint, kind):
    """But for special tokens that a text spells out: there they are text, here and nowhere else."""
    import transformers

    from composable.interop.tokenizer import make_tokenizer

    folder, _ = write_checkpoint("llama")
    if kind in KINDS:
        (folder / "tokenizer.json").write_text(KINDS[kind]())
    ours = make_tokenizer(open_source(folder))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        tokens = [ours.begin, *theirs(text, add_special_tokens=False)["input_ids"]]
        np.testing.assert_array_equal(ours.encode(text), tokens)
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
        for cut in range(1, len(tokens)):  # a stream adds what the whole has beyond the prompt
            prompt = theirs.decode(tokens[:cut], skip_special_tokens=True)
            whole = theirs.decode(tokens, skip_special_tokens=True)
            if not whole.startswith(prompt) or prompt.endswith("\N{REPLACEMENT CHARACTER}"):
                continue  # cut within a character
            stream = ours.stream(tokens[:cut])
            added = "".join(stream.push(token) for token in tokens[cut:]) + stream.finish()
            assert prompt + added == whole


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"add_bos_token": True, "bos_token": "<|end|>"},
        {"add_bos_token": True, "bos_token": "<|begin|>"},
    ],
)
@pytest.mark.parametrize("kind", ["byte-level", *KINDS])
def test_a_document_begins_as_that_of_transformers(write_checkpoint, kind, stated):
    import transformers

    folder, _ = write_checkpoint("llama")
    if kind in KINDS:
        (folder / "tokenizer.json").write_text(KINDS[kind]())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", **stated}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    bare, whole = (theirs("the", add_special_tokens=adds)["input_ids"] for adds in (False, True))
    if whole != bare:
        found = open_source(folder).tokenizer
        assert whole == [theirs.convert_tokens_to_ids(found.begin), *bare]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": LLAMA3},
        {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
        {"rope_scaling": {**LLAMA3, "rope_theta": 20_000.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500_000.0},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 500_000.0}, "rope_theta": 10_000.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {**LLAMA3, "type": "linear"}},
        {"partial_rotary_factor": 1.0, "pretraining_tp": 4, "_hash": "a", "top_p": 0.5},
        {"head_dim": None, "num_key_value_heads": 2, "is_decoder": True, "pruned_heads": {}},
        {"hidden_act": "swish", "auto_map": {"AutoModel": "x.Y"}, "sliding_window": None},
    ],
)
def test_what_a_config_says_is_followed_as_by_transformers_or_refused(tmp_path, change):
    from tests.support.parity import compare, make_random, random_tokens

    folder = tmp_path / "model"
    make_random("smollm", folder, "float32")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps({**config, **change}))
    try:
        Checkpoint(open_source(folder))
    except InteropError as error:
        assert "rope" in error.where
        return
    row = compare(folder, "float32", random_tokens(config["vocab_size"]))
    assert row["max_abs_logit_diff"] <= SAME_LOGITS


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


WORDS = [
    *["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with"],
    "naïve",
    "Füße",
    "🦊",
    "jumps\n",
    "",
]
SAME_NATS = 2e-3  # float32 sums of up to 256 log-probabilities in another order


@pytest.fixture(scope="module")
def harness(tmp_path_factory, subwords):
    """Return one random model as that of the harness and as ours."""
    import tokenizers
    import transformers
    from lm_eval.models.huggingface import HFLM

    from composable.interop.checkpoint import Checkpoint, open_source
    from composable.interop.lm_eval import ComposableLM
    from composable.model.model import Model
    from composable.model.subwords import SubwordTokenizer
    from composable.workflows.import_backbone import load_checkpoint
    from tests.support.parity import make_random, parts_of

    folder = tmp_path_factory.mktemp("harness") / "smollm"
    make_random("smollm", folder, "float32")
    definition = tokenizers.Tokenizer.from_str(subwords.to_files()[0])
    definition.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", subwords.begin)]
    )
    definition.save(str(folder / "tokenizer.json"))
    theirs = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token="<|begin|>",
            eos_token="<|end|>",
            pad_token="<|end|>",
        ),
        batch_size=1,
        logits_cache=False,  # with it, an answer depends on what else is asked
    )
    parts = parts_of(load_checkpoint(Checkpoint(open_source(folder)), "F32"))
    model = object.__new__(Model)
    model.parts, model.names = parts, ("backbone",)
    model.tokenizer = SubwordTokenizer(subwords.to_files()[0], begin="<|begin|>", ends=["<|end|>"])
    return theirs, ComposableLM(model)


def draw_text(rng, longest):
    """Return some words, cut anywhere."""
    text = " ".join(rng.choice(WORDS, rng.integers(longest)))
    return text[: rng.integers(len(text) + 1)]


def test_200_requests_are_answered_as_the_harness_answers_them(harness):
    """Cut inside words, longer than the context, with spaces at the ends, and empty contexts."""
    from types import SimpleNamespace

    theirs, ours = harness
    rng = np.random.default_rng(0)
    requests, n_spanning = [], 0
    while len(requests) < 200:
        # One in eight fills or exceeds the context of 256.
        context = draw_text(rng, 250 if rng.random() < 1 / 8 else 12)
        continuation = draw_text(rng, 6)
        if not continuation:
            continue
        alone = context.rstrip() and theirs._encode_pair(context, continuation)[1]
        if alone == []:  # their own model fails; ours encodes the continuation alone
            n_spanning += 1
            continue
        requests.append(SimpleNamespace(args=(context, continuation)))
    assert n_spanning > 0
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests)
    for request, (nats, is_greedy), (our_nats, our_greedy) in zip(
        requests, expected, found, strict=True
    ):
        assert our_nats == pytest.approx(nats, abs=SAME_NATS), request.args
        assert our_greedy == is_greedy, request.args


@pytest.mark.parametrize("until", [None, [], "e", ["\n\n", "t"]])
@pytest.mark.parametrize("limit", [1, 8, 200])
def test_continuations_are_those_of_the_harness(harness, until, limit):
    from types import SimpleNamespace

    theirs, ours = harness
    rng = np.random.default_rng(limit)
    contexts = ["the of and to", draw_text(rng, 8) or "as", "the quick fox " * 60]

    def ask(stops, **others):
        settings = {"until": stops, "max_gen_toks": limit, "do_sample": False, **others}
        return [SimpleNamespace(args=(context, dict(settings))) for context in contexts]

    # Null means no stop string; their own model fails on it in this version.
    stops = [] if until is None else until
    # Ours never draws the begin token or an id without text, which a random model may.
    tokenizer = ours.model.tokenizer
    without_text = [tokenizer.begin, *range(tokenizer.vocab_size, 600)]
    expected = theirs.generate_until(ask(stops, suppress_tokens=without_text), disable_tqdm=True)
    assert ours.generate_until(ask(until)) == expected


@pytest.mark.parametrize("limit", [256, 257, 32768])
def test_no_room_for_the_prompt_is_refused_as_in_the_harness(harness, limit):
    from types import SimpleNamespace

    from composable.errors import InteropError

    theirs, ours = harness
    request = SimpleNamespace(args=("the of", {"until": ["@"], "max_gen_toks": limit}))
    with pytest.raises(AssertionError, match="must be less than"):
        theirs.generate_until([request], disable_tqdm=True)
    with pytest.raises(InteropError, match="leave no room for the prompt") as caught:
        ours.generate_until([request])
    assert caught.value.where == "generation_kwargs.max_gen_toks"
