"""Every rival of the composition benchmark, and the router with one thing changed, for a community.

How a method runs is in `composition_methods`; here is what it is given by whom.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.composition import ensembles, methods
from benchmarks.composition.contributor import SCOUTS
from benchmarks.composition.run import PUBLIC_TEXT, Community, Make, Step
from composable.interface import DiscountedRecord, SwitchingFilter
from composable.model.body import MATRICES
from composable.training.data import batches, token_stream
from composable.training.loop import fit
from composable.training.optimizers import muon
from composable.workflows.train import expert_config
from composable.workflows.trunk_cache import cut_rows


def plain_methods(community: Community) -> dict[str, Make]:
    """Return the backbone alone and our two modes, as cells that score every target."""
    c = community
    return {
        "backbone": lambda: methods.path(c.run.release.backbone, methods.entry(c.stack, 0)),
        "mix": lambda: methods.shipped(c.model.parts, "mix"),
        "safe": lambda: methods.shipped(c.model.parts, "safe"),
    }


def isolated_methods(community: Community) -> dict[str, Make]:
    """Return every method whose contributors never met, as cells that score every target."""
    c, release = community, community.run.release
    backbone, n = release.backbone, len(community.names) + 1
    is_full = c.is_full
    made: dict[str, Make] = {
        **plain_methods(c),
        "random": lambda: methods.mixture(backbone, c.stack, methods.Random(jnp.ones(n))),
        "uniform": lambda: methods.mixture(backbone, c.stack, methods.Constant(jnp.full(n, 1 / n))),
        "average": lambda: methods.path(backbone, methods.average(c.stack)),
    }
    for scale in (0.3, 0.5, 1.0) if is_full else (0.5,):
        made[f"task_arithmetic {scale}"] = lambda scale=scale: methods.path(
            backbone, methods.task_arithmetic(c.stack, scale)
        )
        made[f"ties {scale}"] = lambda scale=scale: methods.path(
            backbone, methods.ties(c.stack, scale)
        )
    gates: dict[str, Any] = {"arrow": _arrow_gate(c)}
    if c.is_first:
        gates["phatgoose"] = _phatgoose_gate(c)
        made |= _flex_methods(c)
    for temperature in (0.05, 1.0) if is_full else (0.05,):
        gates[f"lda temperature {temperature}"] = _discriminant(c, temperature, is_linear=True)
        gates[f"qda temperature {temperature}"] = _discriminant(c, temperature, is_linear=False)
    for temperature in (5.0, 20.0) if is_full else (20.0,):
        gates[f"dume temperature {temperature}"] = _ridge(c, temperature)
    for name, gate in gates.items():
        made[name] = lambda gate=gate: methods.mixture(backbone, c.stack, gate)
    return made


# For how long FlexOlmo's router is tuned, in a contributor's steps. The first is what its authors
# chose: 5B tokens, where every expert had 50B.
TUNING_SHARES: Final = (0.1, 0.25, 1.0)
# So many rows of public text, evenly spread, are looked through for proxies.
_PUBLIC_ROWS: Final = 8192


def _flex_methods(c: Community) -> dict[str, Make]:
    """Return FlexOlmo with its router as it is joined, and tuned; the tuning is done here."""
    backbone, stack, steps = c.run.release.backbone, _flex_stack(c), c.run.preset.steps
    gates: dict[tuple[str, str], methods.PerSlot] = {}
    for bias in (0.0, -1.0) if c.is_full else (0.0,):
        gates["flexolmo", f"bias {bias}"] = joined = _flex_gate(c, bias)
        for share in TUNING_SHARES if c.is_full else ():
            setting = f"bias {bias} steps {(n := round(share * steps))}"
            gates["flexolmo-tuned", setting] = _tune_flex(c, stack, joined, setting, n)
    return {
        f"{family} top{k} {setting}": lambda gate=gate, k=k: methods.mixture(
            backbone, stack, dataclasses.replace(gate, k=k)
        )
        for (family, setting), gate in gates.items()
        for k in ((1, 2, 4) if c.is_full else (2,))
    }


def _flex_stack(c: Community) -> methods.Slots:
    slots = range(len(c.stack))
    own = methods.entry(c.stack, 0)
    return tuple(
        {
            name: jnp.concatenate(
                [own[i][name][None], jnp.asarray(c.extra(f"flex_{name}_{i}", skip_public=True))]
            )
            for name in MATRICES
        }
        for i in slots
    )


def _flex_gate(c: Community, bias: float) -> methods.PerSlot:
    """Return the rows of everybody's router, joined; all experts speak."""
    public_1LD = c.extras[1]["flex_public_LD"][None]
    rows_ELD = np.concatenate([public_1LD, c.extra("flex_row_LD", skip_public=True)])
    row_LED = jnp.asarray(rows_ELD.swapaxes(0, 1))
    bias_LE = jnp.full(row_LED.shape[:2], bias).at[:, 0].set(0.0)
    return methods.PerSlot(row_LED, bias_LE, "row", len(rows_ELD))


