"""Export a composed model as a Hugging Face folder, with a record of what is lost.

Three things can be exported: the backbone alone, one expert always on, and a mixture. The first two
compute the same as here. A mixture has the same bodies, but a router of another kind; its rows are
fitted on text, and the loss is measured on text that the fit did not see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import ml_dtypes  # noqa: F401 -- teaches NumPy the name bfloat16
import numpy as np

import composable
from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document, split_documents, truncate_utf8
from composable.errors import InteropError
from composable.files import atomic
from composable.files.folders import require_empty_folder
from composable.files.safetensors import MAX_TENSORS, TensorFile, read_header, stream_tensors
from composable.interface import TensorSpec
from composable.interop.hf_export import (
    DENSE,
    Layout,
    TensorPart,
    dense_config,
    dense_pieces,
    find_layout,
    mixture_config,
    mixture_pieces,
    split_pieces,
)
from composable.interop.hf_tokenizer import tokenizer_files
from composable.interop.layer_router import expert_names, fit_rows, layered_scorer, observe
from composable.model.bank import merge_entry
from composable.model.config import DTYPE_NAMES
from composable.model.model import Model
from composable.packaging.manifests.backbone_folder import WEIGHTS_FILE
from composable.packaging.manifests.manifest import BackbonePackage, Manifest
from composable.progress import StageProgress
from composable.vetting.evaluation import mix_scorer, path_scorer, score_documents
from composable.workflows.import_peft import split_sample
from composable.workflows.workspace import EXPORT_FILE

# Numbers of documents that routers are fitted on, and that measure them.
_FITTED_DOCUMENTS: Final = 32
_SCORED_DOCUMENTS: Final = 8
_SCORED_BYTES: Final = 4096
_MAX_FILE_BYTES: Final = 4 << 30
# Mean router weight below which the fit has hardly seen an expert.
_HARDLY: Final = 0.01


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What to export.

    Args:
        merge: The expert that is always on; by default all experts are mixed.
        layout: Layout of a mixture; by default the one that fits the backbone.
        dtype: Dtype that weights are written in, "F32" or "BF16"; by default one that is exact.
        fit_tokens: Tokens of text that routers are fitted on, at most.
    """

    merge: str | None = None
    layout: str | None = None
    dtype: str | None = None
    fit_tokens: int = 8192


def export_model(
    loaded: LoadedBackbone,
    experts: Sequence[Path],
    out: Path,
    plan: ExportPlan,
    text: Sequence[Document] = (),
    *,
    progress: StageProgress | None = None,
) -> dict[str, Any]:
    """Write a model as a folder that transformers loads.

    Args:
        loaded: The backbone.
        experts: Folders of the experts; without any, the backbone alone is exported.
        out: The folder, which must not exist or be empty.
        plan: What to export.
        text: Text that routers are fitted on, of all the kinds that the experts are for; half of
            the documents are only scored. By default the backbone's anchor.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The record, as `composable.json` holds it.

    Raises:
        InteropError: If no layout computes what is computed here; `where` names the field.
        PackagingError: If `out` is not empty.
    """
    show = progress or (lambda label, done, total: None)
    require_empty_folder(out)
    manifests = {manifest.name: manifest for manifest in map(Manifest.read, experts)}
    _check_plan(plan, manifests)
    if loaded.backbone.cfg.matrix_dtype is not None:
        raise InteropError(
            f"matrices of {loaded.backbone.cfg.matrix_dtype} have no layout that is exact",
            where="config.matrix_dtype",
            hint="export the backbone that it was made from, which its card names",
        )
    layout = None
    if manifests and plan.merge is None:
        layout = find_layout(loaded.backbone.cfg, plan.layout)
    tokenizer = tokenizer_files(loaded.tokenizer)
    kept = [path for path in experts if plan.merge in (None, Manifest.read(path).name)]
    model = loaded.plug([load_expert(loaded, path) for path in kept])
    exported = [manifests[name] for name in model.experts]
    dtype = plan.dtype or _exact_dtype(loaded.folder, exported)

    rows_LED: np.ndarray | None = None
    measured: dict[str, Any] = {}
    if layout is not None:
        text = text or loaded.anchor
        rows_LED, measured = _fit_routers(model, text, plan.fit_tokens, dtype, show)
    config, pieces = _lay_out(layout, loaded, len(exported), dtype)
    record = _make_record(loaded, exported, layout, dtype, measured)

    atomic.make_directory(out)
    read = partial(_read, _open_weights(loaded.folder), model, rows_LED, dtype)
    _write_weights(out, pieces, read, dtype, show)
    _write_texts(out, config, tokenizer, record)
    return record


