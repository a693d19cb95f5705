"""Generated text: tokens to characters, stop strings, and the turns of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from composable.errors import ModelError
from composable.files.text import check_text
from composable.model.composed import Parts
from composable.model.decoding import Decoder, Drawn, Mode
from composable.model.guard import Tally
from composable.model.sampling import Sampling
from composable.model.tokenizer import ChatFormat, Tokenizer

# Largest number of positions in a conversation, unless the context is shorter.
_CHAT_POSITIONS: Final = 2048


class Piece(NamedTuple):
    """Some text, and the router weights at the token that completed it."""

    text: str
    weight_E: np.ndarray


def to_pieces(
    drawn: Iterable[Drawn], tokenizer: Tokenizer, after: Sequence[int] | np.ndarray = ()
) -> Iterator[Piece]:
    """Yield text as its characters become complete.

    Args:
        drawn: Tokens with their router weights.
        tokenizer: The tokenizer that made them.
        after: The tokens that they continue.
    """
    stream, weight_E = tokenizer.stream(after), np.zeros(0)
    for token, weight_E in drawn:
        if text := stream.push(token):
            yield Piece(text, weight_E)
    if text := stream.finish():
        yield Piece(text, weight_E)


def stop_before(pieces: Iterable[Piece], stops: Sequence[str]) -> Iterator[Piece]:
    """Yield pieces up to the first of some strings, which is left out.

    Text that may be the start of such a string is held back until the next characters decide.

    Args:
        pieces: Text as it is generated.
        stops: Strings that end it, none of them empty.

    Raises:
        ModelError: For an empty string.
        TextError: For one with half of a character.
    """
    for stop in stops:
        check_text(stop, "stop")
    if not all(stops):
        raise ModelError("an empty string ends every text", where="stop")
    held: list[Piece] = []
    for piece in pieces:
        held.append(piece)
        text = "".join(p.text for p in held)
        n_unclear = max((_overlap(text, stop) for stop in stops), default=0)
        clear = len(text) - n_unclear
        # A stop string found may still turn out to lie inside one that starts earlier.
        if (found := _find_any(text, stops)) is not None and found <= clear:
            yield from _cut(held, found)
            return
        yield from _cut(held, clear)
        held = _drop(held, clear)
    found = _find_any("".join(p.text for p in held), stops)
    yield from held if found is None else _cut(held, found)


def _find_any(text: str, stops: Sequence[str]) -> int | None:
    """Return the offset of the first of some strings in a text, or None."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Return how many last characters of a text are the first of a stop string."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def _cut(pieces: Iterable[Piece], length: int) -> Iterator[Piece]:
    """Yield the first `length` characters of some pieces."""
    for text, weight_E in pieces:
        if length <= 0:
            return
        yield Piece(text[:length], weight_E)
        length -= len(text)


def _drop(pieces: Iterable[Piece], length: int) -> list[Piece]:
    """Return pieces without their first `length` characters."""
    rest = []
    for text, weight_E in pieces:
        if len(text) > length:
            rest.append(Piece(text[max(length, 0) :], weight_E))
        length -= len(text)
    return rest


class Conversation:
    """Turns of a user and a model, read once each: caches and router state are kept between them.

    Args:
        parts: The model.
        tokenizer: Its tokenizer, with a chat format.
        system: Instructions before the first turn.
        sampling: How tokens are drawn.
        mode: "mix" or "safe".
        report: Called with the guards' tally after every reply.

    Raises:
        ModelError: If the model has no chat markup, or takes no instructions.
        TextError: If the instructions do not fit.
    """

    def __init__(
        self,
        parts: Parts,
        tokenizer: Tokenizer,
        *,
        system: str = "",
        sampling: Sampling | None = None,
        mode: Mode = "mix",
        report: Callable[[Tally], None] | None = None,
    ) -> None:
        if tokenizer.chat is None:
            raise ModelError(
                "this backbone has no chat markup",
                hint="continue a text with `composable generate`; the card of an imported backbone "
                "gives the reason why it has none",
            )
        if system and tokenizer.chat.system is None:
            raise ModelError(
                "the conversations of this backbone have no place for instructions",
                where="system",
                hint="put them into the first message",
            )
        length = min(parts.backbone.cfg.context, _CHAT_POSITIONS)
        self._tokenizer, self._chat = tokenizer, tokenizer.chat
        self._decoder = Decoder(
            parts, tokenizer, length=length, sampling=sampling, mode=mode, report=report
        )
        self._decoder.feed([tokenizer.begin])
        self._n_replies = 0
        self._open = self._chat.preamble  # markup that is still to be read
        self._last: int | None = tokenizer.begin  # token that this markup may repeat
        if system and self._chat.system is not None:
            before, self._open = self._chat.system
            self._decoder.feed([*self._markup(before), *self._encode(system)])
            self._last = None

    def reply(self, text: str, max_tokens: int) -> Iterator[Piece]:
        """Yield the model's reply to a turn of the user.

        Args:
            text: The user's turn.
            max_tokens: Largest number of tokens in the reply.

        Raises:
            TextError: If turn and reply do not fit.
        """
        chat: ChatFormat = self._chat
        if self._n_replies:
            self._last = self._decoder.last
        opening = self._markup(self._open + chat.user[0])
        prompt = self._tokenizer.encode_markup(chat.user[1] + chat.assistant[0])
        turn = [*opening, *self._encode(text), *prompt]
        self._decoder.feed(turn)
        self._n_replies += 1
        self._open = chat.assistant[1]
        yield from to_pieces(
            self._decoder.draw(min(max_tokens, self._decoder.room)), self._tokenizer, turn
        )

    def _markup(self, text: str) -> list[int]:
        """Return the tokens of markup, without a first one that was read already.

        That is the start token, if the markup of the first turn has it too, or the token with which
        the model ended its turn itself.
        """
        tokens = self._tokenizer.encode_markup(text)
        return tokens[1:] if tokens and tokens[0] == self._last else tokens

    def _encode(self, text: str) -> list[int]:
        """Return the tokens of a turn's text; it is never read as markup."""
        tokens: list[int] = self._tokenizer.encode(text)[1:].tolist()
        return tokens
