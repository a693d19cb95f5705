"""Chat templates become markup: how a template writes a few conversations shows it.

A template is a program. It is rendered at import only, with limits, on conversations of sentinel
texts. The markup between them is what a backbone package records, once it has been shown to
reproduce every rendering exactly. A template that does more than surround texts by markup is not
recorded, and the reason is given: nothing is guessed. Texts of later conversations are written as
they are; a template that trims them is followed only for texts without space around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from composable.errors import InteropError
from composable.interop.chat_rendering import Rendering, render_template
from composable.model.tokenizer import ChatFormat

_SYSTEM: Final = "Instruction: be\nbrief & naïve."
# Texts by turn, the user's first. None may occur in another, or in a template.
_TEXTS: Final = (
    "Question α:\n1 < 2?",
    'Reply β, "so" it\'s.',
    "Question γ {two}?",
    "Reply δ\n\nagain.",
    "Question ε, three?",
)
_SHOWN: Final = 60  # characters of markup that a message quotes


def derive_chat_format(
    template: str | None, *, begin: str, bos: str | None = None, eos: str | None = None
) -> ChatFormat:
    """Return the markup that a chat template writes around each turn.

    A conversation is read as a document, so the token that begins documents comes first, whether or
    not the template writes it.

    Args:
        template: The Jinja2 source, or None if the checkpoint has none.
        begin: The token that begins a document.
        bos: The checkpoint's begin-of-sequence token, if one is declared.
        eos: Its end-of-sequence token, if one is declared.

    Returns:
        The markup. `system` is None if the template does not write instructions as a turn.

    Raises:
        InteropError: With the reason why markup cannot express the template.

    Example:
        >>> chat = derive_chat_format(
        ...     "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        ...     "{% if add_generation_prompt %}<assistant>{% endif %}",
        ...     begin="<s>",
        ...     eos="</s>",
        ... )
        >>> chat.user, chat.assistant
        (('<user>', '</s>'), ('<assistant>', '</s>'))
    """
    if template is None:
        raise InteropError(
            "the checkpoint has no chat template, or none that is named 'default'",
            where="chat_template",
        )
    plain, instructed, tail = _render(template, bos, eos)
    found: list[ChatFormat] = []
    reasons: list[InteropError] = []
    # A begin token at the start is read anyway. In most templates it is not part of the first turn.
    starts = [begin] if all(text.startswith(begin) for text in (*plain, *instructed)) else []
    for start in (*starts, ""):
        try:
            found.append(
                _derive(
                    [text.removeprefix(start) for text in plain],
                    [text.removeprefix(start) for text in instructed],
                    tail,
                )
            )
        except InteropError as error:
            reasons.append(error)
    if found:
        # A closing that ends with the begin token has taken it from the opening of the next turn.
        clean = [chat for chat in found if not chat.assistant[1].endswith(begin)]
        return (clean or found)[0]
    raise reasons[0]


def write_conversation(
    chat: ChatFormat, texts: Sequence[str], *, system: str | None = None, is_prompt: bool = True
) -> str:
    """Return a conversation as markup writes it, without the begin token.

    Args:
        chat: The markup.
        texts: Texts by turn, the user's first; the last one is the user's.
        system: Instructions, if any.
        is_prompt: Whether the markup that a reply continues comes at the end.

    Raises:
        ValueError: For instructions that the markup cannot express.

    Example:
        >>> chat = ChatFormat(user=("<u>", "\\n"), assistant=("<a>", "\\n"))
        >>> write_conversation(chat, ["Hello."])
        '<u>Hello.\\n<a>'
    """
    written = chat.preamble
    if system is not None:
        if chat.system is None:
            raise ValueError("the markup has no place for instructions")
        written = system.join(chat.system)
    for i, text in enumerate(texts):
        written += text.join(chat.assistant if i % 2 else chat.user)
    return written + (chat.assistant[0] if is_prompt else "")


def _render(template: str, bos: str | None, eos: str | None) -> tuple[list[str], list[str], str]:
    """Return how a template writes the probes.

    Returns:
        Conversations without instructions: one, two and three questions, each without and with a
        generation prompt. The same with instructions, or none if it fails on those. And what it
        writes after a reply that ends a conversation.
    """
    roles = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(_TEXTS)]
    system = [{"role": "system", "content": _SYSTEM}]
    probes: list[dict[str, Any]] = [
        {"messages": before + roles[:n], "add_generation_prompt": is_prompt}
        for before in ([], system)
        for n in (1, 3, 5)
        for is_prompt in (False, True)
    ]
    probes.append({"messages": roles[:2], "add_generation_prompt": False})
    special = {"bos_token": bos, "eos_token": eos}
    variables = {name: token for name, token in special.items() if token is not None}
    rendered = render_template(template, probes, {**variables, "tools": None, "documents": None})
    plain, instructed, (ended,) = rendered[:6], rendered[6:12], rendered[12:]
    for rendering in (*plain, ended):
        if rendering.error is not None:
            raise InteropError(f"the template fails: {rendering.error}", where="chat_template")
    is_instructed = all(_holds(rendering, _SYSTEM) for rendering in instructed)
    return (
        [rendering.text for rendering in plain],
        [rendering.text for rendering in instructed] if is_instructed else [],
        _split(ended.text, _TEXTS[:2])[-1],
    )


def _holds(rendering: Rendering, text: str) -> bool:
    return rendering.error is None and rendering.text.count(text) == 1


def _derive(plain: Sequence[str], instructed: Sequence[str], tail: str) -> ChatFormat:
    """Return markup that reproduces all renderings.

    Args:
        plain: Renderings without instructions, as `_render` returns them, without begin token.
        instructed: Those with instructions.
        tail: What follows a reply that ends a conversation: its closing, or the start of it.

    Raises:
        InteropError: If there is no such markup.
    """
    first, user_end = _split(plain[0], _TEXTS[:1])
    prompt = _remove_start(_split(plain[1], _TEXTS[:1])[1], user_end)
    between = _split(plain[2], _TEXTS[:3])[2]  # the closing of a reply, and the opening of a turn
    if between.endswith(first):
        preamble, user_start = "", first
    else:  # before the first turn there is more than its opening
        user_start = _remove_start(between, tail)
        preamble = _remove_end(first, user_start)
    reply_end = _remove_end(between, user_start)
    chat = ChatFormat(user=(user_start, user_end), assistant=(prompt, reply_end), preamble=preamble)
    _check(chat, plain, None)
    if not instructed:
        return chat
    try:
        start, end = _split(instructed[0], (_SYSTEM, _TEXTS[0]))[:2]
        system = (start, _remove_end(end, user_start))
        full = ChatFormat(
            system=system, user=chat.user, assistant=chat.assistant, preamble=preamble
        )
        _check(full, instructed, _SYSTEM)
    except InteropError:
        return chat  # instructions are written in another way than as a turn before the first
    return full


def _check(chat: ChatFormat, renderings: Sequence[str], system: str | None) -> None:
    """Raise an InteropError unless markup reproduces the renderings of `_render`."""
    for i, rendered in enumerate(renderings):
        texts = _TEXTS[: 2 * (i // 2) + 1]
        written = write_conversation(chat, texts, system=system, is_prompt=bool(i % 2))
        if written != rendered:
            pairs = enumerate(zip(written, rendered, strict=False))
            shorter = min(len(written), len(rendered))
            at = next((k for k, (ours, theirs) in pairs if ours != theirs), shorter)
            raise InteropError(
                f"turns are not all written in the same way: after {written[:at][-_SHOWN:]!r} the "
                f"template writes {rendered[at : at + _SHOWN]!r}, expected "
                f"{written[at : at + _SHOWN]!r}",
                where="chat_template",
            )


def _split(rendered: str, texts: Sequence[str]) -> list[str]:
    """Return the markup before, between and after texts, which must occur once and in order."""
    parts, rest = [], rendered
    for text in texts:
        before, found, rest = rest.partition(text)
        if not found or text in rest:
            raise InteropError(
                "the template does not write each text as it is, once and in order; it changes, "
                f"drops, repeats or moves {text!r}",
                where="chat_template",
            )
        parts.append(before)
    return [*parts, rest]


def _remove_start(markup: str, start: str) -> str:
    if not markup.startswith(start):
        raise InteropError(
            f"a turn is written differently at the end of a conversation: {markup[:_SHOWN]!r} does "
            f"not start with {start[:_SHOWN]!r}",
            where="chat_template",
        )
    return markup[len(start) :]


def _remove_end(markup: str, end: str) -> str:
    if not markup.endswith(end):
        raise InteropError(
            f"a turn is written differently at the start of a conversation: {markup[-_SHOWN:]!r} "
            f"does not end with {end[-_SHOWN:]!r}",
            where="chat_template",
        )
    return markup[: len(markup) - len(end)]
