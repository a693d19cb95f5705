"""Compile a training step for TPUs that are not here, and report what it would cost there.

Only shapes are needed: no weights are made or loaded, and nothing runs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.errors import TrainingError
from composable.interface import BodyKind
from composable.kernels import count_splash_flops
from composable.model.backbone import Backbone
from composable.model.body import Expert
from composable.model.config import BackboneConfig
from composable.parallel import make_mesh, require_divisible
from composable.parallel.chips import find_chip, tpu_devices
from composable.parallel.program import ProgramCost, measure_program
from composable.training.config import TrainConfig
from composable.training.loop import lower_step
from composable.training.objectives import backbone_objective, expert_objective, float32_masters
from composable.training.optimizers import adamw, muon


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one training step costs on a topology.

    Args:
        topology: Kind of chip and shape, such as `v5e:4x4`.
        devices: Number of chips.
        mesh: Devices along each axis.
        rows: Rows per step over all devices.
        accumulate: Parts that they are run in.
        window: Positions of a row.
        parameters: Parameters of backbone and expert.
        trained: How many of them are trained.
        own_flops_per_token: What the model itself needs, without anything computed twice.
        cost: What the compiled program costs one device.
        chip_memory: Bytes that a program may use on one.
        chip_peak: Operations per second of one.
        chip_link: Bytes per second that one exchanges with others.
        compile_seconds: Time to compile the step here.
        compile_cpu_seconds: Time of all processors in it, which a busy machine does not lengthen.
    """

    topology: str
    devices: int
    mesh: Mapping[str, int]
    rows: int
    accumulate: int
    window: int
    parameters: int
    trained: int
    own_flops_per_token: int
    cost: ProgramCost
    chip_memory: int
    chip_peak: float
    chip_link: float
    compile_seconds: float
    compile_cpu_seconds: float

    @property
    def fits(self) -> bool:
        """Whether a chip has the memory."""
        return self.cost.peak <= self.chip_memory

    @property
    def flops_per_token(self) -> float:
        """Operations that the compiled program does for each token."""
        return self.cost.flops * self.devices / (self.rows * self.window)

    @property
    def least_seconds(self) -> float:
        """Time of a step if products ran at the chip's peak and nothing waited for the network.

        XLA's own estimate is not used: it counts a loop once, and is negative for these programs.
        """
        traffic = sum(operations.bytes for operations in self.cost.collectives.values())
        return max(self.cost.flops / self.chip_peak, traffic / self.chip_link)

    @property
    def share_of_peak(self) -> float:
        """Share of the chips' peak that the model's own operations have in that time, at most."""
        own = self.own_flops_per_token * self.rows * self.window / self.devices
        return own / self.least_seconds / self.chip_peak

    @property
    def recomputation(self) -> float:
        """Operations of the program over those of the model."""
        return self.flops_per_token / self.own_flops_per_token

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with what follows from it."""
        derived = ("fits", "flops_per_token", "recomputation", "least_seconds", "share_of_peak")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def plan_backbone(
    cfg: BackboneConfig,
    n_classes: int,
    training: TrainConfig,
    topology: str,
    mesh: Mapping[str, int],
    accumulate: int = 1,
) -> StepPlan:
    """Return what a step of a backbone costs that is trained from nothing.

    Args:
        cfg: Its architecture.
        n_classes: Classes of its scout.
        training: Rows and window of a step.
        topology: Kind of chip and shape, such as `v5e:4x4`.
        mesh: Devices along each axis.
        accumulate: Parts that the rows of a step are run in.

    Raises:
        TrainingError: If there is no such topology, the mesh does not fit it, or the rows do
            not divide.
    """
    parts: Any = nnx.split(_shape_backbone(cfg, n_classes), nnx.Param, ...)
    graph, params, rest = parts
    masters = jax.eval_shape(float32_masters, params)
    return _plan(
        (backbone_objective(graph), adamw(training), masters, rest),
        count_backbone_flops(cfg, n_classes, training.window),
        training,
        topology,
        mesh,
        accumulate,
    )


def plan_expert(
    cfg: BackboneConfig,
    n_classes: int,
    body: tuple[BodyKind, int | None],
    scout_width: int,
    training: TrainConfig,
    topology: str,
    mesh: Mapping[str, int],
    accumulate: int = 1,
) -> StepPlan:
    """Return what a step of an expert costs, body and scout together.

    Args:
        cfg: Architecture of the backbone.
        n_classes: Classes of its scouts.
        body: Kind of the body, and the rank of a low-rank one.
        scout_width: Hidden width of the expert's scout.
        training: Rows and window of a step.
        topology: Kind of chip and shape, such as `v5e:4x4`.
        mesh: Devices along each axis.
        accumulate: Parts that the rows of a step are run in.

    Raises:
        TrainingError: If there is no such topology, the mesh does not fit it, or the rows do
            not divide.
    """
    kind, rank = body
    backbone = _shape_backbone(cfg, n_classes)

    def make(backbone: Backbone) -> Expert:
        return Expert(backbone, kind=kind, rank=rank, scout_width=scout_width, rngs=None)

    graph, params = nnx.split(nnx.eval_shape(make, backbone))
    scout = scout_width, n_classes
    return _plan(
        (expert_objective(graph), muon(training), params, backbone),
        count_expert_flops(cfg, rank, scout, training.window),
        training,
        topology,
        mesh,
        accumulate,
    )


def count_backbone_flops(cfg: BackboneConfig, n_classes: int, window: int) -> int:
    """Return the operations that training a backbone needs for each token.

    A product's gradient is two more of its size; attention reads half of the window on average.

    Args:
        cfg: Its architecture.
        n_classes: Classes of its scout.
        window: Positions of a row.
    """
    weights = cfg.n_layers * _layer_weights(cfg) + cfg.vocab_size * cfg.d_model
    attention = 3 * cfg.n_layers * _attention(cfg, window)
    return 6 * weights + attention + _scout(cfg, cfg.scout_width, n_classes)


def count_expert_flops(
    cfg: BackboneConfig, rank: int | None, scout: tuple[int, int], window: int
) -> int:
    """Return the operations that training an expert needs for each token.

    The trunk has no gradient. Above it there is one with respect to activations, down to the lowest
    body, and one with respect to the bodies' weights.

    Args:
        cfg: Architecture of the backbone.
        rank: Rank of a low-rank body; None for a body that replaces the backbone's.
        scout: Hidden width and classes of the expert's scout.
        window: Positions of a row.
    """
    above, d, f = len(cfg.slots) - 1, cfg.d_model, cfg.d_ff
    layer, unembedding = _layer_weights(cfg), cfg.vocab_size * d
    forward = 2 * (cfg.n_layers * layer + unembedding)
    # The lowest slot's gradient ends at the inputs of its body's last product.
    backward = 2 * (above * layer + d * f + unembedding)
    # A low-rank product is beside the backbone's own, forward and backward.
    own = 2 * 3 * d * f if rank is None else 6 * 3 * rank * (d + f)
    attention = (cfg.n_layers + 2 * above) * _attention(cfg, window)
    return forward + backward + len(cfg.slots) * own + attention + _scout(cfg, *scout)


def compile_to_fit(lowered: jax.stages.Lowered, topology: str) -> jax.stages.Compiled:
    """Compile a program for chips that are not here.

    Args:
        lowered: The program.
        topology: Kind of chip and shape.

    Raises:
        TrainingError: If the compiler refuses it because a chip's memory is too small.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" not in said:
            raise
        raise TrainingError(
            f"the program does not fit: {said[:300]}",
            where=topology,
            hint="split weights over more chips with --mesh fsdp=N, or rows with --accumulate",
        ) from error


