"""Render chat templates, which are programs of other people, in a process with limits.

The template runs in Jinja2's sandbox, without access to files or to attributes that lead out of it,
with the settings that transformers uses. `limited_process` bounds time and memory, which a sandbox
does not. The length of templates and of renderings is bounded here. Nothing bounds what a rendering
says; `interop.chat` checks that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from composable.interop.limited_process import MAX_BYTES, StoppedError, run_limited

if TYPE_CHECKING:
    from jinja2 import Environment, Template

MAX_TEMPLATE: Final = 1 << 16  # characters; long templates of known models have about 2 ** 14
MAX_RENDERING: Final = 1 << 16  # characters
_MAX_MESSAGE: Final = 200  # characters of an error that a template raises


class Rendering(NamedTuple):
    """The text that a template wrote, or why there is none.

    Args:
        text: The text; empty after an error.
        error: The error, if any.
    """

    text: str
    error: str | None = None


def render_template(
    template: str,
    conversations: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
) -> list[Rendering]:
    """Render a template once per conversation, in a process of its own.

    Args:
        template: The Jinja2 source.
        conversations: What differs between renderings: `messages` and `add_generation_prompt`.
        variables: What all renderings share, such as `bos_token`.

    Returns:
        A rendering for every conversation, in order. Where the process had to be stopped, all of
        them have that error.

    Example:
        >>> conversation = {"messages": [{"role": "user", "content": "Hello."}]}
        >>> render_template("{{ messages[0].content }}{{ eos_token }}", [conversation], {
        ...     "eos_token": "</s>"
        ... })
        [Rendering(text='Hello.</s>', error=None)]
    """

    def fail(error: str) -> list[Rendering]:
        return [Rendering("", error)] * len(conversations)

    if len(template) > MAX_TEMPLATE:
        return fail(f"it has {len(template):,} characters, at most {MAX_TEMPLATE:,} are rendered")
    job = {"template": template, "conversations": conversations, "variables": variables}
    try:
        return [Rendering(*entry) for entry in run_limited(render_all, job)]
    except StoppedError as error:
        return fail(f"it was {error}")


def render_all(job: dict[str, Any]) -> list[Rendering]:
    """Return the renderings of a job: its `template`, `conversations` and `variables`."""
    template: Template | None = None

    def render(conversation: dict[str, Any]) -> str:
        nonlocal template
        if template is None:
            template = _environment().from_string(job["template"])
        text = ""
        for part in template.generate(**job["variables"], **conversation):
            text += part
            if len(text) > MAX_RENDERING:
                raise ValueError(f"it writes more than {MAX_RENDERING:,} characters")
        text.encode()  # raises for half a character, which no file can hold
        return text

    return [_attempt(partial(render, conversation)) for conversation in job["conversations"]]


def _attempt(render: Callable[[], str]) -> Rendering:
    try:
        return Rendering(render())
    except MemoryError:
        error = f"it needs more than {MAX_BYTES >> 20} MiB of memory"
    except RecursionError:
        error = "it is nested too deeply"
    except Exception as caught:  # a template can raise whatever its expressions can
        error = str(caught) or type(caught).__name__
    return Rendering("", error[:_MAX_MESSAGE])


def _environment() -> Environment:
    """Return a sandbox with the settings, tags and functions that transformers gives templates.

    `strftime_now` is left undefined: markup is stored once, and must not depend on the day. Many
    templates that ask for the date have one of their own for this case.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag `generation`, which marks what a model wrote; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 -- as the base class declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            """Return what is inside of the tag."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    # What draws differs between two renderings, or only seldom, and cannot be markup.
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals["raise_exception"] = raise_exception
    return environment
