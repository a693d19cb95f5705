"""The training loop: one for backbone and experts, on one device or many hosts.

What is trained is the first argument of the objective; what is frozen is not in it, so it has no
gradient and no optimiser state. The loop depends on no model: it sees trees and a loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from composable.errors import PreemptedError, TrainingError
from composable.parallel import (
    BATCH_SPEC,
    exchange,
    make_mesh,
    place_batch,
    place_shapes,
    require_divisible,
    shard_tree,
    shardings_of,
    split_rows,
)
from composable.progress import StepProgress
from composable.training.checkpoints import Checkpoints, is_finite
from composable.training.config import TrainConfig
from composable.training.ledger import Ledger
from composable.training.optimizers import adamw, learning_rate
from composable.training.preemption import Preemption

# (trained, frozen, batch) -> mean loss in nats, and named figures to log. A batch is what the data
# gives: tokens of shape BU, or a tree of arrays of B rows.
Objective = Callable[[Any, Any, Any], tuple[jax.Array, Mapping[str, jax.Array]]]


class BatchIterator(Protocol):
    """What the loop needs from data: batches, and a position that can be saved."""

    def __next__(self) -> Any:
        """Return the next batch: tokens of shape BU, or a tree of arrays of B rows."""

    def get_state(self) -> dict[str, Any]:
        """Return the position in the data, as plain data."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that `get_state` returned."""


@dataclass(kw_only=True)
class Fitted:
    """The result of training.

    Args:
        trained: The trained tree.
        history: Logged figures: step, loss in nats per token, tokens per second, and the
            objective's own.
        seconds: Wall time of the steps.
    """

    trained: Any
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    objective: Objective,
    trained: Any,
    frozen: Any,
    data: BatchIterator,
    cfg: TrainConfig,
    *,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    directory: Path | None = None,
    checkpoints: Path | str | None = None,
    progress: StepProgress | None = None,
) -> Fitted:
    """Train a tree to lower an objective, resuming from its last checkpoint.

    Args:
        objective: Loss of (trained, frozen, batch).
        trained: Tree of parameters to train; left untouched.
        frozen: Tree that the objective reads; never differentiated.
        data: Batches of this process.
        cfg: How to train.
        optimizer: `adamw(cfg)` by default. Its update gets the learning rate of `cfg` as `rate`, if
            it takes more arguments (`optax.GradientTransformationExtraArgs`).
        mesh: Devices; all of them as data parallel by default.
        accumulate: Parts that the rows of a step are run in, one after the other: the memory of
            activations is that of one part, and the step is the same up to rounding.
        directory: Folder of checkpoints, TensorBoard curves and the ledger of the run's time; none
            are written without it.
        checkpoints: Where checkpoints are instead, a folder or `gs://BUCKET/PATH`.
        progress: Called at every step with the newest figures.

    Returns:
        The trained tree and the logged figures; each loss is that of its own batch.

    Raises:
        TrainingError: If the loss or a weight is not finite, the checkpoint belongs to another run,
            checkpoints cannot be read or written, or the rows of a step do not divide among devices
            and parts.
        PreemptedError: After SIGTERM, when the step is done and its checkpoint written.
    """
    mesh = mesh or make_mesh()
    require_divisible(cfg.batch_size, mesh, accumulate)
    optimizer = optimizer or adamw(cfg)
    trained, frozen = shard_tree(trained, mesh), shard_tree(frozen, mesh)
    opt_state = _init_optimizer(optimizer, trained, mesh)
    run_step = _compile_step(objective, optimizer, accumulate)
    # The step's outputs are donated inputs of the next; a copy keeps the caller's arrays alive.
    trained = jax.tree.map(jnp.copy, trained)
    home = checkpoints or (directory / "checkpoints" if directory else None)
    keeping = Checkpoints(home, cfg) if home else nullcontext()
    # The objective splits activations over the mesh in use. The ledger is closed last, since it has
    # the wait for the last checkpoint.
    with (
        Ledger(directory) as ledger,
        jax.set_mesh(mesh),
        keeping as kept,
        Preemption() as preemption,
    ):
        done = 0
        if kept and (restored := kept.restore(trained, opt_state)):
            done, trained, opt_state, data_state = restored
            data.set_state(data_state)
        with _Log(cfg, directory, done) as log:
            start = time.perf_counter()
            ledger.start(done)
            for step in range(done + 1, cfg.steps + 1):
                with ledger.charge("data"):
                    batch = place_batch(next(data), mesh)
                rate = np.float32(learning_rate(cfg, step - 1))
                # The first call compiles, and only starts the step.
                with ledger.charge("compile" if step == done + 1 else "step"):
                    arguments = (trained, opt_state, frozen, batch, rate)
                    if step == done + 1:
                        _compile_together(run_step, arguments)
                    elif jax.default_backend() == "cpu":
                        # One step at a time: progress says what is done, and SIGTERM waits for one.
                        jax.block_until_ready(trained)
                    trained, opt_state, figures = run_step(*arguments)
                is_last = step == cfg.steps
                is_stopped = not is_last and preemption.stops_after(step)
                is_due = step % cfg.checkpoint_every == 0 or is_stopped
                is_kept = is_last or bool(kept and is_due)
                if is_kept or step % cfg.log_every == 0 or step == 1:
                    _require_finite(step, figures, trained if is_kept else (), kept)
                if is_last or step % cfg.log_every == 0 or step == 1:
                    log.add(step, figures)
                if progress:
                    progress(step, cfg.steps, log.history[-1] if log.history else {})
                if kept and is_kept:
                    with ledger.charge("checkpoint"):
                        kept.save(step, trained, opt_state, data.get_state())
                ledger.end_step(step, is_due=is_last or is_stopped)
                if is_stopped:
                    raise _describe_stop(step, cfg, kept)
            jax.block_until_ready(trained)
            seconds = time.perf_counter() - start
    return Fitted(trained=trained, history=log.history, seconds=seconds)


