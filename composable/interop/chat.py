"""How conversations are written: recognised by the markup that a chat template uses.

A template is a program; it is never run. A backbone package records the markup around each turn.
"""

from __future__ import annotations

from typing import Final

from composable.model.tokenizer import ChatFormat

# What a template must mention -> the format that it writes.
FORMATS: Final[tuple[tuple[tuple[str, ...], ChatFormat], ...]] = (
    (
        ("<|im_start|>", "<|im_end|>"),  # ChatML: SmolLM, Qwen
        ChatFormat(
            system=("<|im_start|>system\n", "<|im_end|>\n"),
            user=("<|im_start|>user\n", "<|im_end|>\n"),
            assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        ),
    ),
    (
        ("<|start_header_id|>", "<|eot_id|>"),  # Llama 3
        ChatFormat(
            system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
            user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ),
    ),
    (
        ("<|user|>", "<|assistant|>"),  # OLMo 2
        ChatFormat(
            system=("<|system|>\n", "\n"),
            user=("<|user|>\n", "\n"),
            assistant=("<|assistant|>\n", "<|endoftext|>\n"),
        ),
    ),
)


def find_chat_format(template: str | None) -> ChatFormat | None:
    """Return the format that a template writes, or None if it is none that is known."""
    for marks, chat in FORMATS:
        if template is not None and all(mark in template for mark in marks):
            return chat
    return None
