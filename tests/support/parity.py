"""A backbone of transformers, and the same one imported: how far apart are their logits?

PyTorch and transformers are imported by the functions that need them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# transformers reads it when it is imported; every file is local.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np

from composable.interface import RouterInterface, subword_router
from composable.interop.checkpoint import Checkpoint, open_source
from composable.model.backbone import Backbone
from composable.model.bank import empty_bank
from composable.model.composed import Parts
from composable.model.mix import mix, mix_state
from composable.workflows.import_backbone import load_checkpoint

SIZES = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Larger than usual, so that logits are of order 1 and a difference shows.
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Family -> (classes of transformers, config).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, "rope_parameters": LLAMA3}),
    "smollm": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 32}),
    "olmo2": ("Olmo2", SIZES),
}
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
N_TOKENS, N_PREFILLED = 160, 128


def make_random(name: str, folder: Path, dtype: str) -> None:
    """Save a random model of a family, norms and all, in a dtype."""
    import torch
    import transformers

    kind, config = FAMILIES[name]
    torch.manual_seed(0)
    cls = getattr(transformers, f"{kind}ForCausalLM")
    model = cls(getattr(transformers, f"{kind}Config")(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one, which would hide that they are there
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def run_theirs(folder: Path, dtype: str, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return transformers' logits: of a whole pass, and prefilled and decoded token by token."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    tokens = torch.from_numpy(tokens_BT).long()
    with torch.inference_mode():
        whole = model(tokens).logits
        cache = transformers.DynamicCache(config=model.config)
        pieces = [model(tokens[:, :N_PREFILLED], cache=cache).logits]
        rest = range(N_PREFILLED, tokens.shape[1])
        pieces += [model(tokens[:, t : t + 1], cache=cache).logits for t in rest]
    return whole.float().numpy(), torch.cat(pieces, 1).float().numpy()


def run_ours(folder: Path, dtype: str, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the same from the imported backbone, by the composed model that users run."""
    parts = parts_of(load_checkpoint(Checkpoint(open_source(folder)), DTYPES[dtype]))
    step = jax.jit(mix)
    whole_BTV, _ = step(parts, tokens_BT, mix_state(parts, tokens_BT.shape[0]))
    state = mix_state(parts, tokens_BT.shape[0], tokens_BT.shape[1])
    out_BTV, state = step(parts, tokens_BT[:, :N_PREFILLED], state)
    pieces = [np.asarray(out_BTV)]
    for t in range(N_PREFILLED, tokens_BT.shape[1]):
        out_BTV, state = step(parts, tokens_BT[:, t : t + 1], state)
        pieces.append(np.asarray(out_BTV))
    return np.asarray(whole_BTV), np.concatenate(pieces, axis=1)


def parts_of(backbone: Backbone) -> Parts:
    """Return a composed model of a backbone alone; its interface names digests that nobody has."""
    cfg, nobody = backbone.cfg, "sha256:" + "0" * 64
    interface = RouterInterface(
        **{"name": "parity", "version": "1.0.0"},
        **dict.fromkeys(("backbone", "trunk", "tokenizer", "class_map", "anchor"), nobody),
        vocab_size=cfg.vocab_size,
        n_classes=backbone.scout.b_out[...].shape[0],
        d_model=cfg.d_model,
        d_ff=cfg.d_ff,
        tap=cfg.tap,
        slots=cfg.slots,
        output_bounds=(1e4,) * len(cfg.slots),
        **vars(subword_router()),
    )
    return Parts(backbone=backbone, bank=empty_bank(backbone, interface, 1), interface=interface)


def compare(folder: Path, dtype: str, tokens_BT: np.ndarray) -> dict[str, Any]:
    """Return how far ours is from theirs."""
    theirs, theirs_cached = run_theirs(folder, dtype, tokens_BT)
    ours, ours_cached = run_ours(folder, dtype, tokens_BT)
    log_p, log_q = (np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (theirs, ours))
    row = {
        "dtype": dtype,
        "max_abs_logit_diff": _figure(np.abs(ours - theirs).max()),
        "kl": _figure((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "cached_decode_max_diff": _figure(np.abs(ours_cached - theirs_cached).max()),
        "same_likeliest": _figure((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "logit_std": _figure(theirs.std()),
        "tokens": int(tokens_BT.size),
    }
    exact, _ = run_theirs(folder, "float64", tokens_BT)
    row["their_rounding"] = _figure(np.abs(theirs - exact).max())
    row["our_rounding"] = _figure(np.abs(ours - exact).max())
    return row


def _figure(value: Any) -> float:
    return float(f"{float(value):.3g}")


def random_tokens(vocab_size: int) -> np.ndarray:
    """Return two random documents."""
    return np.random.default_rng(0).integers(2, vocab_size, (2, N_TOKENS), dtype=np.int32)


def compare_family(name: str, dtype: str, folder: Path) -> dict[str, Any]:
    """Make a random model of a family and compare."""
    make_random(name, folder, dtype)
    return compare(folder, dtype, random_tokens(SIZES["vocab_size"]))
