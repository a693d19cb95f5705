"""What else is asked of a community: peers, growth, adversarial experts, unequal contributors."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.composition import ensembles, methods
from benchmarks.composition.rivals import DENSE_RATES, train_dense
from benchmarks.composition.run import PUBLIC, SPLICED, Community, Make, Step, contribute
from benchmarks.scout_correlation import noised
from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert, make_expert
from composable.kernels import default_block
from composable.model.model import Model, Pluggable
from composable.model.scout import Scout
from composable.packaging.manifests.manifest import Manifest
from composable.training.data import token_stream
from composable.training.scouts import Features, train_scout
from composable.workflows.train import expert_config
from composable.workflows.trunk_cache import (
    count_trunk_parameters,
    count_upper_parameters,
    cut_rows,
    trunk_features,
)


def peers(c: Community) -> None:
    """Fill the cells of mix mode without each expert: what its coming and going changes."""

    def without(name: str) -> Step:
        rest = [expert for expert in c.plugged if expert.name != name]
        return methods.shipped(c.plug(rest).parts, "mix")

    c.run.fill(c.seed, {f"without {name}": partial(without, name) for name in c.names})


def unequal(c: Community) -> None:
    """Fill the cells of mix mode where the first contributor had less of something."""
    run, name = c.run, c.names[0]
    if not c.is_full:
        return
    text = run.text(name, "train")
    steps, rate = run.preset.steps, expert_config(1).learning_rate
    weaker: dict[str, dict[str, Any]] = {
        "a tenth of the text": {"documents": text[: max(4, len(text) // 10)]},
        "a quarter of the steps": {"steps": max(1, steps // 4)},
        "rank 16": {"kind": "lora", "rank": 16},
        "another seed": {"seed": c.seed + 1000},
        "a third of the rate": {"learning_rate": rate / 3},
    }

    def train(how: str) -> Pluggable:
        job = dict(weaker[how])
        documents = job.pop("documents", text)
        other = f"{name}-{how.replace(' ', '-')}"
        return load_expert(run.release, contribute(run, c.seed, other, documents, **job))

    def mixed(expert: Pluggable) -> Step:
        return methods.shipped(c.plug([*c.plugged[1:], expert]).parts, "mix")

    def alone(expert: Pluggable) -> Step:
        return methods.path(run.release.backbone, own_stack(c, expert))

    experts = dict(zip(weaker, run.map([partial(train, how) for how in weaker]), strict=True))
    run.fill(c.seed, {f"unequal, {k}": partial(mixed, e) for k, e in experts.items()})
    run.fill(c.seed, {f"unequal, own, {k}": partial(alone, e) for k, e in experts.items()}, [name])


def own_stack(c: Community, expert: Pluggable) -> methods.Slots:
    """Return the blocks of one expert."""
    return methods.entry(methods.stack_of(c.plug([expert]).parts, 2), 1)


def generations(c: Community) -> None:
    """Fill the cells of a second generation: every expert trained on from its first release.

    As many steps again, on the same text in another order; and the dense model likewise.
    """
    run, seed = c.run, c.seed + 1
    if not c.is_full:
        return

    def train(name: str) -> Pluggable:
        text, parent = run.text(name, "train"), c.folders[name]
        folder = contribute(run, c.seed, f"{name}-second", text, parent=parent, seed=seed)
        return load_expert(run.release, folder)

    experts = run.map([partial(train, name) for name in c.names])

    def alone(expert: Pluggable) -> Step:
        return methods.path(run.release.backbone, own_stack(c, expert))

    cells: dict[str, Make] = {
        f"second, {mode}": lambda mode=mode: methods.shipped(c.plug(experts).parts, mode)
        for mode in ("mix", "safe")
    }
    rate = DENSE_RATES[0]
    cells[f"second, dense rate {rate}"] = lambda: train_dense(c, rate, generations=2)
    run.fill(c.seed, cells)
    for name, expert in zip(c.names, experts, strict=True):
        run.fill(c.seed, {f"second, own, {name}": partial(alone, expert)}, [name])


def hostile_experts(c: Community) -> dict[str, Pluggable]:
    """Return adversaries, broken or harmful, each made of an honest contributor's parts."""
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
    adversaries = {
        "untrained scout, harmful body": (harmful(1.0), blank.scout),
        "overconfident scout, harmful body": (harmful(1.0), sure),
        "copy of a peer's scout, harmful body": (harmful(1.0), other.scout),
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
        name: Pluggable(name="adversary", body=body, scout=scout, key=99)
        for name, (body, scout) in adversaries.items()
    }


def load_untrained(loaded: LoadedBackbone, folder: Path) -> Any:
    """Return the expert of a folder as it was before training."""
    return make_expert(loaded.backbone, Manifest.read(folder), seed=3)


