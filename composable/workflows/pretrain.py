"""Train a backbone from its recipe, and pack it with interface, scout, anchor and card.

    python -m composable.workflows.pretrain tiny-bytes experts/tiny-bytes --out DIR

Run again after an interruption to resume from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from composable.assembly.backbones import LoadedBackbone, load_backbone, save_backbone
from composable.corpora.documents import Document, read_documents, write_documents
from composable.corpora.recipe import cut_text, load_recipe, make_texts
from composable.interface import RouterInterface, byte_router
from composable.model.backbone import Backbone
from composable.model.config import BackboneConfig, small_bytes, tiny_bytes
from composable.model.tokenizer import ByteTokenizer, Tokenizer
from composable.parallel import (
    batch_share,
    fetch_tree,
    is_first_process,
    make_mesh,
    start_processes,
    wait_for_all,
)
from composable.progress import StepProgress, show_bars
from composable.training.config import TrainConfig
from composable.training.data import batches, token_stream
from composable.training.loop import fit
from composable.training.objectives import backbone_objective, float32_masters
from composable.vetting.card import CARD_FILE
from composable.vetting.evaluation import path_scorer, score_documents

# Bytes of each document of the anchor; the anchor is every other held-out document.
_SHIPPED_BYTES: Final = 8192
# The bound on a body's output, as a multiple of the backbone's largest output on the anchor.
# Trained experts reached 3.3 times.
_BOUND_FACTOR: Final = 8.0
# Tokens of each document of the anchor that the bounds are measured on.
_BOUND_TOKENS: Final = 512


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Architecture and training settings of a backbone of this project.

    Args:
        name: Name of the package.
        version: Semantic version of package and interface.
        shape: Architecture.
        training: How it is trained.
        description: One line.
        honours: Digests of earlier interfaces whose experts still fit, because what experts are
            trained on has not changed.
    """

    name: str
    version: str
    shape: BackboneConfig
    training: TrainConfig
    description: str
    honours: tuple[str, ...] = ()


PLANS: Final[Mapping[str, Plan]] = {
    plan.name: plan
    for plan in (
        # 11.5 M tokens, about one epoch of its text.
        Plan(
            name="tiny-bytes",
            version="1.5.0",
            shape=tiny_bytes(),
            training=TrainConfig(
                steps=2800,
                batch_size=8,
                window=512,
                learning_rate=3e-3,
                checkpoint_every=500,
                log_every=20,
            ),
            description="A byte-level causal transformer of 2.4 M parameters, trained on public-"
            "domain English (State of the Union addresses).",
            # 1.0.0, which had no switching filter, 1.1.0, with other settings of safe mode, 1.2.0,
            # with other settings of mix mode, 1.3.0, where scouts only routed, and 1.4.0, with a
            # larger margin and more frequent switches.
            honours=(
                "sha256:236ae8c3446c0e6b563f18500350ca1ab716d4932e67c8b21beb6b80da94263c",
                "sha256:b314d6ce3a42be41fefbec189dbbf169435a5c235375a7110b183c8d484f151f",
                "sha256:e311c857757b089946b2d1e2fa575722d766a4ecc364265c6475fdd70f1dbba5",
                "sha256:289a7c878785267ec9189775077677e1aa5b38cdf43e54f47af45059883d01cc",
                "sha256:be6ad7bc31c1ac60f86edeada1848d6ba756cf53c9c0a8170d541b2ec9a6fa23",
            ),
        ),
        # 33 M tokens, three epochs: for one accelerator.
        Plan(
            name="small-bytes",
            version="1.0.0",
            shape=small_bytes(),
            training=TrainConfig(
                steps=1000,
                batch_size=64,
                window=512,
                learning_rate=2e-3,
                checkpoint_every=500,
                log_every=20,
            ),
            description="A byte-level causal transformer of 12.7 M parameters, trained on public-"
            "domain English (State of the Union addresses).",
        ),
    )
}