def _check_plan(plan: ExportPlan, names: Collection[str]) -> None:
    """Reject a plan that asks for an expert, a dtype or a layout that is not available."""
    if plan.merge is not None and plan.merge not in names:
        raise InteropError(
            f"there is no expert {plan.merge!r} ({', '.join(sorted(names)) or 'no experts'})",
            where="merge",
        )
    if plan.dtype not in (None, *DTYPE_NAMES):
        raise InteropError(f"{plan.dtype!r} is not one of {', '.join(DTYPE_NAMES)}", where="dtype")
    if plan.layout is not None and (plan.merge is not None or not names):
        raise InteropError(
            f"{plan.layout!r} is a layout of mixtures, but "
            + ("one expert is always on" if names else "there are no experts to mix"),
            where="layout",
        )


def _lay_out(
    layout: Layout | None, loaded: LoadedBackbone, n_experts: int, dtype: str
) -> tuple[dict[str, Any], list[TensorPart]]:
    """Return the content of `config.json` and the tensors, in a mixture's layout or a dense one."""
    cfg, ends = loaded.backbone.cfg, list(loaded.tokenizer.ends)
    if layout is None:
        config, pieces = dense_config(cfg), dense_pieces(cfg, expert=n_experts)
    else:
        top_k = min(loaded.interface.top_k, 1 + n_experts)
        config = mixture_config(layout, cfg, 1 + n_experts, top_k)
        pieces = mixture_pieces(layout, cfg, 1 + n_experts)
    config |= {
        "torch_dtype": DTYPE_NAMES[dtype],
        "bos_token_id": loaded.tokenizer.begin,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        # Explicit, because some families have a default that is outside of a small vocabulary.
        "pad_token_id": None,
    }
    return config, pieces


