"""Checkpoints of a training run: parameters, optimiser state, position in the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from composable.errors import TrainingError

if TYPE_CHECKING:
    from composable.training.config import TrainConfig


class Checkpoints:
    """The newest two checkpoints of a run, written in the background, each atomically.

    Args:
        directory: Their folder, made if missing.
        cfg: The run's settings; checkpoints written with other settings are refused.
    """

    def __init__(self, directory: Path, cfg: TrainConfig) -> None:
        self.directory = directory.absolute()
        self.settings = dataclasses.asdict(cfg)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, trained: Any, opt_state: Any, data_state: dict[str, Any]) -> None:
        """Start to write a checkpoint; return before it is on disk.

        Args:
            step: Steps done.
            trained: The trained tree.
            opt_state: The optimiser's state.
            data_state: The position in the data, as plain data.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(_plain((trained, opt_state))),
                run=ocp.args.JsonSave({"data": data_state, "settings": self.settings}),
            ),
        )

    def restore(self, trained: Any, opt_state: Any) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """Return (step, trained, opt_state, data state) of the newest checkpoint, or None.

        Args:
            trained: Tree with the structure, shapes and shardings to restore into.
            opt_state: Likewise.

        Raises:
            TrainingError: If it was written with other settings.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        leaves, structure = jax.tree.flatten((trained, opt_state))
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        changed = [k for k, v in self.settings.items() if run["settings"].get(k) != v]
        if changed:
            raise TrainingError(
                f"the checkpoint was written with another {', '.join(changed)}",
                where=str(self.directory),
                hint="use the settings that training started with, or remove the folder",
            )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain((trained, opt_state)))
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
        ).arrays
        restored = [arrays[str(i)] for i in range(len(leaves))]
        trained, opt_state = jax.tree.unflatten(structure, restored)
        return step, trained, opt_state, run["data"]

    def close(self) -> None:
        """Wait for the last write, and release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def _plain(tree: Any) -> dict[str, jax.Array]:
    """Return a tree's arrays by position, so that no framework type reaches the disk."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(nnx.as_pure(tree)))}
