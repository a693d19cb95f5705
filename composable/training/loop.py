"""The training loop: one for backbone and experts, on one device or many hosts.

What is trained is the first argument of the objective; what is frozen is not in it, so it has no
gradient and no optimiser state. The loop knows nothing of models: it sees trees and a loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from composable.errors import TrainingError
from composable.parallel import make_mesh, place_batch, shard_tree, shardings_of
from composable.progress import StepProgress
from composable.training.checkpoints import Checkpoints
from composable.training.config import TrainConfig
from composable.training.optimizers import adamw

# (trained, frozen, batch) -> mean loss in nats, and named figures to log. A batch is what the data
# gives: tokens of shape (B, T+1), or a tree of arrays of B rows.
Objective = Callable[[Any, Any, Any], tuple[jax.Array, Mapping[str, jax.Array]]]


class BatchIterator(Protocol):
    """What the loop asks of data: batches, and a position that can be saved."""

    def __next__(self) -> Any:
        """Return the next batch: tokens of shape (B, T+1), or a tree of arrays of B rows."""

    def get_state(self) -> dict[str, Any]:
        """Return the position in the data, as plain data."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that `get_state` returned."""


@dataclass(kw_only=True)
class Fitted:
    """What training left behind.

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
    directory: Path | None = None,
    progress: StepProgress | None = None,
) -> Fitted:
    """Train a tree to lower an objective, resuming where an earlier run of the same stopped.

    Args:
        objective: Loss of (trained, frozen, batch).
        trained: Tree of parameters to train; left untouched.
        frozen: Tree that the objective reads; never differentiated.
        data: Batches of this process.
        cfg: How to train.
        optimizer: `adamw(cfg)` by default.
        mesh: Devices; all of them as data parallel by default.
        directory: Where checkpoints and TensorBoard curves go; none are written without it.
        progress: Called at every step with the newest figures.

    Returns:
        The trained tree and what was logged. The loss in the log is of the step's own batch.

    Raises:
        TrainingError: If the loss is not finite, or the checkpoint belongs to another run.
    """
    mesh = mesh or make_mesh()
    optimizer = optimizer or adamw(cfg)
    trained, frozen = shard_tree(trained, mesh), shard_tree(frozen, mesh)
    # Placed like the parameters, as the step's outputs will be; or its second call compiles again.
    opt_shardings = shardings_of(jax.eval_shape(optimizer.init, trained), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(trained)

    def step_fn(trained: Any, opt_state: Any, frozen: Any, batch: Any) -> Any:
        grad_fn = jax.value_and_grad(objective, has_aux=True)
        (loss, figures), grads = grad_fn(trained, frozen, batch)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        figures = {"loss": loss, "grad_norm": optax.tree.norm(grads), **figures}
        return optax.apply_updates(trained, updates), opt_state, figures

    step_jit = jax.jit(step_fn, donate_argnums=(0, 1))
    # The step's outputs are donated inputs of the next; a copy keeps the caller's arrays alive.
    trained = jax.tree.map(jnp.copy, trained)

    done = 0
    checkpoints = Checkpoints(directory / "checkpoints", cfg) if directory else None
    if checkpoints and (restored := checkpoints.restore(trained, opt_state)):
        done, trained, opt_state, data_state = restored
        data.set_state(data_state)
    writer = _curve_writer(directory)
    result = Fitted(trained=trained)
    start = logged = time.perf_counter()
    since = done
    for step in range(done + 1, cfg.steps + 1):
        batch = place_batch(next(data), mesh)
        trained, opt_state, figures = step_jit(trained, opt_state, frozen, batch)
        if step % cfg.log_every == 0 or step in (1, cfg.steps):
            row = {name: float(value) for name, value in figures.items()}
            now = time.perf_counter()
            tokens_seen = (step - since) * cfg.batch_size * cfg.window
            row |= {"step": step, "tokens_per_second": tokens_seen / (now - logged)}
            since, logged = step, now
            if not np.isfinite(row["loss"]):
                raise TrainingError(
                    f"the loss is {row['loss']} at step {step}",
                    hint="lower the learning rate, or look for broken text",
                )
            result.history.append(row)
            for name, value in row.items():
                writer(name, value, step)
        if progress:
            progress(step, cfg.steps, result.history[-1] if result.history else {})
        if checkpoints and (step % cfg.checkpoint_every == 0 or step == cfg.steps):
            checkpoints.save(step, trained, opt_state, data.get_state())
    result.trained = jax.block_until_ready(trained)
    result.seconds = time.perf_counter() - start
    if checkpoints:
        checkpoints.close()
    writer(None, 0.0, 0)
    return result


def _curve_writer(directory: Path | None) -> Callable[[str | None, float, int], None]:
    """Return a function that adds a point to a TensorBoard curve; name None closes the file."""
    if directory is None or jax.process_index() != 0:
        return lambda name, value, step: None
    from tensorboardX import SummaryWriter

    curves = SummaryWriter(str(directory / "curves"))

    def write(name: str | None, value: float, step: int) -> None:
        if name is None:
            curves.close()
        elif name != "step":
            curves.add_scalar(name, value, step)

    return write
