"""Convert a checkpoint of another project into a backbone package.

Weights are written as they are read, one tensor at a time. The import adds what the router needs: a
class map, output bounds, and a scout of the backbone, trained on public text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np
import platformdirs
from flax import nnx

from composable.assembly.backbones import (
    LoadedBackbone,
    describe_backbone,
    load_backbone,
    make_interface,
)
from composable.assembly.compile_cache import use_compile_cache
from composable.corpora.documents import Document, read_documents, split_documents
from composable.corpora.recipe import cut_text, load_recipe, make_texts, shipped_folder
from composable.errors import InteropError
from composable.files.blobs import digest_file
from composable.files.safetensors import stream_tensors
from composable.interface import RouterInterface, TensorSpec, hash_classes, subword_router
from composable.interface.classes import MAX_CLASSES
from composable.interop.checkpoint import Checkpoint, open_source
from composable.interop.source import CheckpointSource
from composable.interop.tokenizer import check_round_trips, make_tokenizer
from composable.model.backbone import Backbone
from composable.model.config import BackboneConfig
from composable.model.scout import Scout
from composable.model.subwords import SubwordTokenizer
from composable.model.tensors import from_tensors, to_tensors
from composable.model.tokenizer import Tokenizer
from composable.packaging.manifests.backbone_folder import WEIGHTS_FILE
from composable.progress import CountProgress, StageProgress
from composable.training.data import token_stream
from composable.training.scouts import ScoutFit, train_scout
from composable.vetting.evaluation import path_scorer, score_documents
from composable.workflows.capacity import require_capacity
from composable.workflows.pretrain import output_bounds
from composable.workflows.trunk_cache import compute_features, cut_rows

# The anchor: bytes shipped of each held-out document, and number of documents.
_SHIPPED_BYTES: Final = 8192
_SHIPPED_DOCUMENTS: Final = 8
# Length of the windows that features are computed in.
_WINDOW: Final = 256


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """How a checkpoint is imported.

    Args:
        name: Name of the package and of its interface.
        version: Their version.
        tap: Number of trunk layers; by default a quarter, rounded up.
        dtype: Dtype that weights are stored in, "F32" or "BF16"; by default the one that keeps the
            source exact.
        compute_dtype: Dtype of the computation, "F32" or "BF16".
        begin: Token that begins a document; by default the one that the source declares.
        scout_width: Hidden width of the backbone's scout.
        scout_tokens: Number of tokens of public text that it is trained on, at most.
        scout_steps: Number of optimiser steps; 0 leaves it untrained.
        description: One line for the manifest.
        license: SPDX expression; by default the one that the source declares.
    """

    name: str
    version: str = "1.0.0"
    tap: int | None = None
    dtype: str | None = None
    compute_dtype: str = "F32"
    begin: str | None = None
    scout_width: int = 64
    scout_tokens: int = 200_000
    scout_steps: int = 1000
    description: str = ""
    license: str = ""


def import_backbone(
    path: Path,
    out: Path,
    plan: ImportPlan,
    train: Sequence[Document],
    heldout: Sequence[Document],
    *,
    cache: Path | None = None,
    progress: StageProgress | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint into a backbone package.

    Args:
        path: A Hugging Face folder or a GGUF file.
        out: Folder of the package.
        plan: How it is imported.
        train: Public text that the scout is trained on.
        heldout: Public text that the scout does not see: its start is the anchor, on which output
            bounds are measured.
        cache: Folder whose `features` caches trunk outputs; the user's cache folder by default.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The card.

    Raises:
        InteropError: If the checkpoint cannot be imported exactly, or does not fit into memory or
            on disk.
        TextError: If there is too little text.
    """
    use_compile_cache()
    show = progress or (lambda label, done, total: None)
    source = open_source(path)
    checkpoint = Checkpoint(source, tap=plan.tap, scout_width=plan.scout_width, dtype=plan.dtype)
    cfg = dataclasses.replace(checkpoint.cfg, dtype=plan.compute_dtype)
    tokenizer, chat = _read_tokenizer(source, plan.begin, cfg.vocab_size)
    require_capacity(checkpoint, out, cfg)
    anchor = _cut_anchor(heldout)
    round_trips = check_round_trips(tokenizer, [doc.text for doc in anchor])
    digests = {file.name: digest_file(file) for file in source.files}

    scout = _make_scout(checkpoint, digests, tokenizer, train, anchor, plan, cache, show)
    interface, describe = _write_package(out, checkpoint, cfg, tokenizer, anchor, scout, plan, show)
    card = {
        "backbone": f"{plan.name}@{plan.version}",
        "interface": {"name": plan.name, "digest": interface.digest},
        "source": {"family": checkpoint.family.name, "digests": digests},
        "model": _describe_model(checkpoint, cfg, (out / WEIGHTS_FILE).stat().st_size),
        "tokenizer": {"digest": tokenizer.digest, "round_trips": round_trips, "chat": chat},
        # Measured on the package as users load it, which also proves that it is complete.
        "measured": _measure(load_backbone(str(out)), anchor, show),
        "scout": scout.card,
        "measure_again": f"composable backbone import SOURCE --name {plan.name}",
    }
    card_text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    describe(texts={"README.md": _readme(plan.name, card), "card.json": card_text})
    return card