def _scout(cfg: BackboneConfig, width: int, n_classes: int) -> int:
    """Return the operations of training a scout, whose input has no gradient, for one token."""
    return 4 * cfg.d_model * width + 6 * width * n_classes


def _layer_weights(cfg: BackboneConfig) -> int:
    attention = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + cfg.n_kv_heads)
    return attention + 3 * cfg.d_model * cfg.d_ff


def _attention(cfg: BackboneConfig, window: int) -> int:
    """Return the operations of one layer's scores and sums for one token, forward."""
    return 2 * cfg.n_heads * cfg.d_head * window


def count_numbers(tree: Any) -> int:
    """Return how many numbers a tree of arrays holds.

    Args:
        tree: Tree of arrays or shapes.

    Example:
        >>> count_numbers({"a": np.ones((2, 3)), "b": np.ones(4)})
        10
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _shape_backbone(cfg: BackboneConfig, n_classes: int) -> Backbone:
    """Return the shapes of a backbone."""
    classes_V = np.arange(cfg.vocab_size) % n_classes
    shapes: Backbone = nnx.eval_shape(lambda: Backbone(cfg, classes_V, n_classes, rngs=None))
    return shapes


def _plan(
    step: tuple[Any, Any, Any, Any],
    own_flops: int,
    training: TrainConfig,
    topology: str,
    mesh: Mapping[str, int],
    accumulate: int,
) -> StepPlan:
    """Compile a step (objective, optimiser, trained, frozen) and report it."""
    chip, devices = find_chip(topology), tpu_devices(topology)
    placed = make_mesh(devices, **mesh)
    require_divisible(training.batch_size, placed, accumulate)
    objective, optimizer, trained, frozen = step
    batch = jax.ShapeDtypeStruct((training.batch_size, training.window + 1), jnp.int32)
    start, start_cpu = time.perf_counter(), time.process_time()
    compiled = compile_to_fit(
        lower_step(
            objective,
            trained,
            frozen,
            batch,
            optimizer=optimizer,
            mesh=placed,
            accumulate=accumulate,
        ),
        topology,
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    n_trained = count_numbers(trained)
    n_frozen = count_numbers(nnx.state(frozen, nnx.Param)) if isinstance(frozen, nnx.Module) else 0
    return StepPlan(
        topology=topology,
        devices=len(devices),
        mesh=dict(placed.shape),
        rows=training.batch_size,
        accumulate=accumulate,
        window=training.window,
        parameters=n_trained + n_frozen,
        trained=n_trained,
        own_flops_per_token=own_flops,
        cost=measure_program(compiled, count_splash_flops),
        chip_memory=chip.memory,
        chip_peak=chip.peak_flops,
        chip_link=chip.link_bytes,
        compile_seconds=round(seconds, 1),
        compile_cpu_seconds=round(cpu_seconds, 1),
    )
