"""Hugging Face layouts of composed models: the config, and the names and shapes of the tensors.

A dense model is written as the family that computes what the backbone computes, by the table that
imports read. A mixture is written as the mixture of that family, which differs in the feed-forward
block only. This file handles neither the values of tensors nor files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import einops
import numpy as np

from composable.errors import InteropError
from composable.interop.families import (
    LLAMA,
    OLMO2,
    QWEN3,
    STRUCTURE,
    Family,
    family_of,
    rows_of,
    shape_of_axes,
    sizes_of,
    write_config,
)
from composable.model.config import BackboneConfig

DENSE: Final = "dense"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a mixture of experts is laid out.

    Args:
        name: Its name in `model_type`.
        architecture: Its name in `architectures`.
        family: The family whose tensors it has, except in the feed-forward block.
        router: Name of a layer's router, one row per expert.
        experts: Our name of a matrix: its name for layer `{i}` and expert `{e}`.
        n_experts: Field that counts the experts.
        settings: Fields that are always so.
        width: Field with the hidden width of one expert, where the family's own is another's.
        dense_layers: Field that lists layers with one plain feed-forward block. Without it all
            experts of such a layer are the same: their weights add up to one, whatever they are.
    """

    name: str
    architecture: str
    family: Family
    router: str
    experts: Mapping[str, str]
    n_experts: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    width: str | None = None
    dense_layers: str | None = None


_HF: Final = "model.layers.{i}."
_BY_PROJECTION: Final = {
    f"w_{x}": f"{_HF}mlp.experts.{{e}}.{x}_proj.weight" for x in ("gate", "up", "down")
}
MIXTRAL: Final = Layout(
    name="mixtral",
    architecture="MixtralForCausalLM",
    family=LLAMA,
    router=f"{_HF}block_sparse_moe.gate.weight",
    experts={
        matrix: f"{_HF}block_sparse_moe.experts.{{e}}.{w}.weight"
        for matrix, w in (("w_gate", "w1"), ("w_up", "w3"), ("w_down", "w2"))
    },
    n_experts="num_local_experts",
    settings={"sliding_window": None},
)
QWEN3_MOE: Final = Layout(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    family=QWEN3,
    router=f"{_HF}mlp.gate.weight",
    experts=_BY_PROJECTION,
    n_experts="num_experts",
    settings={"norm_topk_prob": True, "decoder_sparse_step": 1},
    width="moe_intermediate_size",
    dense_layers="mlp_only_layers",
)
# Runtimes may ignore `norm_topk_prob` here, which is false in the models that were released. It
# matters little: the norm after the feed-forward block takes a common factor out again, but for
# its epsilon.
FLEX_OLMO: Final = Layout(
    name="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    family=OLMO2,
    router=f"{_HF}mlp.gate.weight",
    experts=_BY_PROJECTION,
    n_experts="num_experts",
    settings={"norm_topk_prob": True},
)
LAYOUTS: Final[dict[str, Layout]] = {
    layout.name: layout for layout in (MIXTRAL, QWEN3_MOE, FLEX_OLMO)
}


@dataclass(frozen=True, kw_only=True)
class TensorPart:
    """One tensor to be written.

    Args:
        theirs: Its name.
        ours: Attribute path in `Backbone`, or `routers.{i}` for the router of a layer.
        expert: Number of the expert that it belongs to; 0 is the backbone.
        axes: Our order of axes and theirs, as einops writes them.
        shape: Its shape in their order.
    """

    theirs: str
    ours: str
    expert: int
    axes: str
    shape: tuple[int, ...]

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """Return our array in their order of axes."""
        return np.asarray(einops.rearrange(array, self.axes)) if "->" in self.axes else array


def find_layout(cfg: BackboneConfig, name: str | None = None) -> Layout:
    """Return the layout in which other runtimes compute a mixture with this backbone as we do.

    Args:
        cfg: Architecture.
        name: Name of the layout; by default the one that fits.

    Raises:
        InteropError: If it does not fit, or none does; `where` names the field that differs.
    """
    if name is None:
        family = family_of(cfg)
        return next(layout for layout in LAYOUTS.values() if layout.family is family)
    if name not in LAYOUTS:
        raise InteropError(
            f"{name!r} is not a layout ({', '.join(sorted(LAYOUTS))})", where="layout"
        )
    layout = LAYOUTS[name]
    for place, expected in {**STRUCTURE, **layout.family.implied}.items():
        value = getattr(cfg, place)
        if value != expected:
            fitting = find_layout(cfg).name
            raise InteropError(
                f"the layout {name!r} does not compute {value!r} but {expected!r}",
                where=f"config.{place}",
                hint=f"leave --layout out: {fitting!r} fits",
            )
    return layout