def train_backbone(
    plan: Plan,
    recipe: Path,
    out: Path,
    work: Path | None = None,
    *,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    checkpoints: Path | str | None = None,
    progress: StepProgress | None = None,
) -> dict[str, Any]:
    """Make the text of a recipe, train a backbone on it, and pack it.

    In a run of many processes all call this, with the same folders, and the first one writes.

    Args:
        plan: Architecture and settings.
        recipe: Folder of the data recipe.
        out: Folder of the package.
        work: Folder of text, checkpoints and curves; by default in `runs`.
        mesh: Devices; all of them as data parallel by default.
        accumulate: Parts that the rows of a step are run in; see `fit`.
        checkpoints: Where checkpoints are, a folder or `gs://BUCKET/PATH`; by default in `work`.
        progress: Called at every step.

    Returns:
        The digest of the interface, and what the backbone scores.
    """
    loaded_recipe, work = load_recipe(recipe), work or Path("runs") / plan.name
    text = work / "text"
    if is_first_process():
        make_texts(loaded_recipe, text)
    wait_for_all("text")
    documents = read_documents([text / "train.jsonl"])
    backbone = pretrain(
        plan,
        documents,
        work,
        mesh=mesh,
        accumulate=accumulate,
        checkpoints=checkpoints,
        progress=progress,
    )
    heldout = read_documents([text / "heldout.jsonl"])
    if is_first_process():
        pack(plan, backbone, heldout, loaded_recipe.source.package, out)
        write_documents(recipe / "text" / "heldout.jsonl", split_heldout(heldout)[1])
    wait_for_all("package")
    card = json.loads((out / CARD_FILE).read_text())
    return {"interface": card["interface"]["digest"], **card["measured"]}


def pretrain(
    plan: Plan,
    documents: Sequence[Document],
    work: Path,
    *,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    checkpoints: Path | str | None = None,
    progress: StepProgress | None = None,
) -> Backbone:
    """Train a backbone together with its scout, and return it.

    Args:
        plan: Architecture and settings.
        documents: Public text.
        work: Where checkpoints and curves go.
        mesh: Devices; all of them as data parallel by default.
        accumulate: Parts that the rows of a step are run in; see `fit`.
        checkpoints: Where checkpoints are, a folder or `gs://BUCKET/PATH`; by default in `work`.
        progress: Called at every step.
    """
    shape, cfg = plan.shape, plan.training
    classes_V = jnp.arange(shape.vocab_size)
    backbone = Backbone(shape, classes_V, shape.vocab_size, rngs=nnx.Rngs(cfg.seed))
    parts: Any = nnx.split(backbone, nnx.Param, ...)
    graph, params, rest = parts
    part, n_parts = batch_share(mesh or make_mesh())
    data = batches(
        token_stream(documents, ByteTokenizer()),
        window=cfg.window,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        process=part,
        n_processes=n_parts,
    )
    masters = float32_masters(params)
    fitted = fit(
        backbone_objective(graph),
        masters,
        rest,
        data,
        cfg,
        mesh=mesh,
        accumulate=accumulate,
        directory=work,
        checkpoints=checkpoints,
        progress=progress,
    )
    trained_params = fetch_tree(fitted.trained)
    params = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), trained_params, params)
    trained: Backbone = nnx.merge(graph, params, rest)
    return trained


