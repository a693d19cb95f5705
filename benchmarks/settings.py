"""Which settings of the router and of training are best? On text that the demo does not measure.

python -m benchmarks.settings router demo/contributors     # where `composable demo demo` ran
python -m benchmarks.settings filters demo/contributors    # mix mode's switching filter
python -m benchmarks.settings filters runs/smollm2-experts --backbone runs/smollm2-135m
python -m benchmarks.settings hedges demo/contributors     # the scouts' share of the output
python -m benchmarks.settings training --steps 200
python -m benchmarks.settings scouts --experts python-code set-mm legal
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.real_backbone import (
    DOCUMENTS,
    EXPERTS,
    PUBLIC,
    SEGMENT_BYTES,
    SEGMENTS,
    TRACED_BYTES,
    WINDOW,
    begins,
)
from composable.assembly.backbones import LoadedBackbone, load_backbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import read_documents, splice_documents
from composable.corpora.recipe import shipped_folder
from composable.demo.run import BACKBONE_NAME, CONTRIBUTORS
from composable.interface import DiscountedRecord, MixRule, OutputMixture, SwitchingFilter
from composable.model.model import Model, Pluggable
from composable.model.scout import Scout
from composable.training import loop
from composable.training.data import token_stream
from composable.training.objectives import scout_loss
from composable.training.scouts import SCOUT_ROWS, Features, train_scout
from composable.vetting.evaluation import (
    Scorer,
    mix_scorer,
    path_scorer,
    safe_scorer,
    score_documents,
    trace_routing,
)
from composable.vetting.evidence import vetted_texts
from composable.workflows.train import expert_config, train_expert
from composable.workflows.trunk_cache import cut_rows, trunk_features
from composable.workflows.vet import check_expert

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
# The same for imported backbones: what is published first, then one thing changed at a time.
IMPORTED_FILTERS: Final = (
    (0.5, 0.5, 1.0, 0.02, 0.2, 0.05, 4),
    (0.0, 0.5, 1.0, 0.02, 0.2, 0.05, 4),  # no filter: discounted track records
    (0.35, 0.5, 1.0, 0.02, 0.2, 0.05, 4),
    (1.0, 0.5, 1.0, 0.02, 0.2, 0.05, 4),
    (0.5, 0.2, 1.0, 0.02, 0.2, 0.05, 4),
    (0.5, 0.8, 1.0, 0.02, 0.2, 0.05, 4),
    (0.5, 0.5, 1.0, 0.005, 0.2, 0.05, 4),
    (0.5, 0.5, 1.0, 0.05, 0.2, 0.05, 4),
    (0.5, 0.5, 1.0, 0.02, 0.0, 0.05, 4),
    (0.5, 0.5, 1.0, 0.02, 0.4, 0.05, 4),
    (0.5, 0.5, 1.0, 0.02, 0.2, 0.0, 4),
    (0.5, 0.5, 1.0, 0.02, 0.2, 0.1, 4),
    (0.5, 0.5, 1.0, 0.02, 0.2, 0.05, 2),
    (0.35, 0.2, 0.1, 0.02, 0.3, 0.06, 4),  # that of tiny-bytes 1.3.0
)
# The scouts' share of mix mode's output: prior, rate, power. First none, then what is published.
HEDGES: Final = (
    (0.0, 0.0, 1.0),
    (0.05, 0.01, 0.6),
    (0.01, 0.01, 0.6),
    (0.2, 0.01, 0.6),
    (0.05, 0.002, 0.6),
    (0.05, 0.05, 0.6),
    (0.05, 0.01, 0.4),
    (0.05, 0.01, 0.8),
    (0.05, 0.01, 1.0),
)
# Of each domain's held-out text, how many of the documents that follow those reported, and of each
# how much.
_SPARE_DOCUMENTS: Final = 6
_SPARE_BYTES: Final = 1024
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


@dataclass(frozen=True, kw_only=True)
class Community:
    """Experts of one backbone, and text that is not reported anywhere to compare settings on.

    Args:
        release: The backbone.
        plugged: The experts.
        anchor: Public text.
        spliced: Text that switches between all domains and public text.
        own: Text of the experts' domains.
        vetted: Public text on which each expert, alone, is held against the backbone.
        window: Tokens that see each other.
    """

    release: LoadedBackbone
    plugged: Sequence[Pluggable]
    anchor: Sequence[bytes]
    spliced: Sequence[bytes]
    own: Sequence[bytes]
    vetted: Sequence[bytes]
    window: int


def demo_community(folder: Path) -> Community:
    """Return the demo's experts, and documents that they were trained on."""
    loaded = load_backbone(BACKBONE_NAME)
    train = {
        name: read_documents([shipped_folder(name) / "text" / "train.jsonl"])[:20]
        for name in CONTRIBUTORS
    }
    spliced = splice_documents({**train, PUBLIC: loaded.anchor}, 8, 5, 256, 640, 4)
    return Community(
        release=loaded,
        plugged=[load_expert(loaded, folder / name) for name in CONTRIBUTORS],
        anchor=begins(loaded.anchor, 2048),
        spliced=[document.text for document in spliced],
        own=[text for documents in train.values() for text in begins(documents, 1024)],
        vetted=vetted_texts(loaded.anchor),
        window=loaded.backbone.cfg.context,
    )


