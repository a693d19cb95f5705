"""Text as it is made: tokens to characters, up to a stop string, and turns of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from composable.errors import ModelError
from composable.model.composed import Parts
from composable.model.decoding import Decoder, Drawn, Mode, Sampling
from composable.model.guard import Tally
from composable.model.tokenizer import ChatFormat, Tokenizer

# Positions that a conversation may take, unless the context is shorter.
_CHAT_POSITIONS: Final = 2048


class Piece(NamedTuple):
    """Some text, and the router weights at the token that completed it."""

    text: str
    weight_E: np.ndarray


def to_pieces(drawn: Iterable[Drawn], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yield text as it becomes whole."""
    stream, weight_E = tokenizer.stream(), np.zeros(0)
    for token, weight_E in drawn:
        if text := stream.push(token):
            yield Piece(text, weight_E)
    if text := stream.finish():
        yield Piece(text, weight_E)


def stop_before(pieces: Iterable[Piece], stops: Sequence[str]) -> Iterator[Piece]:
    """Yield pieces up to the first of some strings, which is left out.

    What may be the start of such a string is held back until it is clear.

    Args:
        pieces: Text as it is made.
        stops: Strings that end it, none of them empty.

    Raises:
        ModelError: For an empty string.
    """
    if not all(stops):
        raise ModelError("an empty string ends every text", where="stop")
    held: list[Piece] = []
    for piece in pieces:
        held.append(piece)
        text = "".join(p.text for p in held)
        n_unclear = max((_overlap(text, stop) for stop in stops), default=0)
        clear = len(text) - n_unclear
        # One that is there may yet prove to be inside one that begins earlier.
        if (found := _find_any(text, stops)) is not None and found <= clear:
            yield from _cut(held, found)
            return
        yield from _cut(held, clear)
        held = _drop(held, clear)
    found = _find_any("".join(p.text for p in held), stops)
    yield from held if found is None else _cut(held, found)


def _find_any(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first of some strings begins in a text, or None."""
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
        tokenizer: Its tokenizer, which says how turns are written.
        system: Instructions that come before the first turn.
        sampling: How tokens are drawn.
        mode: "mix" or "safe".
        report: Called with the guards' tally after every reply.

    Raises:
        ModelError: If the model was not taught any way of conversing.
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
                "this backbone was not taught to converse",
                hint="continue a text with `composable generate`, or import an instruct model",
            )
        length = min(parts.backbone.cfg.context, _CHAT_POSITIONS)
        self._tokenizer, self._chat = tokenizer, tokenizer.chat
        self._decoder = Decoder(
            parts, tokenizer, length=length, sampling=sampling, mode=mode, report=report
        )
        self._decoder.feed([tokenizer.begin])
        self._open = ""  # markup of the last turn that is still to be read
        if system:
            self._decoder.feed(self._turn(self._chat.system, system))

    def reply(self, text: str, max_tokens: int) -> Iterator[Piece]:
        """Yield the model's reply to a turn of the user's.

        Raises:
            TextError: If turn and reply do not fit.
        """
        chat: ChatFormat = self._chat
        closing = self._tokenizer.encode_markup(self._open)
        if closing and closing[0] == self._decoder.last:
            closing = closing[1:]  # the model ended its turn itself
        tokens = [
            *closing,
            *self._turn(chat.user, text),
            *self._tokenizer.encode_markup(chat.assistant[0]),
        ]
        self._decoder.feed(tokens)
        self._open = chat.assistant[1]
        drawn = self._decoder.draw(min(max_tokens, self._decoder.room))
        yield from to_pieces(drawn, self._tokenizer)

    def _turn(self, markup: tuple[str, str], text: str) -> list[int]:
        """Return the tokens of a turn: what a speaker says is text and never markup."""
        before, after = markup
        tokenizer = self._tokenizer
        said = tokenizer.encode(text)[1:].tolist()
        return [*tokenizer.encode_markup(before), *said, *tokenizer.encode_markup(after)]