def split_heldout(heldout: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Return the anchor, which ships with a backbone, and the documents that it is measured on.

    Args:
        heldout: Held-out documents. Each is shortened; every other one joins the anchor.

    Example:
        >>> anchor, measured = split_heldout([Document(name, "text") for name in "abc"])
        >>> [document.id for document in anchor], [document.id for document in measured]
        (['a', 'c'], ['b'])
    """
    cut = [Document(doc.id, cut_text(doc.text, _SHIPPED_BYTES)) for doc in heldout]
    return cut[::2], cut[1::2]


def pack(
    plan: Plan, backbone: Backbone, heldout: Sequence[Document], package: str, out: Path
) -> RouterInterface:
    """Write the package of a backbone, measured on held-out text.

    Args:
        plan: Architecture and settings.
        backbone: The trained model.
        heldout: Held-out public text; `split_heldout` is applied to it.
        package: The package that the text is from, for the card.
        out: Folder of the package.

    Returns:
        The interface of the packed backbone.
    """
    anchor, measured = split_heldout(heldout)
    texts = {"README.md": _readme(plan), CARD_FILE: "{}\n"}
    bounds = output_bounds(backbone, anchor, ByteTokenizer())
    save: dict[str, Any] = {
        "name": plan.name,
        "version": plan.version,
        "anchor": anchor,
        "router": byte_router(),
        "output_bounds": bounds,
        "honours": plan.honours,
        "description": plan.description,
        "license_": "Apache-2.0",
    }
    # Written twice: the card holds what the packed, rounded weights score.
    interface = save_backbone(out, backbone, texts=texts, **save)
    loaded = load_backbone(str(out))
    n_parameters = sum(x.size for x in jax.tree.leaves(nnx.state(backbone, nnx.Param)))
    card = {
        "backbone": f"{plan.name}@{plan.version}",
        "interface": {"name": interface.name, "digest": interface.digest},
        "measured": _score_texts(loaded, [doc.text.encode() for doc in measured]),
        "training": _describe_training(plan.training, package, n_parameters),
        "measure_again": f"python -m composable.workflows.pretrain {plan.name} "
        "experts/tiny-bytes --out DIR",
    }
    texts[CARD_FILE] = json.dumps(card, indent=2) + "\n"
    return save_backbone(out, loaded.backbone, texts=texts, **save)


def _score_texts(loaded: LoadedBackbone, texts: Sequence[bytes]) -> dict[str, int | float]:
    """Return what a backbone scores on texts, for its card."""
    model = loaded.plug()
    score = score_documents(path_scorer(model), texts, context=model.context)
    return {
        "bits_per_byte": round(score.bits_per_byte, 5),
        "documents": len(texts),
        "bytes": int(score.n_bytes_B.sum()),
    }


def _describe_training(cfg: TrainConfig, package: str, n_parameters: int) -> dict[str, Any]:
    """Return how a backbone was trained, for its card."""
    return {
        "recipe": package,
        "steps": cfg.steps,
        "tokens": cfg.tokens,
        "learning_rate": cfg.learning_rate,
        "seed": cfg.seed,
        "parameters": n_parameters,
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
    }


def output_bounds(
    backbone: Backbone, anchor: Sequence[Document], tokenizer: Tokenizer
) -> tuple[float, ...]:
    """Return the bound on a body's output in every slot, as a root mean square over D.

    Args:
        backbone: The model.
        anchor: Public text.
        tokenizer: Its tokenizer.

    Returns:
        One bound per slot: a multiple of the largest output of the backbone's own feed-forward.
    """
    largest_L = np.zeros(len(backbone.cfg.slots))
    for document in anchor:
        tokens_T = tokenizer.encode(document.text)[: min(backbone.cfg.context, _BOUND_TOKENS)]
        largest_L = np.maximum(largest_L, np.sqrt(_largest_power(backbone, tokens_T[None])))
    return tuple(round(float(_BOUND_FACTOR * value), 1) for value in largest_L)


@jax.jit
def _largest_power(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    """Return the largest mean square over D of the feed-forward output, shape L."""
    outputs = []

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        outputs.append(backbone.own_feed_forward(layer, x_BTD))
        return outputs[-1]

    x_BTD, _ = backbone.trunk(tokens_BT)
    backbone.upper(x_BTD, run)
    return jnp.stack(
        [jnp.mean(jnp.square(y_BTD.astype(jnp.float32)), axis=-1).max() for y_BTD in outputs]
    )


def _readme(plan: Plan) -> str:
    shape = plan.shape
    return f"""# {plan.name}

{plan.description}

{shape.n_layers} layers of width {shape.d_model}, {shape.n_heads} query heads on {shape.n_kv_heads}
key heads, SwiGLU, RoPE, context {shape.context}. The first {shape.tap} layers are the trunk;
experts plug into the others. It knows nothing but the English that it was trained on: that is what
experts are for.

`card.json` says what it scores, `interface.json` what experts train against, and `anchor.jsonl` is
the public text on which they are vetted. Text and model are free: the speeches are in the public
domain, the weights are under Apache-2.0.
"""


def main() -> None:
    """Fetch the text, train, pack, and print the interface and the score."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m " + __spec__.name)
    parser.add_argument("name", choices=PLANS, help="which backbone")
    parser.add_argument("recipe", type=Path, help="folder of the data recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder of the package")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and text")
    arguments = parser.parse_args()
    start_processes()
    plan = PLANS[arguments.name]
    with show_bars(is_transient=False) as update:

        def show(step: int, steps: int, row: Mapping[str, float]) -> None:
            note = f"{row['bits_per_token']:.2f} bits per byte" if row else ""
            if is_first_process():
                update(plan.name, step, steps, note)

        card = train_backbone(plan, arguments.recipe, arguments.out, arguments.work, progress=show)
    if is_first_process():
        print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
