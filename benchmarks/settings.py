"""Which settings of the router and of training are best? On text that the demo does not measure.

python -m benchmarks.settings router demo/contributors     # where `composable demo demo` ran
python -m benchmarks.settings filters demo/contributors    # mix mode's switching filter
python -m benchmarks.settings training --steps 200
python -m benchmarks.settings scouts --experts python-code set-mm legal
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.assembly.backbones import load_backbone
from composable.assembly.contribution import (
    check_expert,
    expert_config,
    train_expert,
    vetted_texts,
)
from composable.assembly.experts import load_expert
from composable.assembly.features import (
    SCOUT_ROWS,
    Features,
    cut_rows,
    train_scout,
    trunk_features,
)
from composable.demo.run import BACKBONE_NAME, CONTRIBUTORS
from composable.model.model import Model
from composable.model.scout import Scout
from composable.training import loop
from composable.training.data import token_stream
from composable.training.documents import read_documents, splice_documents
from composable.training.objectives import scout_loss
from composable.training.recipe import shipped_folder
from composable.vetting.evaluation import (
    mix_scorer,
    path_scorer,
    safe_scorer,
    score_documents,
)

_WINDOW: Final = 256
# Settings of safe mode: backbone prior, switch rate, discount of the track records behind its
# shortlist.
ROUTERS: Final = (
    (0.5, 0.002, 0.975),
    (0.9, 0.0001, 0.975),
    (0.99, 0.0001, 0.975),
    (0.99, 0.002, 0.975),
    (0.99, 0.005, 0.975),
    (0.99, 0.02, 0.975),
    (0.999, 0.02, 0.975),
    (0.99, 0.005, 0.95),
    (0.99, 0.005, 0.99),
)
# Settings of mix mode: power, prior of the backbone and most of an expert, switch rate, margin,
# floor, experts at most.
FILTERS: Final = (
    (0.35, 0.8, 1.0, 0.003, 0.0, 0.0, 2),  # version 1.2.0 of the interface
    (0.35, 0.8, 1.0, 0.003, 0.0, 0.06, 4),
    (0.35, 0.5, 1.0, 0.01, 0.0, 0.06, 4),
    (0.35, 0.5, 1.0, 0.01, 0.3, 0.06, 4),
    (0.35, 0.2, 1.0, 0.02, 0.3, 0.06, 4),
    (0.35, 0.2, 0.1, 0.02, 0.3, 0.06, 4),
    (0.35, 0.2, 0.1, 0.02, 0.0, 0.06, 4),
    (0.35, 0.2, 0.1, 0.02, 0.15, 0.06, 4),
    (0.35, 0.2, 0.1, 0.02, 0.45, 0.06, 4),
    (0.35, 0.2, 0.1, 0.02, 0.3, 0.0, 4),
    (0.35, 0.2, 0.1, 0.02, 0.3, 0.03, 4),
    (0.35, 0.2, 0.1, 0.02, 0.3, 0.12, 4),
    (0.35, 0.2, 0.1, 0.02, 0.3, 0.06, 2),
    (0.2, 0.2, 0.1, 0.02, 0.3, 0.06, 4),
    (0.5, 0.2, 0.1, 0.02, 0.3, 0.06, 4),
    (0.35, 0.2, 0.1, 0.005, 0.3, 0.06, 4),
    (0.35, 0.2, 0.1, 0.04, 0.3, 0.06, 4),
)
# (optimiser, peak rate)
TRAININGS = (("adamw", 3e-3), ("adamw", 8e-3), ("muon", 1e-2), ("muon", 2e-2))
# How a scout reads alone: hidden width, thousands of tokens, times, optimiser, peak rate.
READINGS: Final = (
    (64, 60, 1, "muon", 1e-2),
    (64, 60, 10, "adamw", 4e-3),
    (128, 60, 10, "adamw", 4e-3),
    (128, 400, 3, "adamw", 4e-3),
    (128, 400, 3, "adamw", 1e-2),
    (128, 400, 3, "muon", 1e-2),
    (128, 400, 3, "muon", 2e-2),
    (128, 400, 3, "muon", 4e-2),
    (64, 400, 5, "muon", 2e-2),
    (128, 400, 5, "muon", 2e-2),
    (128, 400, 10, "muon", 2e-2),
)


def _prepare(folder: Path) -> tuple[Any, ...]:
    """Return backbone, experts, anchor, spliced training text, and training documents by domain."""
    release = load_backbone(BACKBONE_NAME)
    plugged = [load_expert(release, folder / name) for name in CONTRIBUTORS]
    anchor = release.anchor
    train = {
        name: read_documents([shipped_folder(name) / "text" / "train.jsonl"])[:20]
        for name in CONTRIBUTORS
    }
    spliced = [s.text for s in splice_documents({**train, "public": anchor}, 8, 5, 256, 640, 4)]
    texts = [doc.text.encode()[:2048].decode(errors="ignore").encode() for doc in anchor]
    return release, plugged, texts, spliced, train


def compare_routers(folder: Path) -> None:
    """Print what safe mode needs for anchor and spliced text, and its bound, for each setting."""
    release, plugged, texts, spliced, _ = _prepare(folder)
    columns = ("prior", "rate", "discount", "bound, bits a document", "a byte", "anchor", "spliced")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    own = score_documents(path_scorer(release.plug()), texts, context=512).bits_per_byte
    for prior, rate, discount in ROUTERS:
        interface = dataclasses.replace(
            release.interface, backbone_prior=prior, switch_rate=rate, discount=discount
        )
        model = Model(release.backbone, interface, plugged)
        anchor, switching = (
            score_documents(safe_scorer(model), documents, context=model.context).bits_per_byte
            for documents in (texts, spliced)
        )
        once, each = -math.log2(prior), -math.log2(1 - rate * (1 - prior))
        print(
            f"| {prior} | {rate} | {discount} | {once:.4f} | {each:.6f} | {anchor / own - 1:+.4%} "
            f"| {switching:.4f} |",
            flush=True,
        )


def compare_filters(folder: Path) -> None:
    """Print what mix mode needs for the same texts, and for training text, for each filter.

    Beside it the worst that one expert alone costs the anchor, of which vetting allows 1 %, and how
    many experts are run per token of the spliced texts.
    """
    release, plugged, texts, spliced, train = _prepare(folder)
    print(
        "| power, prior, rate | margin | floor, most | anchor | spliced | own | one alone | run |"
    )
    print("|---" * 8 + "|")
    own = [doc.text.encode()[:1024] for documents in train.values() for doc in documents[:8]]
    own = [text.decode(errors="ignore").encode() for text in own]
    vetted = vetted_texts(release.anchor)

    def bits(model: Model, documents: Sequence[bytes], scorer: Any = mix_scorer) -> float:
        return score_documents(scorer(model), documents, context=model.context).bits_per_byte

    for power, prior, share, rate, margin, floor, most in FILTERS:
        interface = dataclasses.replace(
            release.interface,
            mix_power=power,
            mix_prior=prior,
            mix_share=share,
            mix_switch_rate=rate,
            mix_margin=margin,
            mix_floor=floor,
            mix_top_k=most,
        )
        model = Model(release.backbone, interface, plugged)
        cells = "".join(f" {bits(model, documents):.4f} |" for documents in (texts, spliced, own))
        alone = [Model(release.backbone, interface, [expert]) for expert in plugged]
        worst = max(bits(one, vetted) / bits(one, vetted, path_scorer) - 1 for one in alone)
        tokens = [release.tokenizer.encode(text)[: model.context] for text in spliced]
        run = np.mean(
            np.concatenate(
                [(np.asarray(model.route(np.array([t])))[0] > 0).sum(-1) for t in tokens]
            )
        )
        print(
            f"| {power}, {prior}, {share}, {rate} | {margin} | {floor}, {most} |{cells} "
            f"{worst:+.2%} | {run:.2f} |",
            flush=True,
        )


def compare_training(steps: int, names: Sequence[str]) -> None:
    """Print what an expert scores on the text that its own training holds out, per optimiser."""
    release = load_backbone(BACKBONE_NAME)
    optimizers = {"adamw": loop.adamw, "muon": loop.muon}
    print("expert  optimiser  peak rate | own held-out bits per byte, scout's training bits")
    for name in names:
        for optimizer, rate in TRAININGS:
            cfg = dataclasses.replace(expert_config(steps), learning_rate=rate)
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                manifest = shipped_folder(name) / "expert.toml"
                (folder / "expert.toml").write_text(manifest.read_text())
                train = shipped_folder(name) / "text" / "train.jsonl"
                tuned = optimizers[optimizer](cfg)
                record = train_expert(release, folder, [train], cfg, optimizer=tuned)
                verdict = check_expert(release, folder)
            bits = verdict.measured["bits_per_byte"]["own_expert"]
            print(f"{name}  {optimizer}  {rate} | {bits:.3f}  {record['last']['scout_bits']:.3f}")


def compare_scouts(names: Sequence[str]) -> None:
    """Print what scouts score, in bits per class, on documents kept back from training text."""
    release = load_backbone(BACKBONE_NAME)
    backbone, interface = release.backbone, release.interface
    print("text  width  tokens  times  optimiser  rate  bits  seconds")
    for name in names:
        documents = read_documents([shipped_folder(name) / "text" / "train.jsonl"])
        parts = [documents[len(documents) // 8 :], documents[: len(documents) // 8]]
        learnt, kept = (
            trunk_features(backbone, cut_rows(token_stream(d, release.tokenizer), _WINDOW, n))
            for d, n in zip(parts, (400_000, 50_000), strict=True)
        )
        for width, thousands, times, kind, rate in READINGS:
            n_rows = min(len(learnt.classes_RT), thousands * 1000 // _WINDOW)
            some = Features(learnt.feature_RTD[:n_rows], learnt.classes_RT[:n_rows])
            scout = Scout(interface.d_model, width, interface.n_classes, rngs=nnx.Rngs(0))
            fitted = train_scout(
                scout,
                some,
                steps=times * n_rows // SCOUT_ROWS,
                learning_rate=rate,
                optimizer=getattr(loop, kind),
            )
            nats = scout_loss(
                fitted.scout, jnp.asarray(kept.feature_RTD), jnp.asarray(kept.classes_RT)
            )
            print(
                f"{name}  {width}  {n_rows * _WINDOW:,}  "
                f"{fitted.steps * SCOUT_ROWS / n_rows:.1f}  {kind}  {rate}  "
                f"{nats / math.log(2):.3f}  {fitted.seconds:.1f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    router = commands.add_parser("router")
    router.add_argument("folder", type=Path)
    filters = commands.add_parser("filters")
    filters.add_argument("folder", type=Path)
    training = commands.add_parser("training")
    training.add_argument("--steps", type=int, default=200)
    training.add_argument("--experts", nargs="+", default=["python-code"])
    scouts = commands.add_parser("scouts")
    scouts.add_argument("--experts", nargs="+", default=["python-code"])
    arguments = parser.parse_args()
    if arguments.command == "router":
        compare_routers(arguments.folder)
    elif arguments.command == "filters":
        compare_filters(arguments.folder)
    elif arguments.command == "training":
        compare_training(arguments.steps, arguments.experts)
    else:
        compare_scouts(arguments.experts)


if __name__ == "__main__":
    main()