def _make_record(
    loaded: LoadedBackbone,
    exported: Sequence[Manifest],
    layout: Layout | None,
    dtype: str,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of `composable.json`: what was exported, what was measured and lost."""
    package = BackbonePackage.read(loaded.folder)
    return {
        "format": 1,
        "composable": composable.__version__,
        "layout": layout.name if layout else DENSE,
        "backbone": {
            "name": package.name,
            "version": str(package.version),
            "interface": loaded.interface.digest,
        },
        "experts": [
            {"name": m.name, "version": str(m.version), "manifest": m.digest} for m in exported
        ],
        "dtype": dtype,
        "begin": loaded.tokenizer.begin,
        "licenses": sorted({package.license, *(m.license for m in exported)} - {""}),
        **measured,
        "lost": _losses(loaded, exported, layout, dtype, measured),
    }


def split_text(text: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Return documents to fit routers on and documents to measure them on, spread over the text.

    Raises:
        TextError: If there is no text.
    """
    if len(text) < 2:
        return split_sample(text, "routers")
    fit, scored = split_documents(text, 0.5, salt="routers")
    return _spread(fit, _FITTED_DOCUMENTS), _spread(scored, _SCORED_DOCUMENTS)


def _spread(documents: Sequence[Document], at_most: int) -> list[Document]:
    """Return documents spread evenly over the text: texts of one kind are often adjacent."""
    n_kept = min(at_most, len(documents))
    return [documents[i * len(documents) // n_kept] for i in range(n_kept)]


def _exact_dtype(backbone: Path, experts: Sequence[Manifest]) -> str:
    """Return the narrowest dtype in which the weights in a backbone's folder are exact."""
    stored = {
        info.dtype
        for name, info in read_header(backbone / WEIGHTS_FILE).items()
        if not name.startswith(("scout.", "class_map"))
    }
    is_narrow = all(m.body.kind == "ffn" and m.body.dtype == "BF16" for m in experts)
    return "BF16" if stored == {"BF16"} and is_narrow else "F32"


def _fit_routers(
    model: Model, text: Sequence[Document], fit_tokens: int, dtype: str, show: StageProgress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return every slot's router rows, shape LED, and what was measured of them."""
    fit, scored = split_text(text)
    observed = observe(
        model,
        [document.text.encode() for document in fit],
        max_tokens=fit_tokens,
        progress=partial(show, "observe"),
    )
    rows_LED, agreement_L = fit_rows(observed, partial(show, "fit"))
    # Measured in the dtype that is written.
    rows_LED = rows_LED.astype(DTYPE_NAMES[dtype]).astype(np.float32)
    texts = [truncate_utf8(document.text.encode(), _SCORED_BYTES) for document in scored]
    scorers = {
        "backbone": path_scorer(model),
        "composable": mix_scorer(model),
        "exported": layered_scorer(model, rows_LED, model.interface.top_k),
    }
    bits, n_bytes = {}, 0
    for done, (name, scorer) in enumerate(scorers.items()):
        show("score", done, len(scorers))
        score = score_documents(scorer, texts, context=model.context)
        bits[name], n_bytes = round(score.bits_per_byte, 5), int(score.n_bytes_B.sum())
    show("score", len(scorers), len(scorers))
    posterior_E = observed.weight_ME.mean(axis=0)
    return rows_LED, {
        "routers": {
            "fitted_on": {"documents": len(fit), "tokens": len(observed.weight_ME)},
            "trust": {
                name: round(float(weight), 5)
                for name, weight in zip(expert_names(model), posterior_E, strict=True)
            },
            "same_first_choice": round(float(agreement_L.mean()), 4),
        },
        "measured": {"bits_per_byte": bits, "documents": len(texts), "bytes": n_bytes},
    }


def _losses(
    loaded: LoadedBackbone,
    experts: Sequence[Manifest],
    layout: Layout | None,
    dtype: str,
    measured: dict[str, Any],
) -> list[str]:
    """Return sentences on what the exported model does not do."""
    lost = []
    if layout is None and experts:
        lost.append(
            f"Routing: {experts[0].name} is on for every text, including text that it was not "
            "trained for."
        )
    if layout is not None:
        bits = measured["measured"]["bits_per_byte"]
        lost.append(
            "The router: it tracks how well each expert predicts a document, which no other "
            "runtime does. Router rows in every layer approximate it from single hidden states: "
            f"{bits['exported']:.3f} bits per byte where composable has {bits['composable']:.3f} "
            f"and the backbone alone {bits['backbone']:.3f}, on "
            f"{measured['measured']['bytes']:,} bytes of text that the fit did not see."
        )
        hardly = [
            name
            for name, weight in measured["routers"]["trust"].items()
            if weight < _HARDLY and name != "backbone"
        ]
        if hardly:
            lost.append(
                f"Nearly all use of {', '.join(hardly)}: on the text that the rows were fitted on "
                "hardly any token was routed to them. Give text of their kind."
            )
        lost.append(
            "The bounds: composable zeroes an expert's output beyond the interface's bound, other "
            "runtimes do not."
        )
    if experts and loaded.interface.output_mixture:
        lost.append(
            "The scouts' next-token predictions: they have a share of composable's output, and "
            "are not exported."
        )
    if experts:
        lost.append(
            "Safe mode, and with it the bound on the loss of a document relative to the backbone "
            "alone."
        )
        lost.append("Installing, removing and upgrading experts: export again instead.")
    if layout is not None and layout.dense_layers is None:
        n_trunk = loaded.backbone.cfg.n_layers - len(loaded.interface.slots)
        lost.append(
            f"Memory: this layout has no dense layers, so each of the {n_trunk} below the tap "
            f"holds the same feed-forward block {1 + len(experts)} times."
        )
    if dtype != _exact_dtype(loaded.folder, experts):
        lost.append("Precision: weights were rounded to bfloat16.")
    return lost


def _open_weights(backbone: Path) -> TensorFile:
    """Return the tensors in a backbone's folder as they are stored."""
    path = backbone / WEIGHTS_FILE
    specs = {
        name: TensorSpec(shape=info.shape, dtypes=(info.dtype,))
        for name, info in read_header(path).items()
    }
    return TensorFile(path, specs)


def _read(
    stored: TensorFile,
    model: Model,
    rows_LED: np.ndarray | None,
    dtype: str,
    piece: TensorPart,
) -> np.ndarray:
    """Return one tensor as it is written."""
    part, *place = piece.ours.split(".")
    slots = model.interface.slots
    if part == "routers":
        assert rows_LED is not None
        layer = int(place[0])
        # Below the tap all experts are the same, so the choice does not matter.
        array = rows_LED[slots.index(layer)] if layer in slots else np.zeros(piece.shape)
    elif piece.expert:
        name = expert_names(model)[piece.expert]
        entry = model.names.index(name)
        matrices = merge_entry(model.parts.bank, slots.index(int(place[0])), entry)
        array = np.asarray(matrices[place[-1]])
    else:
        array = stored[piece.ours]
    return piece.arrange(array.astype(DTYPE_NAMES[dtype]))


def _write_weights(
    out: Path,
    pieces: Sequence[TensorPart],
    read: Callable[[TensorPart], np.ndarray],
    dtype: str,
    show: StageProgress,
) -> None:
    """Write the tensors, one at a time, in one file or in several with an index."""
    item_bytes = np.dtype(DTYPE_NAMES[dtype]).itemsize
    files = split_pieces(pieces, item_bytes, max_bytes=_MAX_FILE_BYTES, max_tensors=MAX_TENSORS)
    done = 0
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05}-of-{len(files):05}.safetensors"
        by_name = {piece.theirs: piece for piece in part}

        def read_one(theirs: str, by_name: dict[str, TensorPart] = by_name) -> np.ndarray:
            nonlocal done
            done += 1
            show("weights", done, len(pieces))
            return read(by_name[theirs])

        specs = {p.theirs: TensorSpec(shape=p.shape, dtypes=(dtype,)) for p in part}
        # transformers reads no file without this metadata.
        stream_tensors(out / name, specs, read_one, {"format": "pt"})
        weight_map |= dict.fromkeys(by_name, name)
    if len(files) > 1:
        total = sum(int(np.prod(piece.shape)) for piece in pieces) * item_bytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        atomic.write_text(out / "model.safetensors.index.json", text)


def _write_texts(
    out: Path, config: dict[str, Any], tokenizer: dict[str, str], record: dict[str, Any]
) -> None:
    """Write all files but the weights."""
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(token_ids, indent=2) + "\n",
        **tokenizer,
        EXPORT_FILE: json.dumps(record, indent=2, ensure_ascii=False) + "\n",
        "README.md": _readme(record, out.name),
    }
    for name, content in texts.items():
        atomic.write_text(out / name, content)


def _readme(record: dict[str, Any], name: str) -> str:
    backbone, experts = record["backbone"], record["experts"]
    what = f"{backbone['name']} {backbone['version']}"
    names = ", ".join(f"{e['name']} {e['version']}" for e in experts)
    if record["layout"] == DENSE:
        what += f" with the expert {names} always on" if experts else " alone, unchanged"
    else:
        what += f" and the experts {names}, mixed in the layout `{record['layout']}`"
    lost = "".join(f"- {line}\n" for line in record["lost"]) or "- Nothing.\n"
    licenses = " and ".join(record["licenses"]) or "not declared"
    return f"""# {name}

{what}, exported by composable {record["composable"]}. Licences: {licenses}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```

A text begins with token {record["begin"]}, which the tokenizer puts there.

## What is lost

{lost}
`{EXPORT_FILE}` has the figures and the digests of what was exported.
"""
