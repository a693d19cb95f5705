"""One contributor of the composition benchmark: a process that sees its own text and the backbone.

    python -m benchmarks.composition.contributor FOLDER BACKBONE CACHE

FOLDER holds `job.json`, `text/train.jsonl` and, for a second generation, `parent`, the expert that
it starts from. The process confines itself to FOLDER (and a cache of compiled programs) before it
reads anything, trains the expert as `composable train` does, and writes `extras.npz` beside it:
what other methods ask of a contributor who is alone with its text.

* `pooled_*`: moments of pooled trunk features, for closed-form gates and for c-BTM.
* `gate_LD`: the gates of PHATGOOSE (Muqeeth et al. 2024, arXiv:2402.05859, section 3.1).
* `flex_*`: feed-forward blocks co-trained with the frozen public one, and the rows of their router
  (Shi et al. 2025, arXiv:2507.07024, section 3).
* `scout_NAME_*`: scouts of another width or tap, or that read less, for ablations.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from composable.demo.sandbox import python_paths, restrict

if __name__ == "__main__":
    # Before numpy is imported: it starts threads, and those would stay unconfined.
    _own, _backbone, _cache = map(Path, sys.argv[1:])
    os.environ["TMPDIR"] = str(_own)
    _shared = [path for path in (Path("/dev/shm"),) if path.exists()]
    restrict(
        read=[*python_paths(), Path(__file__).parents[1], _backbone], write=[_own, _cache, *_shared]
    )

import numpy as np

WINDOW: Final = 256
# The published expert that a contributor starts from, beside its own text.
PARENT: Final = "parent"
_MOMENT_ROWS: Final = 48


class Variant(NamedTuple):
    """A scout beside the published one, with one thing changed.

    Args:
        width: Hidden width.
        tap: Layers of the trunk more, or fewer, that it reads after.
        share: Share of the published scout's steps.
    """

    width: int = 128
    tap: int = 0
    share: float = 1.0


SCOUTS: Final[Mapping[str, Variant]] = {
    "of width 64": Variant(width=64),
    "that read a tenth as long": Variant(share=0.1),
    "two layers above": Variant(tap=2),
}


def main(arguments: Sequence[str]) -> None:
    """Contribute what `job.json` asks for."""
    folder, backbone, cache = map(Path, arguments)
    job = json.loads((folder / "job.json").read_text())

    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

    from composable.assembly.backbones import load_backbone
    from composable.assembly.experts import load_expert
    from composable.corpora.documents import read_documents
    from composable.files.records import format_record
    from composable.training.data import token_stream
    from composable.workflows.train import expert_config, train_expert

    loaded = load_backbone(str(backbone))
    text = folder / "text" / "train.jsonl"
    body = None
    if not job["is_public"]:
        cfg = expert_config(job["steps"], job["seed"], rows=job["rows"])
        cfg = dataclasses.replace(cfg, learning_rate=job["learning_rate"])
        parent = load_expert(loaded, folder / PARENT) if job["has_parent"] else None
        record = train_expert(loaded, folder, [text], cfg, parent=parent)
        (folder / "record.json").write_text(format_record(record))
        body = load_expert(loaded, folder).body
    extras: dict[str, np.ndarray] = {}
    stream = token_stream(read_documents([text]), loaded.tokenizer)
    anchor = token_stream(loaded.anchor, loaded.tokenizer)
    for part in job["extras"]:
        extras |= _PARTS[part](loaded, body, stream, anchor, job)
    np.savez(folder / "extras.part.npz", **extras)
    (folder / "extras.part.npz").rename(folder / "extras.npz")


def pooled(release: Any, body: Any, stream: np.ndarray, anchor: np.ndarray, job: Any) -> Any:
    """Return moments of pooled trunk features: count, mean and raw second moment."""
    import jax

    from benchmarks.composition.features import pool
    from composable.workflows.trunk_cache import cut_rows

    rows_BT = cut_rows(stream, 2 * WINDOW, 2 * WINDOW * _MOMENT_ROWS)[:, :-1]

    @jax.jit
    def run(tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_BTD, _ = release.backbone.trunk(tokens_BT)
        pooled_BTD, _ = pool(release.backbone.features(x_BTD), None)
        flat_MD = pooled_BTD.reshape(-1, pooled_BTD.shape[-1])
        return flat_MD.mean(0), flat_MD.T @ flat_MD / len(flat_MD)

    parts = [run(rows_BT[i : i + 8]) for i in range(0, len(rows_BT) // 8 * 8, 8)]
    mean_D, moment_DD = (np.mean([np.asarray(p[i], np.float64) for p in parts], 0) for i in (0, 1))
    return {"pooled_mean_D": mean_D, "pooled_moment_DD": moment_DD}


def unigram(release: Any, body: Any, stream: np.ndarray, anchor: np.ndarray, job: Any) -> Any:
    """Return smoothed log probabilities of the classes, whatever came before."""
    classes = np.asarray(release.backbone.class_map[...])[stream]
    counts_C = np.bincount(classes, minlength=release.interface.n_classes) + 0.5
    return {"unigram_C": np.log(counts_C / counts_C.sum()).astype(np.float32)}


def phatgoose(release: Any, body: Any, stream: np.ndarray, anchor: np.ndarray, job: Any) -> Any:
    """Return the gates: one vector per slot, trained with the expert frozen."""
    import jax
    import jax.numpy as jnp

    slots = release.interface.slots

    def objective(gate: Any, frozen: Any, tokens_BT: jax.Array) -> Any:
        backbone, body = frozen
        expert = body.feed_forward(backbone)

        def run(layer: int, x_BTD: jax.Array) -> jax.Array:
            own_BTD = backbone.own_feed_forward(layer, x_BTD)
            share_BT1 = jax.nn.sigmoid(x_BTD @ gate[str(layer)])[..., None]
            return own_BTD + share_BT1 * (expert(layer, x_BTD) - own_BTD)

        return _loss(backbone, run, tokens_BT)

    d_model = release.interface.d_model
    start = {str(layer): jnp.zeros(d_model) for layer in slots}
    steps = max(20, job["steps"] // 2)
    gate = _fit(objective, start, (release.backbone, body), stream, steps, job)
    return {"gate_LD": np.stack([np.asarray(gate[str(layer)]) for layer in slots])}


def flex(release: Any, body: Any, stream: np.ndarray, anchor: np.ndarray, job: Any) -> Any:
    """Return blocks co-trained with the public ones, and the rows of their router."""
    import jax
    import jax.numpy as jnp

    from composable.model.body import MATRICES, backbone_slot
    from composable.model.layers import swiglu

    backbone, slots = release.backbone, release.interface.slots
    public_LD = jnp.asarray(mean_inputs(release, anchor))
    own_LD = jnp.asarray(mean_inputs(release, stream))

    def objective(trained: Any, frozen: Any, tokens_BT: jax.Array) -> Any:
        backbone, public_LD = frozen

        def run(layer: int, x_BTD: jax.Array) -> jax.Array:
            rows_DE = jnp.stack([public_LD[slots.index(layer)], trained["row"][str(layer)]], 1)
            weight_BTE = jax.nn.softmax(x_BTD @ rows_DE)
            block = trained["block"][str(layer)]
            y_BTD = swiglu(x_BTD, *(block[name] for name in MATRICES))
            own_BTD = backbone.own_feed_forward(layer, x_BTD)
            return weight_BTE[..., :1] * own_BTD + weight_BTE[..., 1:] * y_BTD

        return _loss(backbone, run, tokens_BT)

    start = {
        "block": {str(layer): backbone_slot(backbone, layer) for layer in slots},
        "row": {str(layer): own_LD[i] for i, layer in enumerate(slots)},
    }
    trained = _fit(objective, start, (backbone, public_LD), stream, job["steps"], job)
    rows = {"flex_public_LD": np.asarray(public_LD)}
    rows["flex_row_LD"] = np.stack([np.asarray(trained["row"][str(layer)]) for layer in slots])
    blocks = {
        f"flex_{name}_{i}": np.asarray(trained["block"][str(layer)][name])
        for i, layer in enumerate(slots)
        for name in MATRICES
    }
    return {**rows, **blocks}


def scouts(release: Any, body: Any, stream: np.ndarray, anchor: np.ndarray, job: Any) -> Any:
    """Return scouts of other kinds, trained alone on this text as the published one is."""
    import jax
    from flax import nnx

    from benchmarks.composition.features import features_at
    from composable.model.scout import Scout
    from composable.training.scouts import SCOUT_ROWS, Features, train_scout
    from composable.workflows.train import expert_config
    from composable.workflows.trunk_cache import cut_rows, plan_training

    backbone, interface = release.backbone, release.interface
    cfg = expert_config(job["steps"], job["seed"], rows=job["rows"])
    reading = plan_training(backbone, cfg, len(stream), SCOUT_ROWS)
    rows_BU = cut_rows(stream, WINDOW, reading.scout_tokens)
    rows_BU = rows_BU[: len(rows_BU) // 8 * 8]
    classes_BT = np.asarray(backbone.class_map[...])[rows_BU[:, 1:]]

    def read(tap: int) -> np.ndarray:
        run = jax.jit(lambda tokens_BT: features_at(backbone, tokens_BT, tap))
        parts = [np.asarray(run(rows_BU[i : i + 8, :-1])) for i in range(0, len(rows_BU), 8)]
        return np.concatenate(parts).astype(np.float16)

    found: dict[str, np.ndarray] = {}
    for name, variant in SCOUTS.items():
        rngs = nnx.Rngs(job["seed"])
        scout = Scout(interface.d_model, variant.width, interface.n_classes, rngs=rngs)
        fitted = train_scout(
            scout,
            Features(read(backbone.cfg.tap + variant.tap), classes_BT),
            steps=max(1, round(variant.share * reading.scout_steps)),
            seed=job["seed"],
        )
        for part in ("w_in", "b_in", "w_out", "b_out"):
            found[f"scout_{name}_{part}"] = np.asarray(getattr(fitted.scout, part)[...])
    return found


_PARTS: Final[Mapping[str, Callable[..., Any]]] = {
    "pooled": pooled,
    "unigram": unigram,
    "phatgoose": phatgoose,
    "flex": flex,
    "scouts": scouts,
}


def mean_inputs(release: Any, stream: np.ndarray) -> np.ndarray:
    """Return the mean input of every slot's block on a text, of unit length, shape LD."""
    import jax

    from composable.workflows.trunk_cache import cut_rows

    backbone = release.backbone

    @jax.jit
    def run(tokens_BT: jax.Array) -> list[jax.Array]:
        seen = []

        def listen(layer: int, x_BTD: jax.Array) -> jax.Array:
            seen.append(x_BTD.mean((0, 1)))
            return backbone.own_feed_forward(layer, x_BTD)

        x_BTD, _ = backbone.trunk(tokens_BT)
        backbone.upper(x_BTD, listen)
        return seen

    rows_BT = cut_rows(stream, WINDOW, 16 * WINDOW)[:, :-1]
    mean_LD = np.stack([np.asarray(mean_D) for mean_D in run(rows_BT)])
    return mean_LD / np.linalg.norm(mean_LD, axis=1, keepdims=True)


def _loss(backbone: Any, feed_forward: Any, tokens_BT: Any) -> Any:
    from composable.training.objectives import next_token_loss

    x_BTD, _ = backbone.trunk(tokens_BT[:, :-1])
    logits_BTV, _ = backbone.upper(x_BTD, feed_forward)
    return next_token_loss(logits_BTV, tokens_BT[:, 1:]), {}


def _fit(objective: Any, start: Any, frozen: Any, stream: np.ndarray, steps: int, job: Any) -> Any:
    from composable.training.data import batches
    from composable.training.loop import fit
    from composable.training.optimizers import muon
    from composable.workflows.train import expert_config

    cfg = expert_config(steps, job["seed"], rows=job["rows"])
    data = batches(stream, window=cfg.window, batch_size=cfg.batch_size, seed=cfg.seed)
    return fit(objective, start, frozen, data, cfg, optimizer=muon(cfg)).trained


if __name__ == "__main__":
    main(sys.argv[1:])
