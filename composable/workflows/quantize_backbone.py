"""Write a backbone as another release whose matrices take fewer bytes, and measure what that costs.

The new release has digests of its own, so it is another backbone to every expert. Experts that were
trained for the original plug into it only if it honours them, which whoever quantizes it decides.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.assembly.backbones import (
    LoadedBackbone,
    describe_backbone,
    digests,
    load_backbone,
    make_blank,
)
from composable.corpora.documents import Document
from composable.errors import ModelError
from composable.files.safetensors import write_tensors
from composable.interface import RouterInterface
from composable.kernels import quantize
from composable.model.backbone import Backbone
from composable.model.config import BackboneConfig
from composable.model.tensors import shapes_of, to_tensors
from composable.packaging.manifests.backbone_folder import WEIGHTS_FILE
from composable.packaging.manifests.manifest import BackbonePackage
from composable.progress import CountProgress, StageProgress

# Tokens of each document of the anchor that both backbones are compared on.
_COMPARED: Final = 256


def quantize_backbone(
    source: str,
    out: Path,
    *,
    dtype: str = "I8",
    name: str | None = None,
    is_honouring: bool = False,
    progress: StageProgress | None = None,
) -> dict[str, Any]:
    """Write a backbone package with quantized matrices.

    Args:
        source: Name of a backbone that ships with composable, or the folder of one.
        out: Folder of the new package.
        dtype: "I8", with a scale for each output, or "BF16".
        name: Name of the new package and its interface; by default the source's and the dtype.
        is_honouring: Whether experts that plug into the source plug into it, too.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The card, with what was measured beside the source.

    Raises:
        ModelError: If the source is quantized already, or does not compute in float32.
    """
    show = progress or (lambda label, done, total: None)
    exact = load_backbone(source)
    if exact.backbone.cfg.matrix_dtype is not None:
        raise ModelError(
            f"the matrices are kept in {exact.backbone.cfg.matrix_dtype} already",
            where=str(exact.folder),
            hint="quantize the release that it was made from",
        )
    cfg = dataclasses.replace(exact.backbone.cfg, matrix_dtype=dtype)
    tensors = quantize_tensors(exact.backbone, cfg, partial(show, "weights"))
    write_tensors(out / WEIGHTS_FILE, tensors)
    old = exact.interface
    interface = dataclasses.replace(
        old,
        name=name or f"{old.name}-{'int8' if dtype == 'I8' else 'bf16'}",
        **digests(tensors, cfg),
        honours=(*old.honours, old.digest) if is_honouring else (),
    )
    package = BackbonePackage.read(exact.folder)
    describe = partial(
        describe_backbone,
        out,
        interface,
        cfg,
        exact.tokenizer,
        anchor=exact.anchor,
        description=f"{old.name} {old.version} with matrices of {dtype}.",
        license_=package.license,
    )
    describe(texts={"README.md": "", "card.json": "{}\n"})
    # Measured on the package as users load it, which also proves that it is complete.
    card = _make_card(exact, load_backbone(str(out)), show)
    card_text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    describe(texts={"README.md": _readme(interface, card), "card.json": card_text})
    return card


def quantize_tensors(
    backbone: Backbone, cfg: BackboneConfig, progress: CountProgress | None = None
) -> dict[str, np.ndarray]:
    """Return the tensors of a backbone with quantized matrices.

    Args:
        backbone: The backbone.
        cfg: Its architecture, with the type of the matrices.
        progress: Called with the number of tensors done and the number in all.
    """
    shapes = shapes_of(make_blank(cfg, backbone.scout.b_out[...].shape[0]))
    tensors = to_tensors(backbone)
    for done, (name, w) in enumerate(list(tensors.items())):
        if progress:
            progress(done + 1, len(shapes))
        if f"{name}.values" not in shapes:
            continue
        del tensors[name]
        scale_shape = shapes.get(f"{name}.scale", ())
        # A scale has one number for each output: the other dimensions are inputs.
        inputs = tuple(i for i, n in enumerate(scale_shape) if n == 1)
        kept = quantize(jnp.asarray(w), str(cfg.matrix_dtype), inputs)
        values = np.asarray(kept.values)
        tensors[f"{name}.values"] = values if kept.scale is not None else values.view(jnp.bfloat16)
        if kept.scale is not None:
            tensors[f"{name}.scale"] = np.asarray(kept.scale)
    return tensors


def _make_card(
    exact: LoadedBackbone, quantized: LoadedBackbone, show: StageProgress
) -> dict[str, Any]:
    """Return the card: what it was made from, and what was measured beside that."""
    new, old = quantized.interface, exact.interface
    return {
        "backbone": f"{new.name}@{new.version}",
        "interface": {"name": new.name, "digest": new.digest},
        "source": {
            "backbone": f"{old.name}@{old.version}",
            "interface": old.digest,
            "is_honoured": new.honours_digest(old.digest),
        },
        "model": {
            "matrices": quantized.backbone.cfg.matrix_dtype,
            "weights_bytes": (quantized.folder / WEIGHTS_FILE).stat().st_size,
            "source_bytes": (exact.folder / WEIGHTS_FILE).stat().st_size,
        },
        "measured": compare_backbones(exact, quantized, exact.anchor, show),
        "measure_again": f"composable backbone quantize {old.name} --to {_option_of(quantized)}",
    }


def compare_backbones(
    exact: LoadedBackbone,
    other: LoadedBackbone,
    documents: Sequence[Document],
    progress: StageProgress | None = None,
) -> dict[str, Any]:
    """Return how far one backbone's predictions are from another's.

    Args:
        exact: The backbone that is compared with.
        other: One with the same tokens and classes.
        documents: Text; the start of each is read.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        Means over tokens: the KL divergence from the exact predictions, in nats; the loss of
        either, in nats; and the loss of either's scout, in nats per class, which routing is made
        of.
    """
    show = progress or (lambda label, done, total: None)
    sums, n_tokens = np.zeros(5), 0
    for done, document in enumerate(documents):
        tokens_BT = np.asarray(exact.tokenizer.encode(document.text), np.int32)[None, :_COMPARED]
        if tokens_BT.shape[1] < 2:
            continue
        log_p_TV, class_p_T = _predict(exact.backbone, tokens_BT)
        log_q_TV, class_q_T = _predict(other.backbone, tokens_BT)
        targets_T = tokens_BT[0, 1:]
        at = (np.arange(len(targets_T)), targets_T)
        kl_T = (np.exp(log_p_TV) * (log_p_TV - log_q_TV)).sum(-1)
        sums += [kl_T.sum(), -log_p_TV[at].sum(), -log_q_TV[at].sum(), class_p_T, class_q_T]
        n_tokens += len(targets_T)
        show("compare", done + 1, len(documents))
    names = ("kl", "source_loss", "loss", "source_scout_loss", "scout_loss")
    means = (sums / n_tokens).round(5).tolist()
    return {**dict(zip(names, means, strict=True)), "tokens": n_tokens}


def _predict(backbone: Backbone, tokens_BT: np.ndarray) -> tuple[np.ndarray, float]:
    """Return log-probabilities of the tokens after the first, TV, and the scout's summed loss."""
    log_prob_BTV, class_log_prob_BTC, classes_BT = _run(backbone, jnp.asarray(tokens_BT))
    classes_T = np.asarray(classes_BT)[0, 1:]
    scout_loss = -np.asarray(class_log_prob_BTC)[0, np.arange(len(classes_T)), classes_T].sum()
    return np.asarray(log_prob_BTV, np.float64)[0, :-1], float(scout_loss)


@nnx.jit
def _run(backbone: Backbone, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_BTD, _ = backbone.trunk(tokens_BT)
    class_log_prob_BTC = backbone.scout(backbone.features(x_BTD))
    logits_BTV, _ = backbone.upper(x_BTD, backbone.own_feed_forward)
    classes_BT = backbone.class_map[...][tokens_BT]
    return jax.nn.log_softmax(logits_BTV), class_log_prob_BTC, classes_BT


def _option_of(quantized: LoadedBackbone) -> str:
    return "int8" if quantized.backbone.cfg.matrix_dtype == "I8" else "bf16"


def _readme(interface: RouterInterface, card: Mapping[str, Any]) -> str:
    measured, model, source = card["measured"], card["model"], card["source"]
    experts = "plug in" if source["is_honoured"] else "do not plug in"
    return f"""# {interface.name}

{source["backbone"]} with matrices of {model["matrices"]}: {model["weights_bytes"]:,} bytes of
weights instead of {model["source_bytes"]:,}. Experts of the original {experts}.

Its predictions differ from the original's by a KL divergence of {measured["kl"]:.4f} nats per
token, measured on {measured["tokens"]:,} tokens of the anchor. `card.json` has the details.
"""
