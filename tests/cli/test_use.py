"""`generate` and `chat`: with a project, without one, and what they refuse."""

import json
import os
from pathlib import Path

import platformdirs
import pytest

from composable.packaging import Project


@pytest.fixture
def project_of_noise(works, make_fakes, tiny_backbone):
    """Make a project on the backbone of noise with one expert; return its fakes."""
    fakes = make_fakes("registry", tiny_backbone)
    fakes.publish("german")
    works("init", "--backbone", tiny_backbone, "--registry", "registry")
    works("install", "german")
    return fakes


def test_generate_says_what_it_cannot_do(cli, works, project_of_noise):
    text = works("generate", "It was", "--max-tokens", 8).out
    assert text == works("generate", "It was", "--max-tokens", 8, "--experts", "german").out
    assert text.endswith("\n")

    outcome = cli("generate", "")
    assert outcome.code == 1
    assert "the text is empty" in outcome.err
    outcome = cli("generate", "x" * 120, "--max-tokens", 20)
    assert outcome.code == 1
    assert "do not fit the context of 128" in outcome.err
    assert "did you mean 'german'?" in cli("generate", "It was", "--experts", "germn").err


def flip(path):
    """Flip a bit of a file as a disk does: no time changes."""
    before = path.stat()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flipped_bit_is_found_before_the_load(cli, works, project_of_noise):
    text = works("generate", "It was", "--max-tokens", 8).out
    for name in ("scout.safetensors", "expert.toml"):
        flip(Project.find().environment.expert_path("german") / name)
        outcome = cli("generate", "It was", "--max-tokens", 8)
        assert outcome.code == 1
        assert f"{name}: is damaged or missing" in outcome.err
        assert "run `composable sync`" in outcome.err
        works("sync")
        assert works("generate", "It was", "--max-tokens", 8).out == text
    # Without a project the cache mends itself.
    works("generate", "It was", "--max-tokens", 8, "--experts", "german")
    for folder in Path(platformdirs.user_cache_dir("composable")).rglob("experts/german"):
        flip(folder / "scout.safetensors")
    assert works("generate", "It was", "--max-tokens", 8, "--experts", "german").out == text


def test_generate_outside_a_project(cli):
    outcome = cli("generate", "It was")
    assert outcome.code == 1
    assert "run `composable init`" in outcome.err


def test_generate_ends_where_it_is_told(works, project_of_noise):
    whole = works("generate", "It was", "--max-tokens", 12).out.rstrip("\n")
    stop = whole[4:6]
    cut = works("generate", "It was", "--max-tokens", 12, "--stop", stop).out.rstrip("\n")
    assert cut == whole[: whole.index(stop)]


def test_generate_takes_the_sampling_options(cli, works, project_of_noise):
    def generated(*options):
        return works("generate", "It was", "--max-tokens", 8, *options).out

    greedy = generated()
    for name, value in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert generated("--temperature", 1, name, value) == greedy
    assert generated("--repetition-penalty", 100) != greedy
    assert cli("generate", "It was", "--top-k", -1).code == 2
    outcome = cli("generate", "It was", "--min-p", 1.5)
    assert outcome.code == 1
    assert "min_p: 1.5 is not in [0, 1]" in outcome.err


def test_generate_tells_who_was_trusted(works, project_of_noise):
    made = works("generate", "It was", "--max-tokens", 8, "--json").json
    assert made["text"] == "".join(piece["text"] for piece in made["pieces"])
    for piece in made["pieces"]:
        assert sum(piece["weights"].values()) == pytest.approx(1, abs=1e-3)
        assert piece["weights"].keys() <= {"backbone", "german"}
    marked = works("generate", "It was", "--max-tokens", 8, "--show-routing").out
    assert marked.startswith(("[backbone]", "[german]"))
    plain = works("generate", "It was", "--max-tokens", 8).out
    assert marked.replace("[backbone]", "").replace("[german]", "") == plain


