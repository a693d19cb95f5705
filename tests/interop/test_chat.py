"""Markup derived from chat templates: exact for known models, and a reason for all others."""

import json

import pytest

from composable.errors import InteropError
from composable.interop import limited_process
from composable.interop.chat import derive_chat_format, write_conversation
from composable.interop.chat_rendering import Rendering, render_template
from composable.interop.hf_tokenizer import tokenizer_files
from composable.interop.huggingface import open_folder
from composable.interop.source import CheckpointSource, SourceTokenizer
from composable.interop.tokenizer import make_tokenizer
from composable.model.subwords import SubwordTokenizer
from tests.support.chat_models import FOLDER, MODELS, read_template

CHATML = read_template("chatml")
TEXTS = ["Who?", "I.", "And\n\nnow? <b>", "Still I.", "Good."]


PROMPT = {"add_generation_prompt": True}


def speak(texts, system=None):
    """Return messages of a user and a model in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def derive(template, bos="<s>", eos="</s>", begin="<s>"):
    return derive_chat_format(template, begin=begin, bos=bos, eos=eos)


def refused(template, match, **tokens):
    with pytest.raises(InteropError, match=match) as caught:
        derive(template, **tokens)
    assert caught.value.where == "chat_template"
    return caught.value


@pytest.mark.parametrize("name", MODELS)
def test_the_markup_of_known_models(name):
    bos, eos, begin, expected = MODELS[name]
    assert derive(read_template(name), bos, eos, begin) == expected


@pytest.mark.parametrize("name", MODELS)
def test_markup_writes_what_the_template_writes(name):
    """Other texts than those that the markup was derived from, of up to three turns."""
    bos, eos, begin, chat = MODELS[name]
    systems = (None, "Be brief.") if chat.system else (None,)
    cases = [(n, system) for n in (1, 3, 5) for system in systems]
    conversations = [{"messages": speak(TEXTS[:n], system), **PROMPT} for n, system in cases]
    special = {"eos_token": eos} | ({} if bos is None else {"bos_token": bos})
    for (n, system), found in zip(
        cases, render_template(read_template(name), conversations, special), strict=True
    ):
        assert found.error is None
        written = write_conversation(chat, TEXTS[:n], system=system)
        assert found.text in (written, begin + written)


def test_every_template_here_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == {*MODELS, "llama2"}


def test_a_prompt_that_differs_from_earlier_replies_is_refused():
    """Llama 2 writes a space before replies that its generation prompt does not have."""
    refused(read_template("llama2"), "not all written in the same way")


def test_a_begin_token_before_every_turn_is_markup():
    chat = derive(
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[{{ m.content }}]"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    assert (chat.user, chat.assistant) == (("<s>[", "]"), ("", "</s>"))


def test_a_begin_token_that_is_the_first_mark_of_every_turn_is_markup():
    assert derive(CHATML, bos="<|im_start|>", begin="<|im_start|>") == MODELS["chatml"][3]


def test_another_begin_of_sequence_token_comes_before_the_first_turn():
    chat = derive("{{ bos_token }}" + CHATML, begin="<|endoftext|>")
    assert chat.preamble == "<s>"
    assert chat.system[0] == "<s><|im_start|>system\n"
    assert (chat.user, chat.assistant) == (MODELS["chatml"][3].user, MODELS["chatml"][3].assistant)


def test_there_is_no_markup_without_a_template():
    refused(None, "no chat template")
    refused("", "does not write each text")


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('not for you') }}", "the template fails: not for you"),
        ("{% for m in messages %}", "the template fails: Unexpected end of template"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ strftime_now('%Y') }}" + CHATML, "'strftime_now' is undefined"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "does not write each"),
        (CHATML.replace("message['content']", "message['content'] | e"), "does not write each"),
        (CHATML.replace("message['content']", "message['content'] * 2"), "does not write each"),
        ("{{ messages | tojson }}", "does not write each"),
        (CHATML + "{% if messages | length > 4 %}!{% endif %}", "not all written in the same way"),
        ("{{ messages | length }}" + CHATML, "not all written in the same way"),
        (
            CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>"),
            "not all written in the same way",
        ),
        ("{{ [''] * 999 + ['x'] | random }}" + CHATML, "No filter named 'random'"),
        ("{{ messages.__class__.__base__.__subclasses__() }}" + CHATML, "unsafe"),
        ("{{ '\\ud800' }}" + CHATML, "surrogates not allowed"),
        ("x" * (1 << 16) + CHATML, "at most 65,536"),
    ],
)
def test_what_markup_cannot_express_is_refused_with_the_reason(template, match):
    refused(template, match)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ 'x' * 10 ** 12 }}", "memory"),
        ("{{ '%1000000000000d' % 1 }}", "memory"),
        (
            "{% set s = namespace(x='x') %}"
            "{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
            "memory",
        ),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}0123456789{% endfor %}", "more than 65,536 characters"),
        ("{{ " + "(" * 30_000 + " }}", "deep|stopped"),
        ("{{ 9 ** (9 ** 9) }}", r"stopped \(exit status -"),
        (
            "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
            r"stopped \(exit status -",
        ),
    ],
)
def test_a_hostile_template_is_stopped(template, match):
    refused(template + CHATML, match)


def test_a_process_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(limited_process, "MAX_CLOCK_SECONDS", 0.01)
    (rendering,) = render_template("x", [{"messages": []}], {})
    assert rendering == Rendering("", "it was stopped after 0 s")


def test_a_message_of_a_template_is_cut():
    error = refused("{{ raise_exception('x' * 5000) }}", "x" * 200)
    assert len(error.message) < 250


def test_tags_and_functions_that_transformers_knows():
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}{% endgeneration %}</a>"
        "{% else %}<{{ {'r': m.role} | tojson }}>{{ m.content }}|{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    chat = derive(template)
    assert chat.user == ('<{"r": "user"}>', "|")
    assert chat.assistant == ("<a>", "</a>")


def test_instructions_without_a_place_in_markup_are_refused():
    chat = MODELS["gemma"][3]
    with pytest.raises(ValueError, match="no place for instructions"):
        write_conversation(chat, ["Who?"], system="Be brief.")


@pytest.mark.parametrize("name", MODELS)
def test_the_template_of_an_exported_tokenizer_writes_the_same_markup(subwords, name):
    definition, _ = subwords.to_files()
    chat = MODELS[name][3]
    tokenizer = SubwordTokenizer(definition, begin="<|begin|>", ends=["<|end|>"], chat=chat)
    config = json.loads(tokenizer_files(tokenizer)["tokenizer_config.json"])
    assert derive(config["chat_template"], "<|begin|>", "<|end|>", "<|begin|>") == chat


def declare(folder, template):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return open_folder(folder).tokenizer.chat_template


def test_of_named_templates_the_default_counts(write_checkpoint):
    folder, _ = write_checkpoint("llama")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    assert declare(folder, named) == CHATML
    assert declare(folder, named[:1]) is None
    assert declare(folder, CHATML) == CHATML
    assert declare(folder, [3, None]) is None
    (folder / "chat_template.jinja").write_text("in a file: é", encoding="utf-8")
    assert declare(folder, named) == "in a file: é"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InteropError, match="cannot be read"):
        open_folder(folder)


def test_a_tokenizer_without_markup_reports_the_reason(subwords):
    definition, _ = subwords.to_files()
    reasons = []

    def make(template):
        found = SourceTokenizer(
            definition=definition,
            begin="<|begin|>",
            ends=("<|end|>",),
            bos="<|begin|>",
            eos="<|end|>",
            chat_template=template,
        )
        source = CheckpointSource(
            name="x", files=(), is_gguf=False, config={}, tensors={}, tokenizer=found, license=""
        )
        return make_tokenizer(source, report=reasons.append)

    assert make(CHATML).chat == MODELS["chatml"][3]
    assert reasons == []
    assert make("{{ raise_exception('no') }}").chat is None
    assert reasons == ["chat_template: the template fails: no"]
