"""Convert a PEFT adapter into an expert: its body is unchanged, its scout is trained on a sample.

An adapter does not state which text it is for; the sample does. The scout learns to predict text
like the sample, so that such text is routed to the expert.
"""

from __future__ import annotations

import dataclasses
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, split_documents, truncate_utf8, write_documents
from composable.errors import InteropError, TextError
from composable.files import atomic
from composable.files.blobs import digest_file
from composable.files.folders import require_empty_folder
from composable.files.reading import read_bytes
from composable.files.records import format_record, parse_record
from composable.files.safetensors import write_tensors
from composable.interface import (
    RouterInterface,
    body_signature,
    canonical_json,
    digest_bytes,
    scout_signature,
)
from composable.interop.peft import Adapter, read_adapter
from composable.model.scout import Scout
from composable.model.tensors import to_tensors
from composable.packaging.manifests.backbone_folder import lists_file, read_listed
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    EXPERT_FILE,
    SCOUT_FILE,
    BackbonePackage,
    BodySpec,
    InterfaceNeed,
    Manifest,
    Origin,
    Training,
)
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.names import check_package_name
from composable.packaging.versions.version import Version
from composable.progress import StageProgress
from composable.training.data import token_stream
from composable.training.record import TrainingRecord
from composable.training.scouts import ScoutFit, train_scout
from composable.vetting.card import CARD_FILE
from composable.vetting.evaluation import path_scorer, score_documents
from composable.vetting.evidence import MAX_BYTES
from composable.workflows.import_backbone import cache_folder
from composable.workflows.trunk_cache import compute_features, cut_rows
from composable.workflows.workspace import (
    EXPORT_FILE,
    HELDOUT_FILE,
    HELDOUT_FRACTION,
    TRAINING_FILE,
    WORK,
)

# Length of the windows that features are computed in; a short sample has shorter ones.
_WINDOW: Final = 256
_MIN_ROWS: Final = 20
# Held-out documents that are scored.
_SCORED_DOCUMENTS: Final = 4


@dataclass(frozen=True, kw_only=True)
class _Source:
    digests: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class _BackboneCard:
    """What is read of the card of an imported backbone."""

    source: _Source | None = None


@dataclass(frozen=True, kw_only=True)
class _ExportedBackbone:
    interface: str


@dataclass(frozen=True, kw_only=True)
class _ExportRecord:
    """What is read of the record of an export."""

    layout: str
    backbone: _ExportedBackbone
    experts: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """How an adapter is imported.

    Args:
        name: Name of the expert.
        version: Its version.
        base: The base model that the adapter must name, as `NAME` or `NAME@REVISION`; by default
            any, unless it names a local folder whose files show that it is another model.
        scout_width: Hidden width of the scout; by default 64, or less if the interface requires it.
        scout_tokens: Tokens of the sample that the scout is trained on, at most.
        scout_steps: Number of optimiser steps.
        seed: Seed of the scout's weights and of the order of the text.
        license: SPDX expression.
    """

    name: str
    version: str = "1.0.0"
    base: str | None = None
    scout_width: int | None = None
    scout_tokens: int = 200_000
    scout_steps: int = 1000
    seed: int = 0
    license: str = ""


def import_adapter(
    loaded: LoadedBackbone,
    source: Path,
    out: Path,
    plan: AdapterPlan,
    sample: Sequence[Document],
    *,
    cache: Path | None = None,
    progress: StageProgress | None = None,
) -> dict[str, Any]:
    """Convert an adapter into an expert.

    Args:
        loaded: The backbone that the adapter was made for.
        source: Folder of the adapter.
        out: Folder of the expert, which must not exist or be empty.
        plan: How it is imported.
        sample: Text of the kind that the adapter is for. One document in ten is held out for
            `composable check`; of a single document, its last tenth.
        cache: Folder whose `features` caches trunk outputs; the user's cache folder by default.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        What was imported and what was measured.

    Raises:
        InteropError: If the adapter cannot be imported exactly, or was made for another model.
        InterfaceError: If the interface does not allow its rank.
        PackagingError: If `out` is not empty.
        TextError: If there is too little text.
    """
    show = progress or (lambda label, done, total: None)
    _check_target(plan, out)
    interface, cfg = loaded.interface, loaded.backbone.cfg
    adapter = read_adapter(source, cfg)
    is_verified = _check_base(loaded, adapter, plan.base)
    width = _check_sizes(interface, adapter.rank, plan.scout_width)

    train, heldout = split_sample(sample, plan.name)
    fitted, n_tokens = _train_scout(loaded, train, plan, width, cache, show)
    origin = _describe_origin(adapter, sample)
    package = BackbonePackage.read(loaded.folder)
    manifest = _make_manifest(
        plan, package.name, interface, adapter, origin, width, n_tokens, fitted.seconds
    )

    _write_package(out, manifest, adapter.body(cfg), fitted.scout)
    record = {
        "name": plan.name,
        "version": plan.version,
        "backbone": f"{package.name}@{package.version}",
        "origin": {**dataclasses.asdict(origin), "is_verified": is_verified},
        "body": _describe_body(adapter, 3 * len(cfg.slots)),
        "scout": _describe_scout(fitted, n_tokens),
        # Measured on the folder as users load it, which also proves that it is complete.
        "measured": _measure(loaded, out, heldout, show),
    }
    _write_work(out / WORK, heldout, len(train), n_tokens, fitted.seconds)
    atomic.write_text(out / "README.md", _readme(record, adapter.version))
    return record


