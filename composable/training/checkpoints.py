"""Checkpoints of a training run: parameters, optimiser state, position in the data.

A checkpoint carries digests of what it holds. One that is damaged, or whose weights are not finite,
is passed over for the one before it.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from composable.errors import ComposableError, ComposableWarning, TrainingError
from composable.interface import canonical_json, digest_bytes, digest_tensors

if TYPE_CHECKING:
    from composable.training.config import TrainConfig

_LATE_READS_SECONDS: Final = 0.3


class Restored(NamedTuple):
    """What a checkpoint holds.

    Args:
        step: Steps done.
        trained: The trained tree.
        opt_state: The optimiser's state.
        data_state: The position in the data, as plain data.
    """

    step: int
    trained: Any
    opt_state: Any
    data_state: dict[str, Any]


class Checkpoints:
    """The newest two checkpoints of a run, written in the background, each atomically.

    As a context manager, it finishes the last write on the way out, after an error or Ctrl-C too.

    Args:
        directory: Their folder, made if missing.
        cfg: The run's settings; checkpoints written with other settings are refused.

    Raises:
        TrainingError: If the folder cannot be used.
    """

    def __init__(self, directory: Path, cfg: TrainConfig) -> None:
        self.directory = directory.absolute()
        self.settings = dataclasses.asdict(cfg)
        self._newest: int | None = None
        self._damaged: list[int] = []
        _silence_orbax()
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        with self._explain("the folder of checkpoints cannot be used"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        if issubclass(kind, KeyboardInterrupt) and self._manager.is_saving_in_progress():
            warnings.warn(
                ComposableWarning(f"finishing the checkpoint of step {self._newest}"), stacklevel=2
            )
        try:
            self.close()
        except TrainingError as error:
            warnings.warn(ComposableWarning(str(error)), stacklevel=2)

    def save(self, step: int, trained: Any, opt_state: Any, data_state: dict[str, Any]) -> None:
        """Start to write a checkpoint; return before it is on disk.

        Args:
            step: Steps done.
            trained: The trained tree.
            opt_state: The optimiser's state.
            data_state: The position in the data, as plain data.

        Raises:
            TrainingError: If this checkpoint, or the one before it, cannot be written.
        """
        arrays = _plain((trained, opt_state))
        run = {"data": data_state, "settings": self.settings, **_digest_arrays(arrays)}
        with self._explain(f"the checkpoint of step {step} cannot be written"), _finish_first():
            for damaged in self._damaged:
                self._manager.delete(damaged)
            self._damaged = []
            # Forced, or it would be left out while the one before it is still being written.
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays),
                    run=ocp.args.JsonSave({**run, "digest": digest_bytes(canonical_json(run))}),
                ),
                force=True,
            )
        self._newest = step

    def restore(self, trained: Any, opt_state: Any) -> Restored | None:
        """Return the newest checkpoint that is whole, or None if there is none at all.

        Those that are passed over are reported in a warning, and replaced by the next ones saved.

        Args:
            trained: Tree with the structure, shapes and shardings to restore into.
            opt_state: Likewise.

        Raises:
            TrainingError: If it was written with other settings, or all are damaged.
        """
        reasons: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                with _quiet_failure():
                    found = self._read(step, trained, opt_state)
            except TrainingError:
                raise
            except Exception as error:  # damaged bytes fail anywhere in orbax
                reasons.append(f"the checkpoint of step {step} is damaged ({_first_line(error)})")
                self._damaged.append(step)
                continue
            for reason in reasons:
                warnings.warn(
                    ComposableWarning(f"{self.directory}: {reason}; resuming from step {step}"),
                    stacklevel=2,
                )
            self._newest = step
            return found
        if not reasons:
            return None
        raise TrainingError(
            f"no checkpoint can be read: {'; '.join(reasons)}",
            where=str(self.directory),
            hint=f"remove {self.directory} to start again",
        )

    def close(self) -> None:
        """Wait for the last write, and release the folder.

        Raises:
            TrainingError: If the last checkpoint cannot be written.
        """
        what = f"the checkpoint of step {self._newest} cannot be written"
        with self._explain(what), _finish_first():
            self._manager.close()

    @property
    def hint(self) -> str:
        """How to go on after an error in training."""
        from_step = "" if self._newest is None else f" from step {self._newest}"
        return (
            f"run again to resume{from_step}; if that fails at the same step, remove "
            f"{self.directory} and start with other text or settings, such as a lower learning rate"
        )

    def _read(self, step: int, trained: Any, opt_state: Any) -> Restored:
        """Return a checkpoint.

        Raises:
            TrainingError: If it was written with other settings.
            Exception: Any other, if it is damaged.
        """
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        # Checkpoints of versions before 0.3 have no digests.
        if digest := run.pop("digest", None):
            _require_digest(digest, digest_bytes(canonical_json(run)))
        changed = [k for k, v in self.settings.items() if run["settings"].get(k) != v]
        if changed:
            raise TrainingError(
                f"the checkpoint was written with another {', '.join(changed)}",
                where=str(self.directory),
                hint="use the settings that training started with, or remove the folder",
            )
        leaves, structure = jax.tree.flatten((trained, opt_state))
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain((trained, opt_state)))
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
        ).arrays
        if "arrays" in run:
            _require_digest({"arrays": run["arrays"]}, _digest_arrays(arrays))
        restored = [arrays[str(i)] for i in range(len(leaves))]
        trained, opt_state = jax.tree.unflatten(structure, restored)
        if not is_finite(trained):
            raise ValueError("its weights are not finite")
        return Restored(step, trained, opt_state, run["data"])

    @contextmanager
    def _explain(self, what: str) -> Iterator[None]:
        """Turn errors of orbax and of the disk into errors of training."""
        try:
            yield
        except ComposableError:
            raise
        except Exception as error:
            raise TrainingError(
                f"{what}: {_first_line(error)}",
                where=str(self.directory),
                hint="make room and check the folder's permissions, then run again",
            ) from error


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def is_finite(tree: Any) -> bool:
    """Return whether every number of a tree of arrays is finite.

    Example:
        >>> is_finite({"w": jnp.ones(2)}), is_finite({"w": jnp.array([1.0, jnp.nan])})
        (True, False)
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return not leaves or bool(_all_finite(leaves))


