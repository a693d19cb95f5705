"""Chat templates of known models, their special tokens, and the markup that they write.

A template is in `tests/interop/chat_templates/NAME.jinja`, as the model publishes it, but for some
parts on tools.
"""

from pathlib import Path

from composable.model.tokenizer import ChatFormat

FOLDER = Path(__file__).parents[1] / "interop" / "chat_templates"
_CHATML = {
    "system": ("<|im_start|>system\n", "<|im_end|>\n"),
    "user": ("<|im_start|>user\n", "<|im_end|>\n"),
    "assistant": ("<|im_start|>assistant\n", "<|im_end|>\n"),
}
_LLAMA3 = {
    "system": ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    "user": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "assistant": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
}
_DATED = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n"
)
# Template -> begin-of-sequence token, end-of-sequence token, begin of documents, markup.
MODELS = {
    "chatml": ("<s>", "</s>", "<s>", ChatFormat(**_CHATML)),
    "zephyr": (
        "<s>",
        "</s>",
        "<s>",
        ChatFormat(
            system=("<|system|>\n", "</s>\n"),
            user=("<|user|>\n", "</s>\n"),
            assistant=("<|assistant|>\n", "</s>\n"),
        ),
    ),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|begin_of_text|>", ChatFormat(**_LLAMA3)),
    "llama3_2": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        ChatFormat(**_LLAMA3 | {"system": (_DATED, "<|eot_id|>")}, preamble=f"{_DATED}<|eot_id|>"),
    ),
    "olmo2": (
        "<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
        ChatFormat(
            system=("<|system|>\n", "\n"),
            user=("<|user|>\n", "\n"),
            assistant=("<|assistant|>\n", "<|endoftext|>\n"),
        ),
    ),
    "gemma": (
        "<bos>",
        "<eos>",
        "<bos>",
        ChatFormat(
            user=("<start_of_turn>user\n", "<end_of_turn>\n"),
            assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        ),
    ),
    "qwen2_5": (
        None,
        "<|im_end|>",
        "<|endoftext|>",
        ChatFormat(
            **_CHATML,
            preamble="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
            "helpful assistant.<|im_end|>\n",
        ),
    ),
    "qwen3": (None, "<|im_end|>", "<|endoftext|>", ChatFormat(**_CHATML)),
    "smollm2": (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        ChatFormat(
            **_CHATML,
            preamble="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
            "Hugging Face<|im_end|>\n",
        ),
    ),
    "phi4": (
        "<|endoftext|>",
        "<|im_end|>",
        "<|endoftext|>",
        ChatFormat(
            system=("<|im_start|>system<|im_sep|>", "<|im_end|>"),
            user=("<|im_start|>user<|im_sep|>", "<|im_end|>"),
            assistant=("<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
        ),
    ),
}


def read_template(name):
    """Return the source of a model's template."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