def imported_community(folder: Path, backbone: str) -> Community:
    """Return the experts of `real_backbone.py`, and what it does not report of held-out text."""
    loaded = load_backbone(backbone)
    heldout = {name: read_documents([folder / "text" / name / "heldout.jsonl"]) for name in EXPERTS}
    spare = {name: d[DOCUMENTS : DOCUMENTS + _SPARE_DOCUMENTS] for name, d in heldout.items()}
    public = [dataclasses.replace(d, text=d.text[TRACED_BYTES:]) for d in loaded.anchor]
    spliced = splice_documents({**spare, PUBLIC: public}, DOCUMENTS, 5, *SEGMENT_BYTES, SEGMENTS)
    anchor = begins(public, _SPARE_BYTES)
    return Community(
        release=loaded,
        plugged=[load_expert(loaded, folder / name) for name in EXPERTS.values()],
        anchor=anchor,
        spliced=[document.text for document in spliced],
        own=[text for documents in spare.values() for text in begins(documents, _SPARE_BYTES)],
        vetted=anchor,
        window=WINDOW,
    )


def compare_routers(community: Community) -> None:
    """Print what safe mode needs for anchor and spliced text, and its bound, for each setting.

    Scouts only route here.
    """
    release = community.release
    columns = ("prior", "rate", "discount", "bound, bits a document", "a byte", "anchor", "spliced")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    own = score_documents(
        path_scorer(release.plug()), community.anchor, context=community.window
    ).bits_per_byte
    for prior, rate, discount in ROUTERS:
        interface = dataclasses.replace(
            release.interface,
            backbone_prior=prior,
            switch_rate=rate,
            discount=discount,
            output_mixture=None,
        )
        model = dataclasses.replace(release, interface=interface).plug(community.plugged)
        anchor, switching = (
            score_documents(safe_scorer(model), documents, context=community.window).bits_per_byte
            for documents in (community.anchor, community.spliced)
        )
        once = interface.safe_bound(0) / math.log(2)
        each = interface.safe_bound(1) / math.log(2) - once
        print(
            f"| {prior} | {rate} | {discount} | {once:.4f} | {each:.6f} | {anchor / own - 1:+.4%} "
            f"| {switching:.4f} |",
            flush=True,
        )


def mix_rule(
    power: float, prior: float, share: float, rate: float, margin: float, floor: float, most: int
) -> MixRule:
    """Return a rule of mix mode from a row of `FILTERS`; without a power, that of track records."""
    if not power:
        return DiscountedRecord(floor=floor, top_k=most)
    return SwitchingFilter(
        power=power,
        backbone_prior=prior,
        switch_rate=rate,
        max_expert_prior=share,
        margin=margin,
        floor=floor,
        top_k=most,
    )


def compare_filters(
    community: Community, filters: Sequence[tuple[float, float, float, float, float, float, int]]
) -> None:
    """Print what mix mode needs for the same texts, and for the domains' own, for each filter.

    Scouts only route here.

    Beside it the worst that one expert alone costs the anchor, of which vetting allows 1 %, and how
    many experts are run per token of the spliced texts.
    """
    release = community.release
    groups = (community.anchor, community.spliced, community.own)

    def bits(
        model: Model, documents: Sequence[bytes], scorer: Callable[[Model], Scorer] = mix_scorer
    ) -> float:
        return score_documents(scorer(model), documents, context=community.window).bits_per_byte

    print(
        "| power, prior, share, rate | margin | floor, most "
        "| anchor | spliced | own | one alone | run |\n" + "|---" * 8 + "|"
    )
    backbone = release.plug()
    bases = [bits(backbone, documents, path_scorer) for documents in groups]
    vetted = bits(backbone, community.vetted, path_scorer)
    print("| backbone alone | | |" + "".join(f" {base:.4f} |" for base in bases) + " | 1.00 |")
    for power, prior, share, rate, margin, floor, most in filters:
        interface = dataclasses.replace(
            release.interface,
            mix=mix_rule(power, prior, share, rate, margin, floor, most),
            output_mixture=None,
        )
        changed = dataclasses.replace(release, interface=interface)
        model = changed.plug(community.plugged)
        found = [bits(model, documents) for documents in groups]
        cells = "".join(
            f" {f:.4f} {f / base - 1:+.2%} |" for f, base in zip(found, bases, strict=True)
        )
        # As large a bank, so that nothing is compiled again.
        capacity = model.parts.bank.capacity
        alone = [changed.plug([expert], capacity) for expert in community.plugged]
        worst = max(bits(one, community.vetted) / vetted - 1 for one in alone)
        traces = trace_routing(model, community.spliced)
        run = np.mean(np.concatenate([(weight_TE > 0).sum(-1) for weight_TE in traces]))
        print(
            f"| {power}, {prior}, {share}, {rate} | {margin} | {floor}, {most} |{cells} "
            f"{worst:+.2%} | {run:.2f} |",
            flush=True,
        )


