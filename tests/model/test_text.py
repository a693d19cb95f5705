import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from composable.errors import ModelError, TextError
from composable.model.decoding import Decoder, continue_tokens
from composable.model.text import Conversation, Piece, stop_before, to_pieces
from composable.model.tokenizer import ByteTokenizer, ChatFormat

WEIGHTS = np.array([1.0])


def stopped(texts, stops):
    pieces = stop_before((Piece(text, WEIGHTS) for text in texts), stops)
    return [piece.text for piece in pieces]


@example(texts=["ba", "b"], stops=["a", "bab"])
@example(texts=["ba", "a"], stops=["a", "bab"])
@given(
    texts=st.lists(st.text("ab", max_size=3), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_the_first_stop_string_however_it_is_cut(texts, stops):
    whole = "".join(texts)
    ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert "".join(stopped(texts, stops)) == whole[: min(ends, default=len(whole))]


def test_only_what_may_begin_a_stop_string_is_held_back():
    seen = []

    def make():
        for text in ("one ", "tw", "o S", "TO", "x STOP y"):
            seen.append(text)
            yield Piece(text, WEIGHTS)

    shown = [(piece.text, len(seen)) for piece in stop_before(make(), ["STOP"])]
    assert shown == [("one ", 1), ("tw", 2), ("o ", 3), ("S", 5), ("TO", 5), ("x ", 5)]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ModelError, match="empty"):
        stopped(["a"], [""])


class Chatty(ByteTokenizer):
    """ASCII, taught to converse: a turn of the model's ends with a line."""

    vocab_size = 128
    chat = ChatFormat(system=("!", "\n"), user=(">", "\n"), assistant=("<", "\n"))
    ends = (ord("\n"),)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model(tiny.expert("a"))


def test_a_conversation_is_the_text_of_its_turns(model):
    """Each reply is what one long prompt with all turns before it would give."""
    tokenizer = Chatty()
    talk = Conversation(model.parts, tokenizer, system="be kind")
    text = "!be kind\n"
    for message in ("hello", "and now"):
        text += f">{message}\n<"
        reply = "".join(piece.text for piece in talk.reply(message, 6))
        expected = "".join(piece.text for piece in continue_text(model, tokenizer, text, 6))
        assert reply == expected
        text += reply + "\n"


def test_a_preamble_comes_first_unless_there_are_instructions(model):
    class Prefaced(Chatty):
        chat = dataclasses.replace(Chatty.chat, preamble="?none\n")

    for system, start in (("", "?none\n"), ("be kind", "!be kind\n")):
        talk = Conversation(model.parts, Prefaced(), system=system)
        reply = "".join(piece.text for piece in talk.reply("hello", 6))
        expected = continue_text(model, Prefaced(), f"{start}>hello\n<", 6)
        assert reply == "".join(piece.text for piece in expected)


def test_a_begin_token_of_the_first_turn_is_not_read_twice(model, monkeypatch):
    class Doubled(Chatty):
        def encode_markup(self, text):
            return [self.begin if char == "^" else ord(char) for char in text]

        chat = dataclasses.replace(Chatty.chat, user=("^>", "\n"))

    fed = []
    feed = Decoder.feed
    monkeypatch.setattr(Decoder, "feed", lambda self, t: fed.append([*t]) or feed(self, t))
    talk = Conversation(model.parts, Doubled())
    for _ in range(2):
        list(talk.reply("hi", 1))
    assert fed[:2] == [[0], [ord(char) for char in ">hi\n<"]]
    assert fed[2][-6:] == [0, *(ord(char) for char in ">hi\n<")]


def test_instructions_without_a_place_are_refused(model):
    class Plain(Chatty):
        chat = dataclasses.replace(Chatty.chat, system=None)

    with pytest.raises(ModelError, match="no place for instructions"):
        Conversation(model.parts, Plain(), system="be kind")


def continue_text(model, tokenizer, text, n_tokens):
    tokens_T = tokenizer.encode(text)
    return to_pieces(continue_tokens(model.parts, tokenizer, tokens_T, n_tokens), tokenizer)


def test_conversing_with_a_backbone_without_a_chat_template_is_refused(model):
    with pytest.raises(ModelError, match="no chat markup"):
        model.converse()


@pytest.mark.parametrize("half", ["\ud83e", "\udd8a", "\udcef"])
def test_half_a_character_is_neither_encoded_nor_waited_for(half):
    with pytest.raises(TextError):
        ByteTokenizer().encode(f"The {half}")
    with pytest.raises(TextError) as caught:
        list(stop_before([], [".", half]))
    assert caught.value.where == "stop"