def _tune_flex(
    c: Community, stack: methods.Slots, joined: methods.PerSlot, setting: str, steps: int
) -> methods.PerSlot:
    """Return FlexOlmo's gate, rows and biases tuned on public text that stands in for the others.

    Everybody's text has a proxy: the rows of public text most like it, by a classifier of the two.
    The proxies and rows of public text drawn uniformly have an equal share each, all experts speak,
    blocks are frozen, biases stay below 0, and loads are not balanced, as in the released recipe.
    Departures: the classifier is a linear discriminant, in closed form from published moments;
    Muon stands for AdamW; the small penalty on logits is left out.

    References:
        Shi et al. 2025, arXiv:2507.07024, section 3.3 (router training on proxy data, optional);
        allenai/FlexOlmo, `OLMoE-7x7B.py` and `train_router.sh`.
    """

    def tuned(router: Any) -> methods.PerSlot:
        row_LED, bias_LE = jnp.stack(router["row"]), jnp.minimum(jnp.stack(router["bias"]), 0.0)
        return dataclasses.replace(joined, row_LED=row_LED, bias_LE=bias_LE.at[:, 0].set(0.0))

    def objective(router: Any, frozen: Any, tokens_BT: jax.Array) -> Any:
        inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        nats_BT, _ = methods.mixture_costs(*frozen, tuned(router), inputs_BT, targets_BT, None)
        return nats_BT.mean(), {}

    start = {"row": list(joined.row_LED), "bias": list(joined.bias_LE)}
    name, frozen = f"flexolmo-tuned {setting}", (c.run.release.backbone, stack)
    return tuned(_train_jointly(c, name, objective, start, frozen, steps, read=_proxies))