def compare_hedges(community: Community) -> None:
    """Print what mix mode needs for the same texts, for each share of the scouts.

    Beside it the most that their share may cost a document of a thousand tokens.
    """
    release = community.release
    print("| prior, rate | power | may cost, bits | anchor | spliced | own |\n" + "|---" * 6 + "|")
    for prior, rate, power in HEDGES:
        mixture = OutputMixture(prior=prior, rate=rate, power=power) if prior else None
        interface = dataclasses.replace(release.interface, output_mixture=mixture)
        plain = dataclasses.replace(interface, output_mixture=None)
        cost = (interface.safe_bound(1000) - plain.safe_bound(1000)) / math.log(2)
        model = dataclasses.replace(release, interface=interface).plug(community.plugged)
        scores = (
            score_documents(mix_scorer(model), texts, context=community.window).bits_per_byte
            for texts in (community.anchor, community.spliced, community.own)
        )
        cells = " | ".join(f"{bits:.4f}" for bits in scores)
        print(f"| {prior}, {rate} | {power} | {cost:.2f} | {cells} |", flush=True)


def compare_training(steps: int, names: Sequence[str]) -> None:
    """Print what an expert scores on the text that its own training holds out, per optimiser."""
    loaded = load_backbone(BACKBONE_NAME)
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
                record = train_expert(loaded, folder, [train], cfg, optimizer=tuned)
                verdict = check_expert(loaded, folder)
            bits = verdict.measured["bits_per_byte"]["own_expert"]
            print(f"{name}  {optimizer}  {rate} | {bits:.3f}  {record.last['scout_bits']:.3f}")


def compare_scouts(names: Sequence[str]) -> None:
    """Print what scouts score, in bits per class, on documents kept back from training text."""
    loaded = load_backbone(BACKBONE_NAME)
    backbone, interface = loaded.backbone, loaded.interface
    print("text  width  tokens  times  optimiser  rate  bits  seconds")
    for name in names:
        documents = read_documents([shipped_folder(name) / "text" / "train.jsonl"])
        parts = [documents[len(documents) // 8 :], documents[: len(documents) // 8]]
        learnt, kept = (
            trunk_features(backbone, cut_rows(token_stream(d, loaded.tokenizer), _WINDOW, n))
            for d, n in zip(parts, (400_000, 50_000), strict=True)
        )
        for width, thousands, times, kind, rate in READINGS:
            n_rows = min(len(learnt.classes_BT), thousands * 1000 // _WINDOW)
            some = Features(learnt.feature_BTD[:n_rows], learnt.classes_BT[:n_rows])
            scout = Scout(interface.d_model, width, interface.n_classes, rngs=nnx.Rngs(0))
            fitted = train_scout(
                scout,
                some,
                steps=times * n_rows // SCOUT_ROWS,
                learning_rate=rate,
                optimizer=getattr(loop, kind),
            )
            nats = scout_loss(
                fitted.scout, jnp.asarray(kept.feature_BTD), jnp.asarray(kept.classes_BT)
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
    for command in (filters, commands.add_parser("hedges")):
        command.add_argument("folder", type=Path)
        command.add_argument(
            "--backbone",
            help="imported; `make smollm2-experts` left its experts and texts in FOLDER",
        )
    training = commands.add_parser("training")
    training.add_argument("--steps", type=int, default=200)
    training.add_argument("--experts", nargs="+", default=["python-code"])
    scouts = commands.add_parser("scouts")
    scouts.add_argument("--experts", nargs="+", default=["python-code"])
    arguments = parser.parse_args()
    if arguments.command == "training":
        return compare_training(arguments.steps, arguments.experts)
    if arguments.command == "scouts":
        return compare_scouts(arguments.experts)
    imported = getattr(arguments, "backbone", None)
    community = (
        imported_community(arguments.folder, imported)
        if imported
        else demo_community(arguments.folder)
    )
    if arguments.command == "router":
        compare_routers(community)
    elif arguments.command == "filters":
        compare_filters(community, IMPORTED_FILTERS if imported else FILTERS)
    else:
        compare_hedges(community)


if __name__ == "__main__":
    main()
