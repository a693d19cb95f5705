"""Statistics of an expert on held-out text: computed, written beside the expert, and read.

Others who merge the expert weight it by them and judge the result, without the text. What they
reveal is described in the guide; nothing here publishes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from composable.assembly.backbones import LoadedBackbone
from composable.corpora.documents import Document
from composable.errors import MergeError, StatisticsError, TensorFileError, TextError
from composable.files.blobs import digest_file
from composable.files.records import format_record
from composable.files.safetensors import read_tensors, write_tensors
from composable.interface import statistics_signature
from composable.merging.statistics import MatrixStatistics
from composable.merging.updates import Matrices
from composable.model.backbone import Backbone
from composable.model.body import MATRICES
from composable.model.model import Pluggable
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    SCOUT_FILE,
    STATISTICS_FILE,
    Manifest,
)
from composable.packaging.manifests.statistics import (
    RECORD_KEY,
    StatisticsRecord,
    read_statistics_record,
)
from composable.progress import CountProgress
from composable.training.data import token_stream
from composable.workflows.expert_matrices import to_matrices
from composable.workflows.trunk_cache import cut_rows

# Positions of a row, rows that are run at once, and tokens of text in all, at most.
_WINDOW: Final = 256
_ROWS: Final = 2
_TOKENS: Final = 1 << 14
# Names on disk of the arrays of `MatrixStatistics`, in the order of its fields.
_PARTS: Final = ("gram", "rest", "rows", "columns", "gradient_a", "gradient_b")


@dataclass(frozen=True, kw_only=True)
class ExpertStatistics:
    """Statistics of an expert's matrices on text, and its losses there.

    Args:
        matrices: By matrix, with the names of `to_matrices`.
        record: What they were computed from.
    """

    matrices: Mapping[str, MatrixStatistics]
    record: StatisticsRecord


def write_statistics(
    loaded: LoadedBackbone,
    folder: Path,
    expert: Pluggable,
    documents: Sequence[Document],
    progress: CountProgress | None = None,
) -> StatisticsRecord:
    """Compute the statistics of an expert and write them into its folder.

    Args:
        loaded: Its backbone.
        folder: The expert's folder, whose tensors they are bound to.
        expert: The expert in it.
        documents: Text that the expert was not trained on; 16,384 tokens of it are read.
        progress: Called with rows of text done and in all.

    Raises:
        MergeError: If the backbone is quantized.
        TextError: If there is too little text.
    """
    found, losses, n_tokens = compute_statistics(
        loaded, to_matrices(loaded, expert), documents, progress
    )
    record = StatisticsRecord(
        body=digest_file(folder / BODY_FILE),
        scout=digest_file(folder / SCOUT_FILE),
        documents=len(documents),
        tokens=n_tokens,
        body_nats=losses[0],
        scout_nats=losses[1],
    )
    tensors = {
        f"{name}.{part}": array.astype(ml_dtypes.bfloat16)
        for name, statistics in found.items()
        for part, array in zip(_PARTS, dataclasses.astuple(statistics), strict=True)
    }
    write_tensors(folder / STATISTICS_FILE, tensors, {RECORD_KEY: format_record(record)})
    return record


def read_statistics(loaded: LoadedBackbone, folder: Path) -> ExpertStatistics | None:
    """Return the statistics of an expert, checked; None if it has none.

    Args:
        loaded: Its backbone.
        folder: The expert.

    Raises:
        StatisticsError: If they are damaged, or do not fit the expert's tensors.
    """
    path = folder / STATISTICS_FILE
    if not path.exists():
        return None
    record = read_statistics_record(folder)
    specs = statistics_signature(loaded.interface, Manifest.read(folder).scout_width)
    try:
        tensors = read_tensors(path, specs)
    except TensorFileError as error:
        raise StatisticsError(
            f"damaged statistics: {error.message}",
            where=str(path),
            hint=f"run `composable check {folder} --statistics` again, or delete the file",
        ) from error
    names = dict.fromkeys(name.rpartition(".")[0] for name in specs)
    matrices = {
        name: MatrixStatistics(*(tensors[f"{name}.{part}"].astype(np.float32) for part in _PARTS))
        for name in names
    }
    for name, found in matrices.items():
        if any((x < 0).any() for x in (found.rest_D, found.row_D, found.column_F)):
            raise StatisticsError(
                f"damaged statistics: means of squares of {name} are negative",
                where=str(path),
                hint="get the file from its author again, or delete it",
            )
    return ExpertStatistics(matrices=matrices, record=record)


def compute_statistics(
    loaded: LoadedBackbone,
    matrices: Matrices,
    documents: Sequence[Document],
    progress: CountProgress | None = None,
) -> tuple[dict[str, MatrixStatistics], tuple[float, float], int]:
    """Compute the statistics of an expert's matrices on text.

    Args:
        loaded: Its backbone.
        matrices: Of `to_matrices`.
        documents: The text.
        progress: Called with rows of text done and in all.

    Returns:
        Statistics by matrix; the losses of body and scout in nats per token; tokens read.
    """
    if loaded.backbone.cfg.matrix_dtype is not None:
        raise MergeError(
            f"the backbone's matrices are kept in {loaded.backbone.cfg.matrix_dtype}, "
            "which has no gradients",
            where="backbone",
            hint="use the release that it was made from, whose digest its card names",
        )
    stream_M = token_stream(documents, loaded.tokenizer)
    window = min(_WINDOW, loaded.backbone.cfg.context, len(stream_M) - 1)
    if window < 1:
        raise TextError("one token of text is too little for statistics")
    rows_BU = cut_rows(stream_M, window, _TOKENS)
    if len(rows_BU) > _ROWS:  # whole batches, so that one compiled program serves them all
        rows_BU = rows_BU[: len(rows_BU) // _ROWS * _ROWS]
    sums: Any = None
    device = jax.tree.map(jnp.asarray, matrices)
    for start in range(0, len(rows_BU), _ROWS):
        batch = jax.tree.map(
            lambda x: np.asarray(x, np.float64),
            _sum_statistics(loaded.backbone, device, rows_BU[start : start + _ROWS]),
        )
        sums = batch if sums is None else jax.tree.map(np.add, sums, batch)
        if progress:
            progress(min(start + _ROWS, len(rows_BU)), len(rows_BU))
    n_tokens = len(rows_BU) * window
    parts, losses = jax.tree.map(lambda x: x / n_tokens, sums)
    found = {name: MatrixStatistics.of(*part) for name, part in parts.items()}
    return found, (float(losses[0]), float(losses[1])), n_tokens


@jax.jit
def _sum_statistics(
    backbone: Backbone, matrices: dict[str, jax.Array], tokens_BU: jax.Array
) -> tuple[dict[str, tuple[jax.Array, ...]], tuple[jax.Array, jax.Array]]:
    """Return sums over tokens: for each matrix the arguments of `MatrixStatistics.of`, and losses.

    A zero is added to the outputs of every matrix; the gradient with respect to it is that of the
    outputs, token by token.
    """
    inputs_BT, targets_BT = tokens_BU[:, :-1], tokens_BU[:, 1:]
    x_BTD, _ = backbone.trunk(inputs_BT)
    zeros = {
        name: jnp.zeros((*inputs_BT.shape, w_DF.shape[1]), jnp.float32)
        for name, w_DF in matrices.items()
    }

    def run(zeros: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        inputs: dict[str, jax.Array] = {}

        def multiply(name: str, x_BTD: jax.Array) -> jax.Array:
            inputs[name] = x_BTD.astype(jnp.float32)
            return inputs[name] @ matrices[name] + zeros[name]

        def feed_forward(layer: int, h_BTD: jax.Array) -> jax.Array:
            gate, up, down = (f"body.slots.{layer}.{name}" for name in MATRICES)
            hidden_BTF = jax.nn.silu(multiply(gate, h_BTD)) * multiply(up, h_BTD)
            return multiply(down, hidden_BTF).astype(h_BTD.dtype)

        logits_BTV, _ = backbone.upper(x_BTD, feed_forward)
        body = _sum_nats(logits_BTV, targets_BT)
        hidden_BTW = jax.nn.gelu(multiply("scout.w_in", _with_one(backbone.features(x_BTD))))
        scores_BTC = multiply("scout.w_out", _with_one(hidden_BTW))
        scout = _sum_nats(scores_BTC, backbone.class_map[...][targets_BT])
        return body + scout, (inputs, (body, scout))

    gradients, (inputs, losses) = jax.grad(run, has_aux=True)(zeros)
    return {name: _sum_matrix(inputs[name], gradients[name]) for name in matrices}, losses


def _sum_matrix(x_BTD: jax.Array, g_BTF: jax.Array) -> tuple[jax.Array, ...]:
    x_MD, g_MF = x_BTD.reshape(-1, x_BTD.shape[-1]), g_BTF.reshape(-1, g_BTF.shape[-1])
    square_MD, square_MF = x_MD**2, g_MF**2
    return (
        x_MD.T @ x_MD,
        x_MD.T @ g_MF,
        square_MF.sum(axis=1) @ square_MD,
        square_MD.sum(axis=1) @ square_MF,
    )


def _with_one(x_BTD: jax.Array) -> jax.Array:
    """Append the input that a bias is multiplied with."""
    return jnp.concatenate([x_BTD, jnp.ones_like(x_BTD[..., :1])], axis=-1)


def _sum_nats(scores_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    log_prob_BTV = jax.nn.log_softmax(scores_BTV.astype(jnp.float32))
    total: jax.Array = -jnp.take_along_axis(log_prob_BTV, targets_BT[..., None], axis=-1).sum()
    return total
