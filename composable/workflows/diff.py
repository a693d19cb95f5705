"""What changed from one expert to another: manifest, tensors, and what it means on text."""

from __future__ import annotations

import tomllib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.corpora.documents import Document
from composable.kernels import widen
from composable.model.body import MATRICES, backbone_slot
from composable.model.model import Model, Pluggable
from composable.model.tensors import to_tensors
from composable.packaging.manifests.manifest import Manifest
from composable.progress import CountProgress
from composable.vetting.evaluation import (
    mix_scorer,
    path_scorer,
    score_documents,
    trace_routing,
)
from composable.vetting.evidence import MAX_BYTES
from composable.vetting.statistics import mean_interval

# The rank of a change is the number of singular values that hold this share of its square norm.
_ENERGY: Final = 0.99
# Fields of a manifest that follow from the files, which are compared themselves.
_DERIVED: Final = ("files",)


@dataclass(frozen=True, kw_only=True)
class FieldChange:
    """A field of the manifest that differs; None where it is missing.

    Args:
        field: Its name, with those of its tables.
        before: Its value before.
        after: Its value after.
    """

    field: str
    before: Any
    after: Any


@dataclass(frozen=True, kw_only=True)
class MatrixChange:
    """A matrix of the body in one slot, or an array of the scout.

    Args:
        name: `slots.LAYER.MATRIX`, or the scout's tensor.
        shape: Its shape after; before too, unless `difference` is None.
        norm: Frobenius norm before: for a body, of what it adds to the backbone's matrix.
        difference: Frobenius norm of the difference; None if the shapes differ.
        rank: Number of singular values that hold 99 % of the difference's square norm; None for a
            vector, and if the shapes differ.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    difference: float | None
    rank: int | None

    @property
    def relative(self) -> float | None:
        """The difference as a share of the norm before; None where there is none."""
        return None if self.difference is None or not self.norm else self.difference / self.norm


@dataclass(frozen=True, kw_only=True)
class DocumentChange:
    """Figures of one document.

    Args:
        id: The document's id.
        n_bytes: UTF-8 bytes scored.
        bits: Bits per byte under the backbone alone, and in mix mode before and after.
        weight: Mean router weight of all experts together, before and after.
    """

    id: str
    n_bytes: int
    bits: tuple[float, float, float]
    weight: tuple[float, float]

    @property
    def change(self) -> float:
        """Bits per byte after minus before."""
        return self.bits[2] - self.bits[1]


@dataclass(frozen=True, kw_only=True)
class TextChange:
    """What a change means on text.

    Args:
        documents: Every document's figures, in the order given.
        change: Mean over documents of the change in bits per byte.
        interval: Its 95 % interval, by Student's t; None for a single document.
    """

    documents: tuple[DocumentChange, ...]
    change: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class ExpertDiff:
    """What changed from one expert to another.

    Args:
        fields: Fields of the manifest that differ.
        matrices: The body's matrices and the scout's arrays, changed or not.
        n_bytes: Bytes of the tensors after.
        patch_bytes: Bytes of the tensors after, as a compressed difference to those before.
        text: What it means on text, where text was given.
    """

    fields: tuple[FieldChange, ...]
    matrices: tuple[MatrixChange, ...]
    n_bytes: int
    patch_bytes: int
    text: TextChange | None = None


def diff_experts(
    loaded: LoadedBackbone,
    before: Path,
    after: Path,
    documents: Sequence[Document] = (),
    progress: CountProgress | None = None,
) -> ExpertDiff:
    """Compare two experts for one backbone.

    Args:
        loaded: The backbone, whose interface both fit.
        before: Folder of the first.
        after: Folder of the second.
        documents: Text to score both on; the start of each is read, as in vetting.
        progress: Called with the number of documents scored and in all.

    Returns:
        What differs.

    Raises:
        ManifestError: If a manifest is bad.
        InterfaceError: If one was trained against an interface that the backbone does not honour.
        IntegrityError: If files do not match their manifest.
        TensorFileError: If tensors do not match the interface.
    """
    manifests = Manifest.read(before), Manifest.read(after)
    experts = load_expert(loaded, before), load_expert(loaded, after)
    old, new = (
        {
            **{f"body.{k}": x for k, x in to_tensors(expert.body, manifest.body.dtype).items()},
            **{f"scout.{k}": x for k, x in to_tensors(expert.scout).items()},
        }
        for expert, manifest in zip(experts, manifests, strict=True)
    )
    text = None
    if documents:
        first, second = (loaded.plug([expert]) for expert in experts)
        text = diff_on_text(first, second, documents, progress)
    return ExpertDiff(
        fields=tuple(diff_manifests(*manifests)),
        matrices=tuple(_diff_matrices(loaded, *experts)),
        n_bytes=sum(array.nbytes for array in new.values()),
        patch_bytes=sum(_patch_bytes(old.get(name), array) for name, array in new.items()),
        text=text,
    )


def diff_manifests(before: Manifest, after: Manifest) -> Iterator[FieldChange]:
    """Yield the fields that differ, in the order of the manifest.

    Args:
        before: One manifest.
        after: The other.

    Example:
        >>> import dataclasses
        >>> from composable.packaging.manifests.template import find_template
        >>> one = Manifest.read(find_template())
        >>> other = dataclasses.replace(one, description="Poems.")
        >>> [change.field for change in diff_manifests(one, other)]
        ['expert.description']
    """
    old, new = (
        {
            field: value
            for name, table in tomllib.loads(manifest.to_toml()).items()
            if name not in _DERIVED
            for field, value in _flatten(name, table)
        }
        for manifest in (before, after)
    )
    for field in dict.fromkeys([*old, *new]):
        if old.get(field) != new.get(field):
            yield FieldChange(field=field, before=old.get(field), after=new.get(field))


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables with the path of each."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flatten(f"{name}.{key}", inner)


def _diff_matrices(
    loaded: LoadedBackbone, before: Pluggable, after: Pluggable
) -> Iterator[MatrixChange]:
    for layer in loaded.interface.slots:
        own = {name: widen(w) for name, w in backbone_slot(loaded.backbone, layer).items()}
        old, new = (expert.body.merged(loaded.backbone, layer) for expert in (before, after))
        for name in MATRICES:
            own_DF, old_DF, new_DF = (
                np.asarray(slot[name], np.float32) for slot in (own, old, new)
            )
            yield _diff_array(
                f"slots.{layer}.{name}", float(np.linalg.norm(old_DF - own_DF)), old_DF, new_DF
            )
    scouts = [to_tensors(expert.scout) for expert in (before, after)]
    for name, new_X in scouts[1].items():
        old_X = scouts[0][name]
        yield _diff_array(f"scout.{name}", float(np.linalg.norm(old_X)), old_X, new_X)


def _diff_array(name: str, norm: float, old_X: np.ndarray, new_X: np.ndarray) -> MatrixChange:
    shape = tuple(new_X.shape)
    if old_X.shape != new_X.shape:
        return MatrixChange(name=name, shape=shape, norm=norm, difference=None, rank=None)
    change_X = new_X - old_X
    rank = None
    if change_X.ndim == 2:
        square_R = _square_singular_values(change_X)
        left_R = np.cumsum(square_R) - _ENERGY * square_R.sum()
        rank = int(np.searchsorted(left_R, 0) + 1) if square_R.any() else 0
    difference = float(np.linalg.norm(change_X))
    return MatrixChange(name=name, shape=shape, norm=norm, difference=difference, rank=rank)


def _square_singular_values(w_DF: np.ndarray) -> np.ndarray:
    """Return the squares of a matrix's singular values, in descending order.

    They are the eigenvalues of w wᵀ, which are found thirty times as fast as those of w. That
    loses values below 1e-8 of the largest, which no share of the squares shows.
    """
    w_DF = w_DF.astype(np.float64)
    gram_RR = w_DF @ w_DF.T if w_DF.shape[0] <= w_DF.shape[1] else w_DF.T @ w_DF
    square_R: np.ndarray = np.maximum(np.linalg.eigvalsh(gram_RR)[::-1], 0)
    return square_R


def _patch_bytes(old_X: np.ndarray | None, new_X: np.ndarray) -> int:
    """Return the size of an array as its compressed difference to another, if that is alike.

    One that did not change takes nothing.
    """
    if old_X is not None and np.array_equal(old_X, new_X):
        return 0
    new = np.ascontiguousarray(new_X).view(np.uint8)
    if old_X is not None and (old_X.shape, old_X.dtype) == (new_X.shape, new_X.dtype):
        new = new ^ np.ascontiguousarray(old_X).view(np.uint8)
    # Byte by byte of all numbers: those of sign and exponent seldom differ.
    size, flat = new_X.dtype.itemsize, new.reshape(-1)
    return sum(len(zlib.compress(flat[i::size].tobytes())) for i in range(size))


def diff_on_text(
    before: Model,
    after: Model,
    documents: Sequence[Document],
    progress: CountProgress | None = None,
) -> TextChange:
    """Compare two models of one backbone on text; the start of each document, as in vetting.

    Args:
        before: One model.
        after: The other.
        documents: The text.
        progress: Called with the number of documents scored and in all.
    """
    texts, n = [document.text.encode() for document in documents], len(documents)

    def count(offset: int) -> CountProgress | None:
        return None if progress is None else lambda done, _: progress(offset + done, 3 * n)

    scorers = (path_scorer(before), mix_scorer(before), mix_scorer(after))
    scores = [
        score_documents(
            scorer, texts, context=before.context, max_bytes=MAX_BYTES, progress=count(i * n)
        )
        for i, scorer in enumerate(scorers)
    ]
    weights = [
        [
            1 - float(trace_TE[:, 0].mean())
            for trace_TE in trace_routing(model, texts, max_bytes=MAX_BYTES)
        ]
        for model in (before, after)
    ]
    bits_MB = [score.nats_B / score.n_bytes_B / np.log(2) for score in scores]
    changed = tuple(
        DocumentChange(
            id=document.id,
            n_bytes=int(scores[0].n_bytes_B[i]),
            bits=(float(bits_MB[0][i]), float(bits_MB[1][i]), float(bits_MB[2][i])),
            weight=(weights[0][i], weights[1][i]),
        )
        for i, document in enumerate(documents)
    )
    change_B = bits_MB[2] - bits_MB[1]
    interval = mean_interval(change_B) if n > 1 else None
    return TextChange(documents=changed, change=float(change_B.mean()), interval=interval)
