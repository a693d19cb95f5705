import pytest

from composable.interop.chat import find_chat_format


@pytest.mark.parametrize(
    ("template", "user"),
    [
        ("{{'<|im_start|>' + role}} x {{'<|im_end|>'}}", "<|im_start|>user\n"),
        (
            "<|start_header_id|>{{role}}<|end_header_id|> <|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\n",
        ),
        ("{% if user %}<|user|>{% else %}<|assistant|>{% endif %}", "<|user|>\n"),
    ],
)
def test_known_markup_is_recognised(template, user):
    found = find_chat_format(template)
    assert found is not None
    assert found.user[0] == user


@pytest.mark.parametrize("template", [None, "", "[INST] {{ x }} [/INST]", "<|im_start|> alone"])
def test_unknown_markup_is_none(template):
    assert find_chat_format(template) is None
