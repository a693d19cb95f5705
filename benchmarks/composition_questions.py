"""What else is asked of a community: neighbours, growth, hostile guests, unequal contributors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import composition_methods as methods
from benchmarks.composition_run import PUBLIC, Community, contribute
from composable.assembly.backbones import BackboneRelease
from composable.assembly.contribution import expert_config
from composable.assembly.experts import load_expert, make_expert
from composable.model.model import Model, Pluggable
from composable.packaging.manifest import Manifest


def neighbours(c: Community) -> None:
    """Fill the cells of mix mode without each expert: what its coming and going changes."""
    for name in c.names:
        rest = [expert for expert in c.plugged if expert.name != name]
        c.run.cell(
            c.seed, f"without {name}", lambda rest=rest: methods.shipped(c.plug(rest).parts, "mix")
        )


def unequal(c: Community) -> None:
    """Fill the cells of mix mode where the first contributor had less of something."""
    run, name = c.run, c.names[0]
    text = run.text(name, "train")
    steps, rate = run.preset.steps, expert_config(1).learning_rate
    weaker: dict[str, dict[str, Any]] = {
        "a tenth of the text": {"documents": text[: max(4, len(text) // 10)]},
        "a quarter of the steps": {"steps": max(1, steps // 4)},
        "rank 16": {"kind": "lora", "rank": 16},
        "another seed": {"seed": c.seed + 1000},
        "a third of the rate": {"learning_rate": rate / 3},
    }
    for how, job in weaker.items():
        documents = job.pop("documents", text)
        other = f"{name}-{how.replace(' ', '-')}"
        folder = contribute(run, c.seed, other, documents, **job)
        expert = load_expert(run.release, folder)
        rest = [expert for expert in c.plugged if expert.name != name]
        model = c.plug([*rest, expert])
        slots = model.parts.bank.slots
        index = model.names.index(other)
        own = jax.tree.map(lambda w, i=index: w[i].astype(jnp.float32), slots)
        alone = methods.path(run.release.backbone, own)
        run.cell(c.seed, f"unequal, own, {how}", lambda alone=alone: alone, [name])
        run.cell(c.seed, f"unequal, {how}", lambda m=model: methods.shipped(m.parts, "mix"))


def hostile_experts(c: Community) -> dict[str, Pluggable]:
    """Return guests that are broken or mean harm, each made of an honest contributor's parts."""
    honest, other = c.plugged[0], c.plugged[1]
    release = c.run.release
    noise = jax.random.key(7)

    def changed(module: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
        graph, state = nnx.split(module)
        return nnx.merge(graph, jax.tree.map(change, state))

    def harmful(scale: float) -> Any:
        return changed(honest.body, lambda x: scale * jax.random.normal(noise, x.shape, x.dtype))

    blank = load_untrained(release, c.folders[honest.name])
    sure = changed(honest.scout, lambda x: 30.0 * x)
    public_scout = release.backbone.scout
    guests = {
        "untrained scout, harmful body": (harmful(1.0), blank.scout),
        "overconfident scout, harmful body": (harmful(1.0), sure),
        "copy of a neighbour's scout, harmful body": (harmful(1.0), other.scout),
        "copy of the backbone's scout, harmful body": (harmful(1.0), public_scout),
        "copy of the backbone's scout, subtle body": (harmful(0.05), public_scout),
        "body of NaN": (changed(honest.body, lambda x: jnp.full_like(x, jnp.nan)), other.scout),
        "scout of NaN": (
            honest.body,
            changed(honest.scout, lambda x: jnp.full_like(x, jnp.nan)),
        ),
        "huge norms": (harmful(1e4), other.scout),
    }
    return {
        name: Pluggable(name="guest", body=body, scout=scout, key=99)
        for name, (body, scout) in guests.items()
    }


def load_untrained(release: BackboneRelease, folder: Path) -> Any:
    """Return the expert of a folder as it was before training."""
    return make_expert(release, Manifest.read(folder), seed=3)


def hostile(c: Community) -> None:
    """Fill the cells of both modes with each guest plugged in."""
    for name, guest in hostile_experts(c).items():
        model = c.plug([*c.plugged, guest])
        for mode in ("mix", "safe"):
            c.run.cell(
                c.seed,
                f"hostile, {mode}, {name}",
                lambda m=model, mode=mode: methods.shipped(m.parts, mode),
            )
        c.run.cell(
            c.seed,
            f"hostile, weights, {name}",
            lambda m=model: methods.shipped(m.parts, "mix", is_traced=True),
            [PUBLIC],
        )


def growth(c: Community) -> None:
    """Fill the cells of communities of growing size: parts of domains, rivals and near-copies."""
    run, sizes = c.run, c.run.preset.growth
    if not sizes:
        return
    parts = max(sizes) // len(c.names)
    small: list[list[Pluggable]] = []
    for part in range(parts):
        row = []
        for name in c.names:
            documents = run.text(name, "train")[part::parts]
            folder = contribute(
                run, c.seed, f"{name}-part-{part}", documents, steps=run.preset.steps // 2
            )
            row.append(load_expert(run.release, folder))
        small.append(row)
    ordered = [expert for row in small for expert in row]
    for size in sizes:
        model = Model(
            run.release.backbone,
            run.release.interface,
            ordered[:size],
            tokenizer=run.release.tokenizer,
        )
        run.cell(c.seed, f"growth {size}", lambda m=model: methods.shipped(m.parts, "mix"))
        run.cell(
            c.seed,
            f"growth {size}, paths",
            lambda m=model, n=size: methods.all_paths(
                run.release.backbone, methods.stack_of(m.parts, n + 1)
            ),
        )