def _compile_together(run_step: jax.stages.Wrapped, arguments: tuple[Any, ...]) -> None:
    """Return when all processes have compiled the step, which a call then finds compiled.

    Otherwise the first would wait for the last within the step, and gloo gives up after 30 seconds.
    """
    if jax.process_count() > 1:
        run_step.lower(*arguments).compile()
        exchange("compiled")


def _describe_stop(step: int, cfg: TrainConfig, checkpoints: Checkpoints | None) -> PreemptedError:
    """Return the error of a run that was asked to stop after a step."""
    return PreemptedError(
        f"asked to stop (SIGTERM) after step {step} of {cfg.steps}",
        is_shared=True,
        hint=f"run again to resume from step {step}" if checkpoints else "run again",
    )


def _require_finite(
    step: int, figures: Mapping[str, jax.Array], trained: Any, checkpoints: Checkpoints | None
) -> None:
    """Refuse to log, keep or return what is not finite.

    Raises:
        TrainingError: If the loss or a weight is not finite.
    """
    loss = float(figures["loss"])
    if not math.isfinite(loss):
        found = f"the loss is {loss} at step {step}"
    elif not is_finite(trained):
        found = f"the weights are not finite after step {step}"
    else:
        return
    hint = "lower the learning rate, or look for broken text"
    raise TrainingError(found, hint=checkpoints.hint if checkpoints else hint)


def _init_optimizer(optimizer: optax.GradientTransformation, trained: Any, mesh: Mesh) -> Any:
    """Return the optimiser's state, placed like the parameters.

    The step's outputs are placed so, too: with any other placement its second call compiles again.
    """
    shardings = shardings_of(jax.eval_shape(optimizer.init, trained), mesh)
    return jax.jit(optimizer.init, out_shardings=shardings)(trained)


