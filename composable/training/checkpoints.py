"""Checkpoints of a training run: parameters, optimiser state, every process's position in the data.

They are in a folder that all processes see, or in a bucket of Google Cloud Storage.

A checkpoint carries sums of what it holds, which do not depend on how arrays are split. One that is
damaged, or whose weights are not finite, is passed over by all processes for the one before it.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
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
from etils import epath
from flax import nnx

from composable.errors import ComposableError, ComposableWarning, TrainingError
from composable.interface import canonical_json, digest_bytes
from composable.parallel import exchange, is_first_process

if TYPE_CHECKING:
    from composable.training.config import TrainConfig

_BUCKET: Final = "gs://"
_LATE_READS_SECONDS: Final = 0.3
_NOT_FINITE: Final = "its weights are not finite"
_CHANGED: Final = "its bytes have changed"


class Restored(NamedTuple):
    """What a checkpoint holds.

    Args:
        step: Steps done.
        trained: The trained tree.
        opt_state: The optimiser's state.
        data_state: The position of this process in the data, as plain data.
    """

    step: int
    trained: Any
    opt_state: Any
    data_state: dict[str, Any]


def find_home(home: Path | str) -> epath.Path:
    """Return the folder of checkpoints that a path or an address names.

    Args:
        home: A local path, or `gs://BUCKET/PATH`.

    Raises:
        TrainingError: If orbax cannot keep checkpoints there, or the library for it is missing.

    Example:
        >>> find_home("/shared/run").name
        'run'
    """
    scheme, separator, _ = str(home).partition("://")
    if separator and scheme != "gs":
        raise TrainingError(
            f"orbax cannot keep checkpoints on {scheme}://; it can in a folder and on {_BUCKET}",
            where=str(home),
            hint="mount the bucket on every host (mountpoint-s3, gcsfuse) and give the folder",
        )
    if separator and importlib.util.find_spec("gcsfs") is None:
        raise TrainingError(
            f"checkpoints on {_BUCKET} need the `gcsfs` library",
            where=str(home),
            hint="pip install 'composable[gcs]'",
        )
    place = epath.Path(home)
    return place if separator else place.absolute()


class Checkpoints:
    """The newest two checkpoints of a run, written in the background, each atomically.

    All processes of a run make it and call its methods, and each writes what its devices hold. As a
    context manager, it finishes the last write on the way out, after an error or Ctrl-C too.

    Args:
        directory: Their folder, made if missing; see `find_home`.
        cfg: The run's settings; checkpoints written with other settings are refused.

    Raises:
        TrainingError: If the folder cannot be used.
    """

    def __init__(self, directory: Path | str, cfg: TrainConfig) -> None:
        self.directory = find_home(directory)
        self.settings = dataclasses.asdict(cfg)
        self._newest: int | None = None
        self._damaged: list[int] = []
        _silence_orbax()
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        with self._explain("the folder of checkpoints cannot be used"):
            self.directory.mkdir(parents=True, exist_ok=True)
            if is_first_process():
                # What a killed write left. By orbax's own option a thread removes it, which can
                # outlast a manager that writes nothing, and disturb the next one.
                for left in ocp.utils.tmp_checkpoints(self.directory):
                    left.get().rmtree()
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
            data_state: The position of this process in the data, as plain data.

        Raises:
            TrainingError: If this checkpoint, or the one before it, cannot be written.
        """
        arrays = _plain((trained, opt_state))
        run = {
            "data": [json.loads(state) for state in exchange(json.dumps(data_state))],
            "settings": self.settings,
            "sums": _sum_arrays(arrays),
        }
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
        # A folder on the network may look different elsewhere; the first process decides.
        steps = json.loads(exchange(json.dumps(list(self._manager.all_steps())))[0])
        for step in sorted(steps, reverse=True):
            found, reason = self._try(step, trained, opt_state)
            if found is None:
                reasons.append(f"the checkpoint of step {step} is damaged ({reason})")
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
            hint=f"remove {self.directory} to start again; if an earlier version of composable "
            "wrote it, that version can go on",
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

    def _try(self, step: int, trained: Any, opt_state: Any) -> tuple[Restored | None, str]:
        """Return a checkpoint, or what is wrong with it: the same in all processes."""
        found, reason = None, ""
        try:
            with _quiet_failure():
                found = self._read(step, trained, opt_state)
        except TrainingError:
            raise
        except Exception as error:  # damaged bytes fail anywhere in orbax
            reason = _first_line(error)
        # What is damaged may be what one process alone reads.
        if (reason := next(filter(None, exchange(reason)), "")) or found is None:
            return None, reason
        restored, sums = found
        if sums is not None and sums != _sum_arrays(_plain((restored.trained, restored.opt_state))):
            return None, _CHANGED
        return (restored, "") if is_finite(restored.trained) else (None, _NOT_FINITE)

    def _read(
        self, step: int, trained: Any, opt_state: Any
    ) -> tuple[Restored, dict[str, str] | None]:
        """Return a checkpoint and the sums of its arrays, as this process finds them on disk.

        Raises:
            TrainingError: If it was written with other settings, or by processes that were at
                different positions.
            Exception: Any other, if it is damaged.
        """
        folder = self.directory / str(step)
        run = _read_alone(folder, run=ocp.args.JsonRestore()).run
        # Checkpoints of versions before 0.3 have no digest.
        if (digest := run.pop("digest", None)) and digest != digest_bytes(canonical_json(run)):
            raise ValueError(_CHANGED)
        changed = [k for k, v in self.settings.items() if run["settings"].get(k) != v]
        if changed:
            raise TrainingError(
                f"the checkpoint was written with another {', '.join(changed)}",
                where=str(self.directory),
                hint="use the settings that training started with, or remove the folder",
            )
        leaves, structure = jax.tree.flatten((trained, opt_state))
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain((trained, opt_state)))
        arrays = _read_alone(folder, arrays=ocp.args.StandardRestore(target)).arrays
        restored = [arrays[str(i)] for i in range(len(leaves))]
        trained, opt_state = jax.tree.unflatten(structure, restored)
        data_state = self._own_position(run["data"])
        return Restored(step, trained, opt_state, data_state), run.get("sums")

    def _own_position(self, states: Any) -> dict[str, Any]:
        """Return the position of this process from those of the processes that wrote a checkpoint.

        Raises:
            TrainingError: If another number of processes wrote it, at different positions.
        """
        if isinstance(states, dict):  # before 0.3 only that of the first process was kept
            states = [states]
        state: dict[str, Any]
        if len(states) == jax.process_count():
            state = states[jax.process_index()]
        elif all(other == states[0] for other in states):
            state = states[0]  # batches are counted over all processes
        else:
            raise TrainingError(
                f"{len(states)} processes wrote the checkpoint at different positions in the data, "
                f"and there are {jax.process_count()} now",
                where=str(self.directory),
                hint=f"resume with {len(states)} processes",
            )
        return state

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
                hint="check room, permissions and credentials, then run again",
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


def _sum_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Return a sum of each array; the same however the arrays are split over devices."""
    sums = jax.device_get({name: _sum_bits(leaf) for name, leaf in arrays.items()})
    return {name: f"{first:08x}{second:08x}" for name, (first, second) in sums.items()}


@jax.jit
def _sum_bits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return two sums, modulo 2^32, of an array's elements mixed with their positions.

    Each element is mixed one to one, so that a change of any one of them changes both sums. Integer
    sums do not depend on the order, so each device adds up what it holds.

    References:
        The mixing steps are those of MurmurHash3 (Appleby, 2011).
    """
    kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, kind)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    def add_up(seed: int) -> jax.Array:
        mixed = bits.astype(jnp.uint32) ^ (position * np.uint32(0x9E3779B1) + np.uint32(seed))
        mixed = mixed * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return add_up(0), add_up(0x27D4EB2F)


def _read_alone(folder: epath.Path, **items: Any) -> Any:
    """Return items of a checkpoint without waiting for other processes, which may fail to."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        arrays=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        run=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(folder, args=ocp.args.Composite(**items))


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