@cache
def _proxies(c: Community) -> list[np.ndarray]:
    """Return uniformly drawn public text and everybody's proxy, together as long as a contributor
    reads."""
    release, cfg = c.run.release, expert_config(c.run.preset.steps, rows=c.run.preset.rows)
    stream = token_stream(c.run.text(PUBLIC_TEXT, "train"), release.tokenizer)
    rows_BT = cut_rows(stream, cfg.window, cfg.window * _PUBLIC_ROWS)[:, :-1]

    @jax.jit
    def pooled(tokens_BT: jax.Array) -> jax.Array:
        x_BTD, _ = release.backbone.trunk(tokens_BT)
        return methods.pool(release.backbone.features(x_BTD), None)[0].mean(1)

    pooled_RD = np.concatenate([pooled(rows_BT[i : i + 32]) for i in range(0, len(rows_BT), 32)])
    n = -(-cfg.steps * cfg.batch_size // (len(c.names) + 1))
    drawn_1N = np.random.default_rng(c.seed).choice(len(rows_BT), (1, n), replace=False)
    picked_EN = np.concatenate([drawn_1N, nearest_rows(pooled_RD, *_moments(c), n)])
    return [rows_BT[picked_N].ravel() for picked_N in picked_EN]


def nearest_rows(
    pooled_RD: np.ndarray, mean_ED: np.ndarray, spread_EDD: np.ndarray, n: int
) -> np.ndarray:
    """Return which rows of public text are most like each contributor's and least like the public.

    Args:
        pooled_RD: Mean pooled features of each row.
        mean_ED: Mean pooled features of public text, then of each contributor's.
        spread_EDD: Their covariances.
        n: Rows for each contributor.

    Returns:
        Indices, one line of n per contributor, the likest first.
    """
    lines = []
    for index in range(1, len(mean_ED)):
        pair = [0, index]
        w_DE, _ = _linear_discriminant(mean_ED[pair], spread_EDD[pair])
        lines.append(np.argsort(pooled_RD @ (w_DE[:, 0] - w_DE[:, 1]), kind="stable")[:n])
    return np.stack(lines)


def _phatgoose_gate(c: Community) -> methods.PerSlot:
    rows_ELD = c.extra("gate_LD", skip_public=True)
    rows_LED = jnp.asarray(rows_ELD.swapaxes(0, 1))
    return methods.PerSlot(rows_LED, jnp.zeros(rows_LED.shape[:2]), "standard", 2)


def _arrow_gate(c: Community) -> methods.PerSlot:
    """Return the input direction along which each body changes most (its first singular vector)."""
    rows = []
    for slot in c.stack:
        change_EDF = np.concatenate(
            [np.asarray(slot[name][1:] - slot[name][:1]) for name in ("w_gate", "w_up")], axis=2
        )
        rows.append(np.linalg.svd(change_EDF, full_matrices=False)[0][:, :, 0])
    row_LED = jnp.asarray(np.stack(rows))
    return methods.PerSlot(row_LED, jnp.zeros(row_LED.shape[:2]), "arrow", 2)


def _moments(c: Community) -> tuple[np.ndarray, np.ndarray]:
    mean_ED = c.extra("pooled_mean_D")
    spread_EDD = c.extra("pooled_moment_DD") - mean_ED[:, :, None] * mean_ED[:, None]
    return mean_ED, spread_EDD


def _shared_spread(spread_EDD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean covariance, and the ridge to add to it."""
    shared_DD = spread_EDD.mean(0)
    width = len(shared_DD)
    return shared_DD, np.eye(width) * np.trace(shared_DD) / width * 1e-2


def _linear_discriminant(
    mean_ED: np.ndarray, spread_EDD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and constants of Gaussian log likelihoods, but for what all have in common."""
    shared_DD, ridge_DD = _shared_spread(spread_EDD)
    w_DE = np.linalg.inv(shared_DD + ridge_DD) @ mean_ED.T
    return w_DE, -0.5 * np.einsum("ed,de->e", mean_ED, w_DE)


def _discriminant(c: Community, temperature: float, *, is_linear: bool) -> Any:
    """Return LDA, or QDA with covariances shrunk by 0.3 towards the shared one."""
    mean_ED, spread_EDD = _moments(c)
    if is_linear:
        w_DE, b_E = _linear_discriminant(mean_ED, spread_EDD)
        as_jax = (jnp.asarray(x, jnp.float32) for x in (w_DE, b_E, temperature))
        return methods.Linear(*as_jax, k=2)
    shared_DD, ridge_DD = _shared_spread(spread_EDD)
    shrunk_EDD = 0.7 * spread_EDD + 0.3 * shared_DD + ridge_DD
    constant_E = -0.5 * np.linalg.slogdet(shrunk_EDD)[1]
    arrays = (mean_ED, np.linalg.inv(shrunk_EDD), constant_E, temperature)
    return methods.Quadratic(*(jnp.asarray(x, jnp.float32) for x in arrays), k=2)


def _ridge(c: Community, temperature: float) -> methods.Linear:
    """Return a ridge regression from pooled features to who wrote them, from summed moments."""
    mean_ED, moment_EDD = c.extra("pooled_mean_D"), c.extra("pooled_moment_DD")
    total_DD = moment_EDD.sum(0)
    ridge_DD = np.eye(len(total_DD)) * np.trace(total_DD) / len(total_DD) * 1e-3
    w_DE = np.linalg.solve(total_DD + ridge_DD, mean_ED.T)
    zeros_E = jnp.zeros(len(mean_ED))
    return methods.Linear(jnp.asarray(w_DE, jnp.float32), zeros_E, jnp.float32(temperature), k=2)


def cluster_gate(c: Community, temperature: float) -> methods.Quadratic:
    """Return c-BTM's weights: exp(-squared distance to a cluster's centre / temperature).

    Distances are per feature, between pooled trunk features and their mean over a contributor's
    text, where the paper takes tf-idf vectors and k-means.

    References:
        Gururangan et al. 2023, arXiv:2303.14177, equation 2.
    """
    mean_ED = c.extra("pooled_mean_D")
    n, width = mean_ED.shape
    same_EDD = np.broadcast_to(np.eye(width), (n, width, width))
    arrays = (mean_ED, same_EDD, np.zeros(n), 2.0 / (temperature * width))
    return methods.Quadratic(*(jnp.asarray(x, jnp.float32) for x in arrays), k=n)


CLUSTER_TEMPERATURES: Final = (0.01, 0.1)


def path_methods(community: Community) -> dict[str, Make]:
    """Return what methods that mix probabilities of whole paths need, as cells of shape NTE."""
    c, backbone = community, community.run.release.backbone
    made: dict[str, Make] = {"paths": lambda: ensembles.all_paths(backbone, c.stack)}
    for temperature in () if c.run.preset.is_short else CLUSTER_TEMPERATURES:
        made[f"c-btm weights {temperature}"] = lambda temperature=temperature: methods.weights(
            backbone, cluster_gate(c, temperature), len(c.names) + 1
        )
    rules = ensembles.ensemble_rules(c.run.release.interface.backbone_prior)
    made["btm-scouts costs"] = lambda: ensembles.ensembles(c.model.parts, list(rules.values()))
    return made


# Mix mode's settings in earlier versions of the interface.
_MARGINS: Final = dict(power=0.35, backbone_prior=0.2, max_expert_prior=0.1, margin=0.3, top_k=4)
V1_4: Final[Mapping[str, Any]] = {"mix": SwitchingFilter(**_MARGINS, switch_rate=0.02, floor=0.1)}
V1_3: Final[Mapping[str, Any]] = {
    "mix": SwitchingFilter(**_MARGINS, switch_rate=0.02, floor=0.06),
    "output_mixture": None,
}
V1_2: Final[Mapping[str, Any]] = {
    "mix": SwitchingFilter(power=0.35, backbone_prior=0.8, switch_rate=0.003, top_k=2),
    "output_mixture": None,
}


def router_ablations(community: Community) -> dict[str, Make]:
    """Return the router with one thing changed at a time.

    Scouts of other kinds only route; they are to be held against the published ones that do.
    """
    c, release = community, community.run.release
    interface, backbone = release.interface, release.backbone
    own, mixture = interface.mix, interface.output_mixture
    records: dict[str, Any] = {"mix": DiscountedRecord(floor=own.floor, top_k=own.top_k)}

    def mix(**changes: Any) -> Mapping[str, Any]:
        return {"mix": dataclasses.replace(own, **changes)}

    def scouts(**changes: Any) -> Mapping[str, Any]:
        return {"output_mixture": dataclasses.replace(mixture, **changes)}

    rules: dict[str, Mapping[str, Any]] = {
        "scouts only route": {"output_mixture": None},
        "no pool": scouts(power=1.0),
        "no margin": mix(margin=0.0),
        "track records": records,
        "power 1": mix(power=1.0),
    }
    if c.is_full:
        rules |= {f"top {k}": mix(top_k=k) for k in (1, 2)}
        rules["no floor"] = mix(floor=0.0)
        rules |= {f"scouts' power {power}": scouts(power=power) for power in (0.4, 0.8)}
        rules |= {f"scouts' prior {prior}": scouts(prior=prior) for prior in (0.01, 0.2)}
        rules |= {f"floor {floor}": mix(floor=floor) for floor in (0.06, 0.2)}
        rules |= {f"margin {margin}": mix(margin=margin) for margin in (0.15, 0.45)}
        rules |= {f"power {power}": mix(power=power) for power in (0.2, 0.5)}
        rules |= {f"rate {rate}": mix(switch_rate=rate) for rate in (0.005, 0.04)}
        rules |= {f"prior {prior}": mix(backbone_prior=prior) for prior in (0.1, 0.5)}
        rules |= {"version 1.4.0": V1_4, "version 1.3.0": V1_3, "version 1.2.0": V1_2}
        for discount in (0.9, 0.99, 1.0):
            rules[f"track records, discount {discount}"] = {**records, "discount": discount}
        rules["track records, prior 0.5"] = {**records, "backbone_prior": 0.5}
    made: dict[str, Make] = {
        f"router, {name}": lambda rule=rule: methods.shipped(c.plug(c.plugged, **rule).parts, "mix")
        for name, rule in rules.items()
    }
    base = methods.Scouts(scouts=c.scouts, interface=interface, tap=backbone.cfg.tap)
    unigram = methods.unigram_scouts(c.extra("unigram_C"), interface.d_model)
    others = {"unigram scouts": dataclasses.replace(base, scouts=unigram)}
    for name, variant in SCOUTS.items() if c.has_scouts else ():
        others[f"scouts {name}"] = dataclasses.replace(
            base, scouts=c.variant_scouts(name), tap=backbone.cfg.tap + variant.tap
        )
    for name, gate in others.items():
        made[f"router, {name}, only routing"] = lambda gate=gate: methods.mixture(
            backbone, c.stack, gate
        )
    return made


# ---- references that break the rules -----------------------------------------------------------


# Peak rates of the dense model. That of experts, 0.01, is too high for all weights at once: trained
# on at that rate it gets worse. The first is best here, and what a second generation is trained at.
DENSE_RATES: Final = (3e-3, 1e-3, 1e-2)


def reference(c: Community) -> None:
    """Fill the cells of what is trained on everybody's text."""
    cells = {"btx": lambda: train_btx(c)}
    for rate in DENSE_RATES if c.is_full else DENSE_RATES[:1]:
        cells[f"dense rate {rate}"] = lambda rate=rate: train_dense(c, rate)
    c.run.fill(c.seed, cells)


def train_btx(community: Community) -> Step:
    """Return BTX: experts and a learned router trained together on everybody's text.

    References:
        Sukhbaatar et al. 2024, arXiv:2403.07816: top-2 routing, load-balancing loss (their
        equation 3, weight 0.01). Attention and trunk stay frozen, as they are in every expert.
    """
    c = community
    backbone = c.run.release.backbone
    first, n = backbone.cfg.tap, len(c.names) + 1

    def mixed(trained: Any, backbone: Any, tokens_BT: jax.Array) -> Any:
        balance = 0.0
        shares = []

        def run(layer: int, x_BTD: jax.Array) -> jax.Array:
            logit_BTE = x_BTD @ trained["router"][str(layer)]
            top_BTJ, expert_BTJ = jax.lax.top_k(logit_BTE, 2)
            choice = expert_BTJ, jax.nn.softmax(top_BTJ, axis=-1)
            used_E = jax.nn.one_hot(expert_BTJ[..., 0], n).mean((0, 1))
            shares.append((used_E * jax.nn.softmax(logit_BTE).mean((0, 1))).sum())
            return methods.mix_blocks(trained["stack"][layer - first], x_BTD, *choice)

        x_BTD, _ = backbone.trunk(tokens_BT)
        logits_BTV, _ = backbone.upper(x_BTD, run)
        balance = n * sum(shares) / len(shares)
        return logits_BTV, balance

    def objective(trained: Any, backbone: Any, tokens_BT: jax.Array) -> Any:
        logits_BTV, balance = mixed(trained, backbone, tokens_BT[:, :-1])
        loss = methods.costs(logits_BTV, tokens_BT[:, 1:]).mean()
        return loss + 0.01 * balance, {}

    router = {str(layer): jnp.zeros((backbone.cfg.d_model, n)) for layer in backbone.cfg.slots}
    start = {"stack": c.stack, "router": router}
    # As many tokens as a quarter of all contributors' training together, on top of it.
    steps = c.run.preset.steps * len(c.names) // 4
    trained = _train_jointly(c, "btx", objective, start, backbone, steps)
    return methods.whole(lambda tokens_BT: mixed(trained, backbone, tokens_BT)[0])


def train_dense(community: Community, rate: float, generations: int = 1) -> Step:
    """Return one dense model: all weights, everybody's text, as many tokens as all experts."""
    c = community
    parts: Any = nnx.split(c.run.release.backbone, nnx.Param, ...)
    graph, params, rest = parts

    def objective(params: Any, rest: Any, tokens_BT: jax.Array) -> Any:
        logits_BTV = nnx.merge(graph, params, rest)(tokens_BT[:, :-1])
        return methods.costs(logits_BTV, tokens_BT[:, 1:]).mean(), {}

    steps = c.run.preset.steps * len(c.names)
    trained = params
    for n in range(generations):
        name = f"dense rate {rate}, generation {n + 1}"
        settings = {"rate": rate, "seed": c.seed + n}
        trained = _train_jointly(c, name, objective, trained, rest, steps, **settings)
    return methods.whole(nnx.merge(graph, trained, rest))


def _all_texts(c: Community) -> list[np.ndarray]:
    texts = [c.run.text(x, "train") for x in (*c.run.preset.domains, PUBLIC_TEXT)]
    return [token_stream(documents, c.run.release.tokenizer) for documents in texts]


def _train_jointly(
    c: Community,
    name: str,
    objective: Any,
    start: Any,
    frozen: Any,
    steps: int,
    *,
    read: Callable[[Community], list[np.ndarray]] = _all_texts,
    rate: float | None = None,
    seed: int | None = None,
) -> Any:
    """Train on an equal share of each stream: by default all texts, the public one among them."""
    path = c.run.folder / f"seed-{c.seed}" / f"{name}.npz"
    leaves, structure = jax.tree.flatten(start)
    if not path.exists():
        c.run.say(f"seed {c.seed}: training {name}, {steps} steps")
        began = time.perf_counter()
        streams = read(c)
        shortest = min(map(len, streams))
        cfg = expert_config(steps, c.seed if seed is None else seed, rows=c.run.preset.rows)
        if rate is not None:
            cfg = dataclasses.replace(cfg, learning_rate=rate)
        stream = np.concatenate([stream[:shortest] for stream in streams])
        data = batches(stream, window=cfg.window, batch_size=cfg.batch_size, seed=cfg.seed)
        trained = fit(objective, start, frozen, data, cfg, optimizer=muon(cfg)).trained
        leaves = jax.tree.leaves(trained)
        part = path.with_suffix(".part.npz")
        np.savez(part, **{str(i): np.asarray(x) for i, x in enumerate(leaves)})
        part.rename(path)
        c.run.note_seconds(f"seed-{c.seed}/train {name}", time.perf_counter() - began)
    with np.load(path) as file:
        return jax.tree.unflatten(
            structure, [jnp.asarray(file[str(i)]) for i in range(len(leaves))]
        )