def test_generate_continues_every_prompt_of_a_file(cli, works, project_of_noise, tmp_path):
    (tmp_path / "prompts.txt").write_text("It was\n\nThen\n")
    lines = works("generate", "--prompts", "prompts.txt", "--max-tokens", 8).out.splitlines()
    made = [json.loads(line) for line in lines]
    assert [entry["prompt"] for entry in made] == ["It was", "Then"]
    alone = works("generate", "Then", "--max-tokens", 8).out
    assert made[1]["text"] + "\n" == alone
    routed = ("generate", "--prompts", "prompts.txt", "--max-tokens", 8, "--show-routing")
    marked = works(*routed).out.replace("[backbone]", "").replace("[german]", "")
    assert marked == "".join(f"{entry['prompt']}{entry['text']}\n" for entry in made)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "It was"}\n')
    again = works("generate", "--prompts", "prompts.jsonl", "--max-tokens", 8).out
    assert json.loads(again) == made[0]
    (tmp_path / "prompts.jsonl").write_text('{"text": "It was"}\n')
    outcome = cli("generate", "--prompts", "prompts.jsonl")
    assert outcome.code == 1
    assert "prompts.jsonl:1: no field 'prompt'" in outcome.err
    assert cli("generate").code == 2
    assert cli("generate", "It was", "--prompts", "prompts.txt").code == 2


def test_chat_needs_a_backbone_that_converses(cli, project_of_noise):
    options = ("--top-k", 40, "--min-p", 0.05, "--repetition-penalty", 1.1)
    for given in ((), options):
        outcome = cli("chat", *given)
        assert outcome.code == 1
        assert "no chat markup" in outcome.err
    assert "repetition_penalty: 0.0 is not positive" in cli("chat", "--repetition-penalty", 0).err


MARK = b"\xef\xbb\xbf"
HALF = "\ud83e"  # of an emoji
ESCAPED = b"\xef".decode(errors="surrogateescape")  # how Python keeps a Latin-1 byte


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.txt", MARK + b"The river\r\nThe stone\r\n"),
        ("p.txt", b"The river\rThe stone"),
        ("p.NDJSON", MARK + b'{"prompt": "The river"}\r\n{"prompt": "The stone"}\r\n'),
        ("p.JSONL", b'{"prompt": "The river"}\n\n{"prompt": "The stone"}'),
    ],
)
def test_prompts_are_read_as_they_are_meant(works, tiny_backbone, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    settings = ("--backbone", tiny_backbone, "--alone", "--max-tokens", 1)
    lines = works("generate", "--prompts", name, *settings).out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["The river", "The stone"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", b'{"prompt": "The \\ud83e"}', "half of a surrogate pair"),
        ("p.jsonl", b'{"prompt": null}', "expected a string"),
        ("p.txt", b'{"prompt": "The river"}', "JSON with the field 'prompt'"),
        ("p.txt", b"na\xefve", "not UTF-8 at byte 2"),
        ("p.txt", "The river".encode("utf-16"), "UTF-16"),
    ],
)
def test_prompts_that_are_something_else_are_refused(
    cli, tiny_backbone, tmp_path, name, data, message
):
    (tmp_path / name).write_bytes(data)
    outcome = cli("generate", "--prompts", name, "--backbone", tiny_backbone, "--alone")
    assert outcome.code == 1
    assert message in outcome.err
    assert name in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", f"Stra{ESCAPED}e"),
        ("generate", f"The {HALF}"),
        ("generate", "It was", "--stop", f"a{ESCAPED}"),
        ("chat", "--system", f"Be {ESCAPED}"),
        ("search", f"na{ESCAPED}ve"),
        ("new", "mine", "--backbone", f"na{ESCAPED}ve"),
        ("backbone", "import", "folder", "--name", "mine", "--license", f"{ESCAPED}"),
    ],
)
def test_arguments_that_are_not_text_are_refused(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.code == 1
    assert "UTF-8" in outcome.err
    assert "argument" in outcome.err


def test_a_file_may_have_a_name_that_is_not_text(works, tiny_backbone, tmp_path):
    folder = (tmp_path / tiny_backbone).rename(tmp_path / f"na{ESCAPED}ve")
    works("generate", "It was", "--backbone", folder, "--alone", "--max-tokens", 1)


def test_a_line_of_chat_that_is_not_text_is_refused(tiny_backbone, monkeypatch):
    import io
    import sys

    from composable.cli.use import _read_turn
    from composable.errors import TextError

    data = MARK + "größer\r\nna".encode() + b"\xefve\n\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert _read_turn() == "größer"
    with pytest.raises(TextError, match="not UTF-8 at byte 2") as caught:
        _read_turn()
    assert caught.value.where == "standard input"
    assert _read_turn() == ""
