"""Training a backbone from its recipe, and packing it with interface, scout, anchor and card.

    python -m composable.assembly.pretraining experts/tiny-bytes --out DIR

Interrupted, it goes on from its last checkpoint when it is started again.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.assembly.backbones import load_backbone, save_backbone
from composable.interface import RouterInterface
from composable.model.backbone import Backbone
from composable.model.config import tiny_bytes
from composable.model.tokenizer import ByteTokenizer, Tokenizer
from composable.parallel import start_processes
from composable.training.data import batches, token_stream
from composable.training.documents import Document, read_documents, write_documents
from composable.training.loop import Progress, TrainConfig, fit
from composable.training.objectives import backbone_objective
from composable.training.recipe import cut_text, load_recipe, make_texts
from composable.vetting.evaluation import path_scorer, score_documents

# What the interface of tiny-bytes asks of the router; docs/demo.md says how that was chosen.
ROUTER: Final[dict[str, Any]] = {
    "discount": 0.975,
    "top_k": 2,
    "backbone_prior": 0.999,
    "switch_rate": 0.02,
    "scout_max_width": 128,
    "lora_max_rank": 64,
    "mix_power": 0.35,
    "mix_prior": 0.8,
    "mix_switch_rate": 0.003,
    # That of version 1.0.0, which had no switching filter: what experts are trained on is the same.
    "honours": ("sha256:236ae8c3446c0e6b563f18500350ca1ab716d4932e67c8b21beb6b80da94263c",),
}
_VERSION: Final = "1.1.0"
# Held-out speeches are shared out: every other one is the anchor, the rest measure.
_SHIPPED_BYTES: Final = 8192
# A body's output may be this many times as large as the backbone's largest on the anchor. Trained
# experts reached 3.3 times.
_BOUND_FACTOR: Final = 8.0
# Of each document of the anchor this many tokens are looked at.
_BOUND_TOKENS: Final = 512


def tiny_bytes_config() -> TrainConfig:
    """Return how `tiny-bytes` was trained: 11.5 M tokens, about one epoch of its text."""
    return TrainConfig(
        steps=2800,
        batch_size=8,
        window=512,
        learning_rate=3e-3,
        checkpoint_every=500,
        log_every=20,
    )


def pretrain(
    documents: Sequence[Document],
    cfg: TrainConfig,
    work: Path,
    *,
    progress: Progress | None = None,
) -> Backbone:
    """Train `tiny-bytes`, its scout beside it, and return it.

    Args:
        documents: Public text.
        cfg: How to train.
        work: Where checkpoints and curves go.
        progress: Called at every step.
    """
    shape = tiny_bytes()
    classes_V = jnp.arange(shape.vocab_size)
    backbone = Backbone(shape, classes_V, shape.vocab_size, rngs=nnx.Rngs(cfg.seed))
    parts: Any = nnx.split(backbone, nnx.Param, ...)
    graph, params, rest = parts
    data = batches(
        token_stream(documents, ByteTokenizer()),
        window=cfg.window,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        process=jax.process_index(),
        n_processes=jax.process_count(),
    )
    fitted = fit(
        backbone_objective(graph), params, rest, data, cfg, directory=work, progress=progress
    )
    return nnx.merge(graph, fitted.trained, rest)


def pack(
    backbone: Backbone, heldout: Sequence[Document], recipe: Path, cfg: TrainConfig, out: Path
) -> RouterInterface:
    """Write the package of `tiny-bytes`, measured on held-out text.

    Args:
        backbone: The trained model.
        heldout: Held-out public text; half of it, cut short, ships as the anchor.
        recipe: Folder of the data recipe; it gets the other half, for measuring.
        cfg: How it was trained.
        out: Folder of the package.
    """
    cut = [Document(doc.id, cut_text(doc.text, _SHIPPED_BYTES)) for doc in heldout]
    anchor, measured = cut[::2], cut[1::2]
    write_documents(recipe / "text" / "heldout.jsonl", measured)
    write = {"README.md": _README, "card.json": "{}\n"}
    save: dict[str, Any] = {
        "name": "tiny-bytes",
        "version": _VERSION,
        "anchor": anchor,
        "router": {**ROUTER, "output_bounds": output_bounds(backbone, anchor, ByteTokenizer())},
        "description": "A byte-level causal transformer of 2.4 M parameters, trained on public-"
        "domain English (State of the Union addresses).",
        "license_": "Apache-2.0",
    }
    # Written twice: the card holds what the packed, rounded weights score.
    interface = save_backbone(out, backbone, texts=write, **save)
    release = load_backbone(str(out))
    model = release.plug()
    texts = [doc.text.encode() for doc in measured]
    score = score_documents(path_scorer(model), texts, context=model.context)
    card = {
        "backbone": f"tiny-bytes@{_VERSION}",
        "interface": {"name": interface.name, "digest": interface.digest},
        "measured": {
            "bits_per_byte": round(score.bits_per_byte, 5),
            "documents": len(texts),
            "bytes": int(score.n_bytes.sum()),
        },
        "training": {
            "recipe": load_recipe(recipe).source.package,
            "steps": cfg.steps,
            "tokens": cfg.tokens,
            "learning_rate": cfg.learning_rate,
            "seed": cfg.seed,
            "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(backbone, nnx.Param))),
            "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        },
        "measure_again": "make backbone",
    }
    write["card.json"] = json.dumps(card, indent=2) + "\n"
    return save_backbone(out, release.backbone, texts=write, **save)


def output_bounds(
    backbone: Backbone, anchor: Sequence[Document], tokenizer: Tokenizer
) -> tuple[float, ...]:
    """Return how large a body's output may be in every slot, as a root mean square over D."""
    largest = np.zeros(len(backbone.cfg.slots))

    @jax.jit
    def power(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
        outputs = []

        def run(layer: int, x_BTD: jax.Array) -> jax.Array:
            outputs.append(backbone.own_feed_forward(layer, x_BTD))
            return outputs[-1]

        x_BTD, _ = backbone.trunk(tokens_BT)
        backbone.upper(x_BTD, run)
        return jnp.stack(
            [jnp.mean(jnp.square(y_BTD.astype(jnp.float32)), axis=-1).max() for y_BTD in outputs]
        )

    for document in anchor:
        tokens_T = tokenizer.encode(document.text)[: min(backbone.cfg.context, _BOUND_TOKENS)]
        largest = np.maximum(largest, np.sqrt(power(backbone, tokens_T[None])))
    return tuple(round(float(_BOUND_FACTOR * value), 1) for value in largest)


_README = """# tiny-bytes

A byte-level causal transformer of 2.4 M parameters: 6 layers of width 192, 4 query heads on 2 key
heads, SwiGLU, RoPE, context 512. The first two layers are the trunk; experts plug into the other
four. It was trained on public-domain English, the State of the Union addresses, and knows nothing
else: that is what experts are for.

`card.json` says what it scores, `interface.json` what experts train against, and `anchor.jsonl` is
the public text on which they are vetted. Text and model are free: the speeches are in the public
domain, the weights are under Apache-2.0.
"""


def main() -> None:
    """Fetch the text, train, pack and print what came out."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    parser = argparse.ArgumentParser(description=__doc__, prog="python -m " + __spec__.name)
    parser.add_argument("recipe", type=Path, help="folder of the data recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder of the package")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-bytes"))
    arguments = parser.parse_args()
    start_processes()
    cfg = tiny_bytes_config()
    text = arguments.work / "text"
    make_texts(load_recipe(arguments.recipe), text)
    with Bars(console=Console(stderr=True)) as bars:
        task = bars.add_task("tiny-bytes", total=cfg.steps)

        def show(step: int, steps: int, row: Any) -> None:
            bits = f", {row['bits_per_token']:.2f} bits per byte" if row else ""
            bars.update(task, completed=step, description=f"tiny-bytes{bits}")

        documents = read_documents([text / "train.jsonl"])
        backbone = pretrain(documents, cfg, arguments.work, progress=show)
    heldout = read_documents([text / "heldout.jsonl"])
    interface = pack(backbone, heldout, arguments.recipe, cfg, arguments.out)
    card = json.loads((arguments.out / "card.json").read_text())
    print(json.dumps({"interface": interface.digest, **card["measured"]}, indent=2))


if __name__ == "__main__":
    main()