def dense_config(cfg: BackboneConfig) -> dict[str, Any]:
    """Return the `config.json` of a dense model."""
    return write_config(family_of(cfg), cfg)


def dense_pieces(cfg: BackboneConfig, expert: int = 0) -> list[TensorPart]:
    """Return the tensors of a model in which one expert is always on.

    Args:
        cfg: Architecture.
        expert: Whose bodies fill the slots; 0 is the backbone.
    """
    slots = tuple(f"layers.{layer}.ffn." for layer in cfg.slots)
    return [
        _piece(row.theirs, row.ours, row.layout, cfg, expert if row.ours.startswith(slots) else 0)
        for row in rows_of(family_of(cfg), cfg)
    ]


def mixture_config(
    layout: Layout, cfg: BackboneConfig, n_experts: int, top_k: int
) -> dict[str, Any]:
    """Return the `config.json` of a mixture.

    Args:
        layout: Its layout.
        cfg: Architecture.
        n_experts: Number of experts, the backbone's own feed-forward block included.
        top_k: Experts mixed per token.
    """
    config = {
        **write_config(layout.family, cfg),
        "architectures": [layout.architecture],
        "model_type": layout.name,
        layout.n_experts: n_experts,
        "num_experts_per_tok": min(top_k, n_experts),
        **layout.settings,
    }
    if layout.width is not None:
        config[layout.width] = cfg.d_ff
    if layout.dense_layers is not None:
        config[layout.dense_layers] = [i for i in range(cfg.n_layers) if i not in cfg.slots]
    return config


def mixture_pieces(layout: Layout, cfg: BackboneConfig, n_experts: int) -> list[TensorPart]:
    """Return the tensors of a mixture, the backbone's own feed-forward being expert 0.

    Arguments as for `mixture_config`.
    """
    pieces = []
    for row in rows_of(layout.family, cfg):
        _, *place = row.ours.split(".")
        if ".ffn." not in row.ours or (
            layout.dense_layers is not None and int(place[0]) not in cfg.slots
        ):
            pieces.append(_piece(row.theirs, row.ours, row.layout, cfg, 0))
            continue
        layer, matrix = int(place[0]), place[-1]
        for expert in range(n_experts):
            theirs = _spell(layout.experts[matrix], layer, expert)
            owner = expert if layer in cfg.slots else 0
            pieces.append(_piece(theirs, row.ours, row.layout, cfg, owner))
    routers = [
        TensorPart(
            theirs=_spell(layout.router, layer, 0),
            ours=f"routers.{layer}",
            expert=0,
            axes="E D",
            shape=(n_experts, cfg.d_model),
        )
        for layer in (cfg.slots if layout.dense_layers is not None else range(cfg.n_layers))
    ]
    return [*pieces, *routers]


def split_pieces(
    pieces: Sequence[TensorPart], item_bytes: int, *, max_bytes: int, max_tensors: int
) -> list[list[TensorPart]]:
    """Return the tensors file by file, in order, each file within the limits."""
    files: list[list[TensorPart]] = [[]]
    size = 0
    for piece in pieces:
        n_bytes = int(np.prod(piece.shape)) * item_bytes
        if files[-1] and (size + n_bytes > max_bytes or len(files[-1]) == max_tensors):
            files.append([])
            size = 0
        files[-1].append(piece)
        size += n_bytes
    return files


def _piece(theirs: str, ours: str, layout: str, cfg: BackboneConfig, expert: int) -> TensorPart:
    """Return a part from the row of a table, whose layout is that of imports."""
    sides = layout.split(" -> ")
    return TensorPart(
        theirs=theirs,
        ours=ours,
        expert=expert,
        axes=" -> ".join(reversed(sides)),
        shape=shape_of_axes(sides[0], sizes_of(cfg)),
    )


def _spell(name: str, layer: int, expert: int) -> str:
    return name.replace("{i}", str(layer)).replace("{e}", str(expert))