def _read_tokenizer(
    source: CheckpointSource, begin: str | None, vocab_size: int
) -> tuple[SubwordTokenizer, dict[str, Any]]:
    """Return the checkpoint's tokenizer, and the card's facts about its chat markup.

    Raises:
        InteropError: If it has more tokens than the model embeds.
    """
    reasons: list[str] = []
    tokenizer = make_tokenizer(source, begin, report=reasons.append)
    if tokenizer.vocab_size > vocab_size:
        raise InteropError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model embeds {vocab_size}",
            where=source.name,
            hint="use the tokenizer.json that the model was trained with; if tokens were added to "
            "it that have no embeddings, such as one for padding, remove them from added_tokens",
        )
    return tokenizer, {"is_recorded": not reasons, "reason": reasons[0] if reasons else None}


def _cut_anchor(heldout: Sequence[Document]) -> list[Document]:
    """Return the start of the first held-out documents: the text that the package ships."""
    return [
        Document(doc.id, cut_text(doc.text, _SHIPPED_BYTES)) for doc in heldout[:_SHIPPED_DOCUMENTS]
    ]


class _MadeScout(NamedTuple):
    """What an import adds to a checkpoint.

    Args:
        tensors: The class map and the scout.
        bounds: The output bound of every slot.
        card: The card's facts about the scout.
    """

    tensors: dict[str, np.ndarray]
    bounds: tuple[float, ...]
    card: dict[str, Any]


def _make_scout(
    checkpoint: Checkpoint,
    digests: Mapping[str, str],
    tokenizer: Tokenizer,
    train: Sequence[Document],
    anchor: Sequence[Document],
    plan: ImportPlan,
    cache: Path | None,
    show: StageProgress,
) -> _MadeScout:
    """Train the scout and measure output bounds; holds the model in memory while it does."""
    backbone = load_checkpoint(checkpoint, plan.compute_dtype)
    window = min(_WINDOW, backbone.cfg.context)
    features = compute_features(
        backbone,
        json.dumps([digests, plan.compute_dtype, plan.dtype]),
        cut_rows(token_stream(train, tokenizer), window, plan.scout_tokens),
        (cache or cache_folder()) / "features",
        partial(show, "features"),
    )
    fitted = train_scout(
        backbone.scout,
        features,
        steps=plan.scout_steps,
        progress=lambda step, steps, _: show("scout", step, steps),
    )
    backbone.scout = fitted.scout
    show("bounds", 0, len(anchor))
    bounds = output_bounds(backbone, anchor, tokenizer)
    show("bounds", len(anchor), len(anchor))
    return _MadeScout(
        _scout_tensors(np.asarray(backbone.class_map[...]), fitted.scout),
        bounds,
        _describe_scout(fitted, features.classes_BT.size),
    )


def _write_package(
    out: Path,
    checkpoint: Checkpoint,
    cfg: BackboneConfig,
    tokenizer: Tokenizer,
    anchor: Sequence[Document],
    scout: _MadeScout,
    plan: ImportPlan,
    show: StageProgress,
) -> tuple[RouterInterface, Callable[..., None]]:
    """Write a package with an empty card; return its interface and what writes README and card."""
    write_weights(out, checkpoint, scout.tensors, partial(show, "weights"))
    interface = make_interface(
        ChainMap(scout.tensors, checkpoint),  # type: ignore[arg-type]
        cfg,
        tokenizer,
        name=plan.name,
        version=plan.version,
        anchor=anchor,
        router=subword_router(),
        output_bounds=scout.bounds,
    )
    describe = partial(
        describe_backbone,
        out,
        interface,
        cfg,
        tokenizer,
        anchor=anchor,
        description=plan.description or f"Imported from a {checkpoint.family.name} checkpoint.",
        license_=plan.license or checkpoint.source.license,
    )
    describe(texts={"README.md": "", "card.json": "{}\n"})
    return interface, describe


def _scout_tensors(classes_V: np.ndarray, scout: Scout) -> dict[str, np.ndarray]:
    """Return the tensors that a checkpoint does not have: the class map and the scout."""
    named = {f"scout.{name}": array for name, array in to_tensors(scout, "F32").items()}
    return {"class_map": classes_V, **named}