def lower_step(
    objective: Objective,
    trained: Any,
    frozen: Any,
    batch: Any,
    *,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    accumulate: int = 1,
) -> jax.stages.Lowered:
    """Return the step that `fit` runs, ready to compile for devices that need not be here.

    Args:
        objective: Loss of (trained, frozen, batch).
        trained: Shapes of the trained tree.
        frozen: Shapes of the frozen one.
        batch: Shapes of a batch over all devices.
        optimizer: The optimiser.
        mesh: The devices.
        accumulate: As for `fit`.
    """
    with jax.set_mesh(mesh):
        opt_state = jax.eval_shape(optimizer.init, trained)
        placed = [
            place_shapes(tree, shardings_of(tree, mesh)) for tree in (trained, opt_state, frozen)
        ]
        rows = place_shapes(batch, jax.tree.map(lambda _: NamedSharding(mesh, BATCH_SPEC), batch))
        lowered: jax.stages.Lowered = _compile_step(objective, optimizer, accumulate).lower(
            *placed, rows, jax.ShapeDtypeStruct((), jnp.float32)
        )
        return lowered


@lru_cache(maxsize=16)
def _compile_step(
    objective: Objective, optimizer: optax.GradientTransformation, accumulate: int
) -> jax.stages.Wrapped:
    """Return the compiled step.

    From trained, opt_state, frozen, batch and rate it returns the next two, and figures. For the
    same arguments it is the same one, which compiles once for all runs. The memory of the step's
    first two arguments is reused for the results.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    grad_fn = jax.value_and_grad(objective, has_aux=True)

    def sum_parts(trained: Any, frozen: Any, batch: Any) -> Any:
        def add_part(total: Any, rows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(trained, frozen, rows)), None

        parts = split_rows(batch, accumulate)
        shapes = jax.eval_shape(grad_fn, trained, frozen, jax.tree.map(lambda x: x[0], parts))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add_part, zero, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def step_fn(trained: Any, opt_state: Any, frozen: Any, batch: Any, rate: Any) -> Any:
        run = grad_fn if accumulate == 1 else sum_parts
        (loss, figures), grads = run(trained, frozen, batch)
        updates, opt_state = optimizer.update(grads, opt_state, trained, rate=rate)
        figures = {"loss": loss, "grad_norm": optax.tree.norm(grads), **figures}
        return optax.apply_updates(trained, updates), opt_state, figures

    # A full body takes the place of frozen matrices. These stay in the devices' memory though no
    # step reads them, so the program's memory, which a plan names, has to count them.
    return jax.jit(step_fn, donate_argnums=(0, 1), keep_unused=True)


class _Log:
    """The figures of a run: in memory, and as TensorBoard curves where a directory is given.

    Args:
        cfg: The run's settings.
        directory: Where curves go; only the first process writes them.
        done: Steps of an earlier run, which are not timed.
    """

    def __init__(self, cfg: TrainConfig, directory: Path | None, done: int) -> None:
        self.history: list[dict[str, float]] = []
        self._cfg = cfg
        self._curves: Any = None
        if directory is not None and jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            self._curves = SummaryWriter(str(directory / "curves"))
        self._last_step, self._last_time = done, time.perf_counter()

    def add(self, step: int, figures: Mapping[str, jax.Array]) -> None:
        """Log the figures of a step, and the speed since the last logged one."""
        # The conversion waits for the step, so the time is taken after it.
        row = {name: float(value) for name, value in figures.items()}
        now = time.perf_counter()
        n_tokens = (step - self._last_step) * self._cfg.batch_size * self._cfg.window
        row |= {"step": step, "tokens_per_second": n_tokens / (now - self._last_time)}
        self._last_step, self._last_time = step, now
        self.history.append(row)
        if self._curves is not None:
            for name, value in row.items():
                if name != "step":
                    self._curves.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Write the last points of the curves."""
        if self._curves is not None:
            self._curves.close()
