import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composable.errors import ModelError, TextError
from composable.model.subwords import SubwordTokenizer
from composable.model.tokenizer import ByteTokenizer, ChatFormat
from tests.support.subword_kinds import BLANK, KINDS

TEXTS = (
    "The quick brown fox; 12,345 jumps.\n\n  Indented\tand tabbed.",
    "Füße, naïve, œuvre, Straße",
    "Съешь же ещё этих мягких французских булок",
    "いろはにほへと ちりぬるを 天地玄黃",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 👩‍👩‍👧",
    "  leading and trailing  ",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_exactly(subwords, text):
    assert subwords.decode(subwords.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=60))
def test_any_text_comes_back_exactly_and_streams_as_it_decodes(subwords, text):
    tokens_T = subwords.encode(text)
    assert tokens_T[0] == subwords.begin
    assert tokens_T.dtype == np.int32
    assert subwords.decode(tokens_T) == text
    stream = subwords.stream()
    pieces = [stream.push(int(token)) for token in tokens_T[1:]]
    assert "".join(pieces) + stream.finish() == text


def test_text_that_spells_a_special_token_stays_text(subwords):
    text = "before <|end|> after <|begin|>"
    tokens_T = subwords.encode(text)
    assert (tokens_T == subwords.begin).sum() == 1
    assert not set(subwords.ends) & set(tokens_T.tolist())
    assert subwords.decode(tokens_T) == text


def test_markup_may_hold_special_tokens(subwords):
    assert subwords.encode_markup("a<|end|>")[-1] == subwords.ends[0]
    assert subwords.decode(subwords.encode_markup("a<|end|>")) == "a"


def test_files_bring_the_same_tokenizer_back(subwords):
    again = SubwordTokenizer.from_files(*subwords.to_files())
    assert again == subwords
    assert hash(again) == hash(subwords)
    assert again.digest == subwords.digest
    assert again != ByteTokenizer()


def test_the_digest_depends_only_on_settings_that_decide_tokens(subwords):
    definition, _ = subwords.to_files()
    spaced = json.dumps(json.loads(definition), indent=4)
    chat = ChatFormat(system=("", ""), user=("", ""), assistant=("", ""))
    assert SubwordTokenizer(spaced, begin="<|begin|>", chat=chat).digest == subwords.digest
    assert SubwordTokenizer(definition, begin="<|end|>").digest != subwords.digest
    data = json.loads(definition)
    data["model"]["merges"] = data["model"]["merges"][:-1]
    assert SubwordTokenizer(json.dumps(data), begin="<|begin|>").digest != subwords.digest


def test_chat_markup_without_new_fields_is_stored_unchanged(subwords):
    """What 0.1.0 wrote is read, and written back to the byte."""
    definition, _ = subwords.to_files()
    pairs = {"system": ["<s>", "\n"], "user": ["<u>", "\n"], "assistant": ["<a>", "\n"]}
    stored = {"begin": "<|begin|>", "ends": ["<|end|>"], "chat": pairs}
    text = json.dumps(stored, indent=2, ensure_ascii=False) + "\n"
    read = SubwordTokenizer.from_files(definition, text)
    assert read.chat == ChatFormat(**{role: tuple(pair) for role, pair in pairs.items()})
    assert read.to_files() == (definition, text)


@pytest.mark.parametrize("extra", [{"preamble": "<s>none\n"}, {"system": ("<s>", "\n")}, {}])
def test_a_preamble_and_no_place_for_instructions_can_be_stored(subwords, extra):
    definition, _ = subwords.to_files()
    chat = ChatFormat(user=("<u>", "\n"), assistant=("<a>", "\n"), **extra)
    stored = SubwordTokenizer(definition, begin="<|begin|>", chat=chat).to_files()
    assert SubwordTokenizer.from_files(*stored).chat == chat
    assert json.loads(stored[1])["chat"].keys() == {"user", "assistant", *extra}
    later = stored[1].replace('"user"', '"later"')
    with pytest.raises(ModelError, match=r"chat\.later: unknown field"):
        SubwordTokenizer.from_files(definition, later)


def test_what_cannot_be_read_is_refused(subwords):
    definition, special = subwords.to_files()
    with pytest.raises(TextError, match="empty"):
        subwords.encode("")
    with pytest.raises(TextError, match="UTF-8 at byte 1"):
        subwords.encode(b"a\xff")
    with pytest.raises(TextError, match="half of a surrogate pair"):
        subwords.encode("The \ud83e")
    with pytest.raises(ModelError, match="'<s>' is not a token"):
        SubwordTokenizer(definition, begin="<s>")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        SubwordTokenizer("{}", begin="<|begin|>")
    with pytest.raises(ModelError, match="special_tokens"):
        SubwordTokenizer.from_files(definition, special.replace('"chat"', '"gossip"'))