def read_public_text(
    paths: Sequence[Path] = (), cache: Path | None = None
) -> tuple[list[Document], list[Document]]:
    """Return public text to train a scout on, and public text held out from it.

    Args:
        paths: Text files, JSON-lines files or folders of them; one document in sixteen is held
            out. By default the pinned text of `tiny-bytes` (State of the Union addresses), which
            is downloaded once.
        cache: Folder for the fetched text; the user's cache folder by default.

    Raises:
        TextError: If there is no text, or it cannot be downloaded.
    """
    if paths:
        return split_documents(read_documents(paths), 1 / 16, salt="public")
    folder = (cache or cache_folder()) / "public-text"
    if not all((folder / f"{part}.jsonl").is_file() for part in ("train", "heldout")):
        make_texts(load_recipe(shipped_folder("tiny-bytes")), folder)
    train, heldout = (read_documents([folder / f"{part}.jsonl"]) for part in ("train", "heldout"))
    return train, heldout


def load_checkpoint(checkpoint: Checkpoint, compute_dtype: str = "F32") -> Backbone:
    """Return a checkpoint as a model in memory, with its class map and an untrained scout.

    Args:
        checkpoint: The checkpoint.
        compute_dtype: Dtype of the computation, "F32" or "BF16".
    """
    cfg = dataclasses.replace(checkpoint.cfg, dtype=compute_dtype)
    classes_V = hash_classes(cfg.vocab_size)
    n_classes = min(MAX_CLASSES, cfg.vocab_size)
    scout = Scout(cfg.d_model, cfg.scout_width, n_classes, rngs=nnx.Rngs(0))
    extra = _scout_tensors(classes_V, scout)

    blank = nnx.eval_shape(lambda: Backbone(cfg, classes_V, n_classes, rngs=None))
    return from_tensors(blank, ChainMap(extra, checkpoint))  # type: ignore[arg-type]


def write_weights(
    out: Path,
    checkpoint: Checkpoint,
    extra: Mapping[str, np.ndarray],
    progress: CountProgress | None = None,
) -> None:
    """Write a package's weights, one tensor at a time.

    Args:
        out: Folder of the package.
        checkpoint: The tensors of the checkpoint.
        extra: Tensors that it does not have: the class map and the scout.
        progress: Called with the number of tensors written and the number in all.
    """
    dtypes = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32"}
    specs = {
        **checkpoint.specs,
        **{
            name: TensorSpec(shape=array.shape, dtypes=(dtypes[array.dtype],))
            for name, array in extra.items()
        },
    }
    done = 0

    def read(name: str) -> np.ndarray:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(specs))
        return extra[name] if name in extra else checkpoint[name]

    stream_tensors(out / WEIGHTS_FILE, specs, read)


def cache_folder() -> Path:
    """Return the user's cache folder, whose content can be recomputed."""
    return Path(platformdirs.user_cache_dir("composable", appauthor=False))


def _measure(
    loaded: LoadedBackbone, anchor: Sequence[Document], show: StageProgress
) -> dict[str, Any]:
    """Return what the package scores on the anchor."""
    model = loaded.plug()
    texts = [doc.text.encode() for doc in anchor]
    start = time.perf_counter()
    score = score_documents(
        path_scorer(model), texts, context=model.context, progress=partial(show, "score")
    )
    n_tokens = sum(len(loaded.tokenizer.encode(text)) - 1 for text in texts)
    return {
        "bits_per_byte": round(score.bits_per_byte, 5),
        "documents": len(texts),
        "bytes": int(score.n_bytes_B.sum()),
        "tokens": n_tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "device": jax.devices()[0].device_kind,
    }


def _describe_model(checkpoint: Checkpoint, cfg: BackboneConfig, n_bytes: int) -> dict[str, Any]:
    """Return the card's facts about the weights, of which the file has `n_bytes` bytes."""
    return {
        "parameters": sum(math.prod(spec.shape) for spec in checkpoint.specs.values()),
        "weights_bytes": n_bytes,
        "stored_as": checkpoint.dtype,
        "computed_in": cfg.dtype,
        "layers": cfg.n_layers,
        "tap": cfg.tap,
        "context": cfg.context,
        "vocabulary": cfg.vocab_size,
    }


def _describe_scout(fitted: ScoutFit, n_tokens: int) -> dict[str, Any]:
    bits = fitted.heldout_bits
    return {
        "tokens": n_tokens,
        "heldout_bits_per_class": None if bits is None else round(bits, 4),
        "uniform_bits_per_class": round(math.log2(fitted.scout.b_out[...].shape[0]), 4),
        "seconds": round(fitted.seconds, 1),
    }


def _readme(name: str, card: Mapping[str, Any]) -> str:
    model, measured = card["model"], card["measured"]
    return f"""# {name}

A backbone of {model["parameters"]:,} parameters, imported from a {card["source"]["family"]}
checkpoint: {model["layers"]} layers, of which the first {model["tap"]} are the trunk, context
{model["context"]:,}, {model["vocabulary"]:,} tokens. Weights are stored as {model["stored_as"]}.

It scores {measured["bits_per_byte"]:.3f} bits per byte on the anchor, {measured["bytes"]:,} bytes
of public text. `card.json` has the details of the measurement and the digests of the source,
`interface.json` is the contract that experts are trained against.
"""