def _check_target(plan: AdapterPlan, out: Path) -> None:
    """Reject an invalid name or version and a folder in use, before anything is trained."""
    check_package_name(plan.name, "name")
    Version(plan.version)
    require_empty_folder(out)


def _check_sizes(interface: RouterInterface, rank: int, scout_width: int | None) -> int:
    """Raise for a body or scout that the interface does not allow; return the scout's width."""
    width = scout_width or min(64, interface.scout_max_width)
    body_signature(interface, "lora", rank)
    scout_signature(interface, width)
    return width


def _describe_body(adapter: Adapter, n_matrices: int) -> dict[str, Any]:
    """Return the record's facts about the body, of an expert that may change `n_matrices`."""
    return {
        "rank": adapter.rank,
        "changed": sorted(f"{layer}.{matrix}" for layer, matrix in adapter.changes),
        "matrices": n_matrices,
    }


def _describe_scout(fitted: ScoutFit, n_tokens: int) -> dict[str, Any]:
    """Return the record's facts about a scout that was trained on `n_tokens` tokens."""
    bits = fitted.heldout_bits
    return {
        "tokens": n_tokens,
        "heldout_bits_per_class": None if bits is None else round(bits, 4),
        "seconds": round(fitted.seconds, 1),
    }


def _describe_origin(adapter: Adapter, sample: Sequence[Document]) -> Origin:
    """Return where an expert comes from: the digests of adapter and sample."""
    return Origin(
        format="peft",
        base=_name_base(adapter),
        config=adapter.config_digest,
        weights=adapter.weights_digest,
        sample=digest_bytes(canonical_json([document.text for document in sample])),
    )


def _name_base(adapter: Adapter) -> str:
    """Return the model that an adapter names, as `NAME` or `NAME@REVISION`."""
    return adapter.base + (f"@{adapter.revision}" if adapter.revision else "")


def _make_manifest(
    plan: AdapterPlan,
    backbone: str,
    interface: RouterInterface,
    adapter: Adapter,
    origin: Origin,
    scout_width: int,
    n_tokens: int,
    seconds: float,
) -> Manifest:
    """Return the manifest of the expert; its scout saw `n_tokens` tokens in `seconds` seconds."""
    return Manifest(
        name=plan.name,
        version=Version(plan.version),
        backbone=backbone,
        description=f"A PEFT adapter made for {adapter.base or backbone}."[:500],
        license=plan.license,
        interface=InterfaceNeed(
            name=interface.name,
            requires=Constraint(f"^{interface.version}"),
            digest=interface.digest,
        ),
        body=BodySpec(kind="lora", rank=adapter.rank),
        scout_width=scout_width,
        training=Training(
            data="The body is the adapter's; the scout was trained on a sample of text.",
            tokens=n_tokens,
            seconds=round(seconds, 1),
            seed=plan.seed,
            device=f"{jax.devices()[0].device_kind} ({platform.machine()})",
        ),
        origin=origin,
    )


def _write_package(
    folder: Path, manifest: Manifest, body: Mapping[str, np.ndarray], scout: Scout
) -> None:
    """Write the manifest and the tensors of an expert."""
    atomic.make_directory(folder)
    write_tensors(folder / BODY_FILE, body)
    write_tensors(folder / SCOUT_FILE, to_tensors(scout, "F32"))
    atomic.write_text(folder / EXPERT_FILE, manifest.to_toml())


def _write_work(
    folder: Path, heldout: Sequence[Document], n_documents: int, n_tokens: int, seconds: float
) -> None:
    """Write what is not published: held-out text, and how much text the scout was trained on."""
    atomic.make_directory(folder)
    write_documents(folder / HELDOUT_FILE, heldout)
    record = TrainingRecord(documents=n_documents, tokens=n_tokens, seconds=round(seconds, 1))
    atomic.write_text(folder / TRAINING_FILE, format_record(record))


def split_sample(sample: Sequence[Document], salt: str) -> tuple[list[Document], list[Document]]:
    """Return documents to train on and documents held out; a single document is cut in two.

    Raises:
        TextError: If there is no document, or a single one is too short to be cut.
    """
    if not sample:
        raise TextError("there is no sample of text to train the scout on")
    if len(sample) > 1:
        return split_documents(sample, HELDOUT_FRACTION, salt=salt)
    (only,) = sample
    at = int(len(only.text) * (1 - HELDOUT_FRACTION))
    begin, end = only.text[:at].strip(), only.text[at:].strip()
    if not begin or not end:
        raise TextError(f"a sample of {len(only.text)} characters is too short", where=only.id)
    return [Document(f"{only.id}#begin", begin)], [Document(f"{only.id}#end", end)]


