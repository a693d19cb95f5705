"""`generate` and `chat`: with a project, without one, and what they refuse."""

import json

import pytest


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


def test_generate_outside_a_project(cli):
    outcome = cli("generate", "It was")
    assert outcome.code == 1
    assert "run `composable init`" in outcome.err


def test_generate_ends_where_it_is_told(works, project_of_noise):
    whole = works("generate", "It was", "--max-tokens", 12).out.rstrip("\n")
    stop = whole[4:6]
    cut = works("generate", "It was", "--max-tokens", 12, "--stop", stop).out.rstrip("\n")
    assert cut == whole[: whole.index(stop)]


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
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "It was"}\n')
    again = works("generate", "--prompts", "prompts.jsonl", "--max-tokens", 8).out
    assert json.loads(again) == made[0]
    (tmp_path / "prompts.jsonl").write_text('{"text": "It was"}\n')
    outcome = cli("generate", "--prompts", "prompts.jsonl")
    assert outcome.code == 1
    assert "prompts.jsonl: cannot read prompts" in outcome.err
    assert cli("generate").code == 2
    assert cli("generate", "It was", "--prompts", "prompts.txt").code == 2


def test_chat_needs_a_backbone_that_converses(cli, project_of_noise):
    outcome = cli("chat")
    assert outcome.code == 1
    assert "no chat markup" in outcome.err