def hostile(c: Community) -> None:
    """Fill the cells of both modes with each adversary plugged in."""
    adversaries = {
        name: adversary
        for name, adversary in hostile_experts(c).items()
        if c.run.preset.is_full or name in (*_TRIED, "body of NaN")
    }

    def step(adversary: Pluggable, mode: str, is_traced: bool = False) -> Step:
        model = c.plug([*c.plugged, adversary])
        return methods.shipped(model.parts, mode, is_traced=is_traced)

    texts = [*c.names, PUBLIC]
    for mode in ("mix", "safe"):
        cells = {f"hostile, {mode}, {k}": partial(step, g, mode) for k, g in adversaries.items()}
        c.run.fill(c.seed, cells, texts)
    traced = {
        f"hostile, weights, {k}": partial(step, g, "mix", True) for k, g in adversaries.items()
    }
    c.run.fill(c.seed, traced, [PUBLIC])


# How many copies are installed, in which modes, and how a copied scout is disguised.
COPIES: Final = (1, 8)
COPY_MODES: Final = ("mix", "safe")
COPY_NOISES: Final = (0.1,)
# Copies are trained on for so many steps, on so many tokens of the copied expert's own text.
_COPY_STEPS: Final = 32
_COPY_TOKENS: Final = 65_536


def copies(c: Community) -> None:
    """Fill the cells of both modes with copies of the first contributor's scout, one and eight.

    Their body is that expert's with every matrix negated, which is harmful and stays within the
    interface's bounds. Their keys come before all others, as an author can arrange, so that exact
    ties go to them.
    """
    run, victim = c.run, c.plugged[0]
    graph, state = nnx.split(victim.body)
    body = nnx.merge(graph, jax.tree.map(jnp.negative, state))

    @cache
    def features() -> Features:
        stream_T = token_stream(run.text(c.names[0], "train"), run.release.tokenizer)
        rows_BT = cut_rows(stream_T, expert_config(1).window, _COPY_TOKENS)
        return trunk_features(run.release.backbone, rows_BT)

    def trained_on(seed: int) -> Scout:
        return train_scout(victim.scout, features(), steps=_COPY_STEPS, seed=seed).scout

    kinds: dict[str, Callable[[int], Scout]] = {"the same": lambda seed: victim.scout}
    for noise in COPY_NOISES:
        kinds[f"{noise:.0%} of noise"] = partial(noised, victim.scout, noise)
    kinds[f"trained on for {_COPY_STEPS} steps"] = trained_on

    def step(kind: str, count: int, mode: str) -> Step:
        copies = [
            Pluggable(name=f"copy-{i}", body=body, scout=kinds[kind](i), key=1 + i)
            for i in range(count)
        ]
        return methods.shipped(c.plug([*c.plugged, *copies]).parts, mode)

    cells = {
        f"copies, {mode}, {count}, {kind}": partial(step, kind, count, mode)
        for mode in COPY_MODES
        for kind in kinds
        for count in (0, *COPIES)
        if count or kind == "the same"
    }
    run.fill(c.seed, cells, [c.names[0], PUBLIC])