@pytest.fixture(params=["byte-level", *KINDS])
def any_kind(request, subwords):
    """Return a tokenizer of each kind."""
    if request.param == "byte-level":
        return subwords
    return SubwordTokenizer(KINDS[request.param](), begin="<|begin|>", ends=["<|end|>"])


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_exactly_whatever_the_kind(any_kind, text):
    text = f".{text}"  # the blank before a first word is SentencePiece's own
    tokens_T = any_kind.encode(text)
    assert any_kind.decode(tokens_T) == text
    assert tokens_T.max() < any_kind.vocab_size


@settings(max_examples=100, deadline=None)
@given(text=st.text("\n .aé€日\U0001f469", min_size=1, max_size=30), data=st.data())
def test_a_continuation_streams_what_it_adds_to_the_text(any_kind_of_module, text, data):
    """Cut anywhere between whole characters, prompt and stream are the text."""
    text = f".{text}"
    for tokenizer in any_kind_of_module:
        tokens_T = tokenizer.encode(text).tolist()
        cut = data.draw(st.integers(1, len(tokens_T)))
        prompt = tokenizer.decode(tokens_T[:cut])
        if not text.startswith(prompt):
            continue  # cut within a character
        stream = tokenizer.stream(tokens_T[:cut])
        pieces = [stream.push(token) for token in tokens_T[cut:]]
        assert prompt + "".join(pieces) + stream.finish() == text


@pytest.fixture(scope="module")
def any_kind_of_module(subwords):
    made = [SubwordTokenizer(make(), begin="<|begin|>") for make in KINDS.values()]
    return [subwords, *made]


@pytest.mark.parametrize("kind", KINDS)
def test_the_blank_of_a_first_word_is_kept_after_a_prompt_only(kind):
    tokenizer = SubwordTokenizer(KINDS[kind](), begin="<|begin|>")
    river = tokenizer.encode("river")[1:].tolist()
    assert tokenizer.decode(river) == "river"
    for prompt, expected in (("the", " river"), ("€", " river"), ("", "river")):
        after = tokenizer.encode(prompt) if prompt else [tokenizer.begin]
        stream = tokenizer.stream(after)
        assert "".join(stream.push(token) for token in river) + stream.finish() == expected


def test_settings_of_training_do_not_cut_or_pad_texts(subwords):
    data = json.loads(subwords.to_files()[0])
    data["truncation"] = {
        **{"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    }
    data["padding"] = {
        **{"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 1, "pad_type_id": 0, "pad_token": "<|end|>"},
    }
    data["model"]["dropout"] = 0.9
    tokenizer = SubwordTokenizer(json.dumps(data), begin="<|begin|>")
    text = "the quick brown foxes and the river"
    np.testing.assert_array_equal(tokenizer.encode(text), subwords.encode(text))


def test_a_definition_that_fails_on_its_first_text_is_refused():
    data = json.loads(KINDS["unigram"]())
    data["model"] |= {"vocab": [[BLANK, -1.0]], "unk_id": None, "byte_fallback": False}
    data["added_tokens"] = []
    with pytest.raises(ModelError, match="not a tokenizer"):
        SubwordTokenizer(json.dumps(data), begin=BLANK)


def test_an_expression_that_takes_forever_is_an_error_and_no_panic(subwords):
    data = json.loads(subwords.to_files()[0])
    pattern = {"Regex": "(a+)+$"}
    data["pre_tokenizer"] = {
        **{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    }
    tokenizer = SubwordTokenizer(json.dumps(data), begin="<|begin|>")
    assert len(tokenizer.encode("aaa")) > 1
    with pytest.raises(ModelError, match="fails on this text"):
        tokenizer.encode("a" * 30 + "b")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"begin": 1}, "begin"),
        ({"ends": "<|end|>"}, "ends"),
        ({"ends": [1]}, "ends"),
        ({"chat": []}, "chat"),
        ({"chat": {"user": ["<u>", "\n"]}}, "chat.assistant"),
        ({"chat": {"user": ["<u>"], "assistant": ["<a>", ""]}}, "chat.user"),
        ({"chat": {"user": ["<u>", ""], "assistant": ["<a>", 1]}}, "chat.assistant"),
        ({"later": 1}, "later"),
    ],
)
def test_special_tokens_of_another_type_are_refused_by_their_field(subwords, change, field):
    definition, special = subwords.to_files()
    with pytest.raises(ModelError) as caught:
        SubwordTokenizer.from_files(definition, json.dumps({**json.loads(special), **change}))
    assert caught.value.where == f"special_tokens.{field}"
    for text in ("[]", "{", "[" * 100_000):
        with pytest.raises(ModelError):
            SubwordTokenizer.from_files(definition, text)