def _check_base(loaded: LoadedBackbone, adapter: Adapter, wanted: str | None) -> bool:
    """Reject an adapter of another model; return whether it is shown to be made for this one.

    An adapter only names its model. Where the name is a local folder, its files are compared with
    those that the backbone was imported from or exported to.
    """
    said = _name_base(adapter)
    if wanted is not None:
        if wanted not in (said, adapter.base if adapter.revision is None else said):
            raise InteropError(
                f"the adapter was made for {said!r}, expected {wanted!r}",
                where="adapter_config.json: base_model_name_or_path",
            )
        return True
    folder = Path(adapter.base)
    try:
        is_local = bool(adapter.base) and folder.is_dir()
    except OSError:  # no name of a file, or one that must not be read
        is_local = False
    if not is_local:
        return False
    problem = "is neither the source of this backbone nor an export of it"
    exported = folder / EXPORT_FILE
    if exported.is_file():
        record = parse_record(_ExportRecord, read_bytes(exported), str(exported), InteropError)
        is_same = record.layout == "dense" and not record.experts
        if is_same and record.backbone.interface == loaded.interface.digest:
            return True
        problem = "is not an export of this backbone alone"
    elif lists_file(loaded.folder, CARD_FILE):
        where = str(loaded.folder / CARD_FILE)
        listed = read_listed(loaded.folder, CARD_FILE)
        card = parse_record(_BackboneCard, listed, where, InteropError)
        digests = None if card.source is None else card.source.digests
        files = sorted(folder.glob("[!.]*.safetensors"))
        if digests is None or not files:
            return False
        if digests == {file.name: digest_file(file) for file in files}:
            return True
    else:
        return False
    raise InteropError(
        f"{said!r} {problem}",
        where="adapter_config.json: base_model_name_or_path",
        hint=f"import that model and use it as the backbone; or, if its weights are the "
        f"same, confirm it with --base {shlex.quote(said)}",
    )


def _train_scout(
    loaded: LoadedBackbone,
    train: Sequence[Document],
    plan: AdapterPlan,
    width: int,
    cache: Path | None,
    show: StageProgress,
) -> tuple[ScoutFit, int]:
    """Return the scout and the number of tokens that it was trained on."""
    interface, cfg = loaded.interface, loaded.backbone.cfg
    stream_M = token_stream(train, loaded.tokenizer)
    window = max(1, min(_WINDOW, cfg.context, (len(stream_M) - 1) // _MIN_ROWS))
    rows_BU = cut_rows(stream_M, window, plan.scout_tokens)
    features = compute_features(
        loaded.backbone,
        f"{interface.trunk} {cfg.dtype}",
        rows_BU,
        (cache or cache_folder()) / "features",
        partial(show, "features"),
    )
    scout = Scout(cfg.d_model, width, interface.n_classes, rngs=nnx.Rngs(plan.seed))
    fitted = train_scout(
        scout,
        features,
        steps=plan.scout_steps,
        seed=plan.seed,
        progress=lambda step, steps, _: show("scout", step, steps),
    )
    return fitted, int(features.classes_BT.size)


def _measure(
    loaded: LoadedBackbone, folder: Path, heldout: Sequence[Document], show: StageProgress
) -> dict[str, Any]:
    """Return what backbone and expert, always on, score on the held-out sample."""
    expert = load_expert(loaded, folder)
    model = loaded.plug([expert])
    texts = [
        truncate_utf8(document.text.encode(), MAX_BYTES) for document in heldout[:_SCORED_DOCUMENTS]
    ]
    bits = {}
    for done, (label, name) in enumerate({"backbone": "backbone", "expert": expert.name}.items()):
        show("score", done, 2)
        score = score_documents(path_scorer(model, name), texts, context=model.context)
        bits[label] = round(score.bits_per_byte, 5)
    show("score", 2, 2)
    return {"bits_per_byte": bits, "documents": len(texts), "bytes": int(np.sum(score.n_bytes_B))}


def _readme(record: dict[str, Any], peft_version: str | None) -> str:
    body, origin, bits = record["body"], record["origin"], record["measured"]["bits_per_byte"]
    shown = (
        "Its files show that this is the model of the backbone."
        if origin["is_verified"]
        else f"That {record['backbone']} has the same weights was not verified."
    )
    return f"""# {record["name"]}

A PEFT adapter{f" (written by PEFT {peft_version})" if peft_version else ""} as an expert of
{record["backbone"]}. It was made for `{origin["base"] or "a model that it does not name"}`.
{shown}

The body is the adapter's, exactly: rank {body["rank"]}, {len(body["changed"])} of
{body["matrices"]} matrices changed, the scale folded in. The scout was trained on
{record["scout"]["tokens"]:,} tokens of a sample of text. On the part of the sample that was held
out the backbone scores {bits["backbone"]:.3f} bits per byte, and {bits["expert"]:.3f} with the
expert always on. `expert.toml` has the digests of the adapter and of the sample.
"""