def adversarial(c: Community) -> None:
    """Try safe mode's bound on random inputs, with three adversarial experts plugged in.

    A third of the inputs are random bytes; a third change text every 1 to 16 bytes, drawn from all
    domains and the novel text; a third go back and forth between two stretches of such texts, of 8
    to 32 bytes. What is kept is, for every input, by how many nats safe mode cost more than the
    backbone alone, and what the bound allows.
    """
    run, n = c.run, c.run.preset.adversarial
    path = run.folder / f"seed-{c.seed}" / "adversarial.npz"
    if path.exists():
        return
    start = time.perf_counter()
    adversaries = [
        dataclasses.replace(expert, name=f"adversary-{i}", key=99 + i)
        for i, (name, expert) in enumerate(hostile_experts(c).items())
        if name in _TRIED
    ]
    parts = c.plug([*c.plugged, *adversaries]).parts
    tokens_NT = _adversarial_inputs(c, n)

    def cost(step: Step) -> np.ndarray:
        batches = np.array_split(tokens_NT, max(1, n // _INPUT_ROWS))
        nats = [step(rows_BT[:, :-1], rows_BT[:, 1:], None)[0] for rows_BT in batches]
        return np.concatenate([np.asarray(nats_BT, np.float64).sum(1) for nats_BT in nats])

    backbone = methods.path(run.release.backbone, methods.entry(c.stack, 0))
    excess_N = cost(methods.shipped(parts, "safe")) - cost(backbone)
    bound = parts.interface.safe_bound(tokens_NT.shape[1] - 1)
    np.savez(path, excess_N=excess_N, bound=bound)
    run.note_seconds(f"seed-{c.seed}/adversarial", time.perf_counter() - start)
    run.say(f"seed {c.seed} adversarial: at most {excess_N.max():.5f} nats of {bound:.5f}")


_TRIED: Final = (
    "overconfident scout, harmful body",
    "copy of a peer's scout, harmful body",
    "copy of the backbone's scout, harmful body",
)
_INPUT_TOKENS: Final = 128
_INPUT_ROWS: Final = 50


def _adversarial_inputs(c: Community, n: int) -> np.ndarray:
    """Return inputs of 128 bytes and the begin token, shape NT."""
    rng = np.random.default_rng(11)
    texts = [d.text.encode()[:4096] for docs in c.run.heldout.values() for d in docs]
    texts += [d.text.encode()[:4096] for d in c.run.text(c.run.preset.novel, "heldout")]

    def stretch(length: int) -> bytes:
        text = texts[rng.integers(len(texts))]
        start = int(rng.integers(max(1, len(text) - length)))
        return text[start : start + length]

    def make(kind: int) -> bytes:
        if kind == 0:
            return rng.integers(1, 256, _INPUT_TOKENS, dtype=np.uint8).tobytes()
        if kind == 1:
            return b"".join(stretch(int(rng.integers(1, 17))) for _ in range(_INPUT_TOKENS))
        pair = [stretch(int(rng.integers(8, 33))) for _ in range(2)]
        return b"".join(pair * _INPUT_TOKENS)

    encode = c.run.release.tokenizer.encode
    rows = [np.asarray(encode(make(i % 3)[:_INPUT_TOKENS])) for i in range(n)]
    return np.stack(rows).astype(np.int32)


def growth(c: Community) -> None:
    """Fill the cells of communities of growing size: parts of domains, rivals and near-copies."""
    run, sizes, n_names = c.run, c.run.preset.growth, len(c.names)
    if not sizes:
        return
    n_parts = -(-max(sizes) // n_names)

    def train(index: int) -> Pluggable:
        part, name = index // n_names, c.names[index % n_names]
        documents = run.text(name, "train")[part::n_parts]
        steps = run.preset.steps // 2
        folder = contribute(run, c.seed, f"{name}-part-{part}", documents, steps=steps)
        return load_expert(run.release, folder)

    experts = run.map([partial(train, index) for index in range(max(sizes))])

    def model(size: int) -> Model:
        release = run.release
        return Model(
            release.backbone, release.interface, experts[:size], tokenizer=release.tokenizer
        )

    def paths(size: int) -> Step:
        return ensembles.all_paths(
            run.release.backbone, methods.stack_of(model(size).parts, size + 1)
        )

    texts = [*c.names, PUBLIC, SPLICED]
    mixed = {
        f"growth {size}": lambda size=size: methods.shipped(model(size).parts, "mix")
        for size in sizes
    }
    run.fill(c.seed, mixed, texts)
    run.fill(c.seed, {f"growth {n}, paths": partial(paths, n) for n in sizes}, c.names)
    costs = run.folder / f"seed-{c.seed}" / "growth.json"
    if not costs.exists():
        rows = run.rows[SPLICED].tokens_NT[: methods.BATCH, : methods.WINDOW + 1]
        found = {str(size): _cost(model(size), rows) for size in sizes}
        found["all"] = _cost(c.model, rows)
        costs.write_text(json.dumps(found))


def _cost(model: Model, tokens_BT: np.ndarray) -> dict[str, float]:
    """Return what a token costs in mix mode: FLOPs as a share of the backbone's, speed, bytes.

    What is multiplied are whole blocks of rows, so the rows that fill them up are counted.
    """
    parts = model.parts
    backbone, bank, interface = parts.backbone, parts.bank, parts.interface
    cfg = backbone.cfg
    block = 3 * cfg.d_model * cfg.d_ff
    alone = count_trunk_parameters(backbone) + count_upper_parameters(backbone)
    # A scout's parameters; and what it says of every class is weighed.
    scout = sum(int(np.prod(x.shape[1:])) for x in bank.scouts) + interface.n_classes
    n_scouts = len(model.experts) + 1
    inputs = tokens_BT[:, :-1], tokens_BT[:, 1:], None
    weight_BTE = np.asarray(methods.shipped(parts, "mix", is_traced=True)(*inputs)[0])
    per_block = default_block(inputs[0].size, min(interface.n_mixed, bank.capacity))
    blocks_E = -(-(weight_BTE > 0).sum((0, 1)) // per_block)
    bodies = blocks_E.sum() * per_block / inputs[0].size
    more = len(cfg.slots) * (bodies - 1) * block
    step = methods.shipped(parts, "mix")
    jax.block_until_ready(step(*inputs)[0])
    start = time.perf_counter()
    for _ in range(_TIMED):
        jax.block_until_ready(step(*inputs)[0])
    seconds = (time.perf_counter() - start) / _TIMED
    held = sum(x.nbytes for x in jax.tree.leaves((bank.slots, bank.scouts)))
    return {
        "bodies": round(float(bodies), 3),
        "flops_of_backbone": round(float(alone + more + n_scouts * scout) / alone, 4),
        "router_share": round(n_scouts * scout / (alone + more + n_scouts * scout), 4),
        "tokens_per_second": round(inputs[0].size / seconds),
        "megabytes": round(held / 1e6, 1),
    }


_TIMED: Final = 5