def _plain(tree: Any) -> dict[str, jax.Array]:
    """Return a tree's arrays by position, so that no framework type reaches the disk."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(nnx.as_pure(tree)))}


def _digest_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Return the digest of arrays as a field; none where other processes hold parts of them."""
    if not all(leaf.is_fully_addressable for leaf in arrays.values()):
        return {}
    return {"arrays": digest_tensors({name: np.asarray(leaf) for name, leaf in arrays.items()})}


def _require_digest(expected: object, found: object) -> None:
    if found != expected:
        raise ValueError("its bytes have changed")


def _first_line(error: Exception) -> str:
    """Return the kind of a foreign error and what it says first."""
    said = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextmanager
def _finish_first() -> Iterator[None]:
    """Let Ctrl-C take effect after the block, so that a write is not torn; a second one does now.

    Only the main thread receives it, so elsewhere there is nothing to do.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    if not callable(interrupt) or threading.current_thread() is not threading.main_thread():
        yield
        return
    handle: Callable[[int, Any], Any] = interrupt
    held: list[tuple[int, Any]] = []

    def hold(number: int, frame: Any) -> None:
        if held:
            handle(number, frame)
        held.append((number, frame))
        warnings.warn(
            ComposableWarning("finishing the checkpoint; press Ctrl-C again to abandon it"),
            stacklevel=2,
        )

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
    if held:
        handle(*held[0])


@contextmanager
def _quiet_failure() -> Iterator[None]:
    """Print no traceback of the reads that orbax leaves unfinished when one of them fails."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        # Reads that were under way find their event loop closed; nothing tells when the last did.
        time.sleep(_LATE_READS_SECONDS)
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook


def _silence_orbax() -> None:
    """Keep orbax's own reports of failures, with tracebacks, off the terminal.

    What fails is raised, and reported by the caller.
    """
    logger = logging.getLogger("absl")
    if _is_not_orbax not in logger.filters:
        logger.addFilter(_is_not_orbax)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
