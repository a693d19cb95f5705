"""Merge experts that derive from one release, by the method that the evidence favours.

Body and scout are merged with the same methods and chosen separately. The evidence is either the
statistics that every side publishes, or text. Where no method is good enough, the error holds a
report of what conflicts, and nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Final, Literal

import numpy as np

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert
from composable.assembly.load import find_registries
from composable.corpora.documents import Document, write_documents
from composable.errors import (
    InterfaceError,
    MergeConflictError,
    MergeError,
    PackagingError,
    UnreachableError,
)
from composable.files import atomic
from composable.files.folders import require_empty_folder
from composable.files.safetensors import write_tensors
from composable.merging.methods import METHODS, Candidate, list_candidates, merge_candidates
from composable.merging.statistics import MatrixStatistics, predict_changes
from composable.merging.updates import Matrices, find_updates
from composable.model.model import Model, Pluggable
from composable.model.tensors import to_tensors
from composable.packaging.manifests.licenses import parse_license
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    EXPERT_FILE,
    SCOUT_FILE,
    Manifest,
    Training,
)
from composable.packaging.manifests.packing import fit_interface
from composable.packaging.registry.compatibility import (
    Change,
    compare_manifests,
    needed_bump,
    next_version,
)
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.names import check_package_name
from composable.packaging.versions.version import Version
from composable.progress import CountProgress
from composable.vetting.card import tensor_digests
from composable.vetting.evaluation import mix_scorer, score_documents
from composable.vetting.evidence import MAX_BYTES
from composable.vetting.regression import MAX_REGRESSION
from composable.vetting.statistics import is_above
from composable.workflows.expert_matrices import from_matrices, to_matrices
from composable.workflows.merge_scores import ScoredText, prepare_text
from composable.workflows.statistics import ExpertStatistics, read_statistics
from composable.workflows.workspace import HELDOUT_FILE, WORK

Part = Literal["body", "scout"]
PARTS: Final[tuple[Part, ...]] = ("body", "scout")
# Keeps every side as it is: the merged release requires them all.
GROUP: Final = "group"
# A side's loss may be predicted to grow by this share: what statistics cannot tell from nothing.
MAX_PREDICTED: Final = 0.01
# Documents of each text that candidates are compared on, and whole merged experts are judged on.
MAX_DOCUMENTS: Final = 32


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What the evidence says of one candidate for one part.

    Args:
        method: Its method.
        scale: Factor of the mean of the sides' updates.
        setting: What else the method has.
        changes: By text, the loss as a share of that of the best side there, minus one: measured,
            or predicted from the statistics of the side whose text it is.
    """

    method: str
    scale: float
    setting: float | None
    changes: dict[str, float]

    @property
    def worst(self) -> float:
        """The change on the text where it is largest."""
        return max(self.changes.values())

    @property
    def mean(self) -> float:
        """The mean change over texts."""
        return float(np.mean(list(self.changes.values())))

    @property
    def candidate(self) -> Candidate:
        """The method with its settings."""
        return Candidate(method=self.method, scale=self.scale, setting=self.setting)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Whether the merged expert is worse than a side on a text.

    Args:
        text: The text.
        side: The side that it is compared with.
        before: Loss of the side: bits per byte in mix mode, or from its statistics nats per token
            of its body.
        after: The same of the merged expert.
        is_worse: Whether it is worse beyond noise and beyond what matters.
    """

    text: str
    side: str
    before: float
    after: float
    is_worse: bool


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """How much the sides' updates of one matrix disagree.

    Args:
        name: `body.slots.LAYER.MATRIX` or `scout.MATRIX`.
        cosine: Least cosine of two sides' updates.
        opposed: Largest share of a pair's weights whose changes have opposite signs, by magnitude.
        losses: With statistics, by side: predicted growth of its loss in nats per token.
    """

    name: str
    cosine: float
    opposed: float
    losses: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, what was tried, and what the evidence says.

    Args:
        base: The release that all sides derive from.
        sides: The sides.
        evidence: `statistics` or `text`.
        tried: By part, every candidate, best first.
        chosen: By part, the best candidate in words, or `group` for both.
        judgements: Of the chosen one, by text and side.
        conflicts: Of every matrix.
        release: The proposed release.
    """

    base: str
    sides: tuple[str, ...]
    evidence: Literal["statistics", "text"]
    tried: dict[str, tuple[Tried, ...]]
    chosen: dict[str, str]
    judgements: tuple[Judgement, ...]
    conflicts: tuple[Conflict, ...]
    release: str

    @property
    def is_good(self) -> bool:
        """Whether the chosen one is worse than no side on any text."""
        return not any(judgement.is_worse for judgement in self.judgements)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One side, or the base."""

    folder: Path
    manifest: Manifest
    expert: Pluggable
    matrices: Matrices
    statistics: ExpertStatistics | None

    @property
    def release(self) -> str:
        return f"{self.manifest.name}@{self.manifest.version}"


def merge_experts(
    loaded: LoadedBackbone,
    base: Path,
    sides: Sequence[Path],
    out: Path,
    *,
    texts: Mapping[str, Sequence[Document]] | None = None,
    methods: Sequence[str] | None = None,
    name: str | None = None,
    progress: CountProgress | None = None,
) -> MergeReport:
    """Merge experts into a new one and write its folder.

    Args:
        loaded: Their backbone.
        base: Folder of the release that all sides derive from.
        sides: Folders of the sides, two at least.
        out: Folder to write; it must be empty or not exist.
        texts: Held-out text by any name, preferably that of the side it is from. Without text, the
            statistics of the sides decide.
        methods: Methods to try, of `METHODS` and `group`; by default all, the group last and with
            text only.
        name: Name of the merged expert; the base's by default.
        progress: Called with candidates judged and in all.

    Returns:
        What was tried, and what was chosen.

    Raises:
        MergeConflictError: If the merged expert would be worse than a side; nothing is written.
        MergeError: If the experts cannot be merged, or there is no evidence to choose by.
        StatisticsError: If statistics are damaged, or do not fit a side's tensors.
        PackagingError: If a folder holds no valid expert, or `out` is in use.
    """
    require_empty_folder(out)
    comparison = compare_methods(
        loaded, base, sides, texts=texts, methods=methods, name=name, progress=progress
    )
    if not comparison.report.is_good:
        raise MergeConflictError(
            f"no method gives an expert that is not worse than a side: at best "
            f"{_describe_losses(comparison.report)}",
            report=comparison.report,
            hint=_advise(comparison),
        )
    comparison.write(out)
    return comparison.report


def require_published_base(base: Path, registry: str | None = None) -> None:
    """Refuse a folder with other tensors than the release of that name and version.

    Sides name the release that they derive from. Its digests are in the registry, if there is one
    that has it; where there is none, the folder's manifest is all there is to go by.

    Args:
        base: Folder of the base.
        registry: Registry to look in; by default as for `load`.

    Raises:
        MergeError: If the tensors differ.
    """
    manifest = Manifest.read(base)
    try:
        registries = find_registries(registry)
        source = registries.open_registry(registries.registry_of(manifest.name))
        releases = source.versions(manifest.name) if source.exists else ()
    except UnreachableError:
        raise
    except PackagingError:
        return  # no registry, or none that has it
    digests = tensor_digests(base)
    for release in releases:
        published = {file.name: file.digest for file in release.files if file.name in digests}
        if release.version == manifest.version and published != digests:
            raise MergeError(
                f"not the {manifest.name}@{manifest.version} of {source.location}, from which the "
                "sides derive: its tensors have other digests",
                where=str(base),
                hint=f"give {manifest.name}@{manifest.version} as BASE instead of the folder",
            )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The best merged expert, whether it is good enough or not.

    Args:
        report: What was tried, and what was chosen.
        manifest: Manifest of the merged expert.
        expert: The expert; of a group, the base.
        texts: The text that it was judged on; none if statistics decided.
    """

    report: MergeReport
    manifest: Manifest
    expert: Pluggable
    texts: Mapping[str, Sequence[Document]]

    def write(self, out: Path) -> None:
        """Write the expert's folder.

        Args:
            out: The folder. The text given is what `composable check` scores the expert on.
        """
        atomic.make_directory(out)
        write_tensors(out / BODY_FILE, to_tensors(self.expert.body, self.manifest.body.dtype))
        write_tensors(out / SCOUT_FILE, to_tensors(self.expert.scout))
        if self.texts:
            atomic.make_directory(out / WORK)
            write_documents(out / WORK / HELDOUT_FILE, list(_mix_texts(self.texts)))
        atomic.write_text(out / "README.md", _describe(self.manifest, self.report))
        atomic.write_text(out / EXPERT_FILE, self.manifest.to_toml())


def compare_methods(
    loaded: LoadedBackbone,
    base: Path,
    sides: Sequence[Path],
    *,
    texts: Mapping[str, Sequence[Document]] | None = None,
    methods: Sequence[str] | None = None,
    name: str | None = None,
    progress: CountProgress | None = None,
) -> Comparison:
    """Return the best merged expert with what the evidence says of it, and write nothing.

    Arguments and errors are those of `merge_experts`, except that a conflict is returned: its
    report is not good.
    """
    wanted = _check_methods(methods)
    root, members = _read_all(loaded, base, sides)
    name = check_package_name(name or root.manifest.name, "--name")
    texts = texts or {}
    merged = [method for method in wanted if method != GROUP]
    may_group = GROUP in wanted and (bool(texts) or methods is not None)
    if not texts and merged and any(side.statistics is None for side in members):
        _refuse_without_evidence(members)
    scored = {
        label: prepare_text(loaded, documents[:MAX_DOCUMENTS]) for label, documents in texts.items()
    }
    report, expert = None, root.expert
    if merged:
        report, expert = _Judge(loaded, root, members, scored, progress).choose(merged, name)
    if (report is None or not report.is_good) and may_group:
        grouped = _judge_group(loaded, root, members, texts, name, report)
        if grouped.is_good or report is None:
            report, expert = grouped, root.expert
    assert report is not None  # there is a method
    manifest = _make_manifest(loaded, root, members, name, report)
    report = dataclasses.replace(report, release=f"{manifest.name}@{manifest.version}")
    return Comparison(report=report, manifest=manifest, expert=expert, texts=texts)


def _check_methods(methods: Sequence[str] | None) -> tuple[str, ...]:
    known = (*METHODS, GROUP)
    for method in methods or ():
        if method not in known:
            raise MergeError(f"{method!r} is not a method, expected one of {', '.join(known)}")
    return tuple(methods) if methods else known


def _read_all(
    loaded: LoadedBackbone, base: Path, sides: Sequence[Path]
) -> tuple[_Side, list[_Side]]:
    """Read base and sides, and refuse what cannot be merged."""
    if len(sides) < 2:
        raise MergeError(f"{len(sides)} expert to merge, expected two at least")
    manifests = [Manifest.read(folder) for folder in (base, *sides)]
    _require_alike(loaded, manifests)
    digests: dict[str, str] = {}
    for folder, manifest in zip((base, *sides), manifests, strict=True):
        release, key = (
            f"{manifest.name}@{manifest.version}",
            str(sorted(tensor_digests(folder).items())),
        )
        if key in digests:
            raise MergeError(
                f"{release} has the same tensors as {digests[key]}: there is nothing to merge",
                where=str(folder),
                hint="leave one of them out",
            )
        digests[key] = release
    root, *members = [
        _Side(
            folder=folder,
            manifest=manifest,
            expert=(expert := load_expert(loaded, folder)),
            matrices=to_matrices(loaded, expert),
            statistics=read_statistics(loaded, folder),
        )
        for folder, manifest in zip((base, *sides), manifests, strict=True)
    ]
    return root, members


def _require_alike(loaded: LoadedBackbone, manifests: Sequence[Manifest]) -> None:
    """Refuse sides of another interface, base, kind or size, before any tensor is read."""
    base, *sides = manifests
    release = f"{base.name}@{base.version}"
    for manifest in manifests:
        side = f"{manifest.name}@{manifest.version}"
        if manifest.interface.name != base.interface.name:
            raise MergeError(
                f"{side} is for router interface {manifest.interface.name}, {release} for "
                f"{base.interface.name}",
                where=f"{side}: interface.name",
                hint="only experts for one backbone can be merged",
            )
        try:
            fit_interface(manifest, loaded.interface)
        except InterfaceError as error:
            raise MergeError(
                f"{side} is for another version of the interface: {error.message}",
                where=f"{side}: {error.where}",
                hint="train it again for this backbone, or merge with the backbone it was made for",
            ) from error
    for manifest in sides:
        side = f"{manifest.name}@{manifest.version}"
        if manifest.derives_from != release:
            found = (
                f"derives from {manifest.derives_from}"
                if manifest.derives_from
                else ("derives from no release")
            )
            raise MergeError(
                f"{side} {found}, expected {release}",
                where=f"{side}: expert.derives-from",
                hint="give as BASE the release that all others derive from",
            )
        if _size(manifest) != _size(base):
            raise MergeError(
                f"{side} has {_size(manifest)}, {release} has {_size(base)}",
                where=f"{side}: body",
                hint="experts with the same kind of body, rank and width of scout can be merged; "
                "`composable train` keeps those of the release in derives-from",
            )
    names = [f"{manifest.name}@{manifest.version}" for manifest in manifests]
    for release in names:
        if names.count(release) > 1:
            raise MergeError(
                f"{release} is given twice, expected different releases",
                where=release,
                hint="a folder that changed a published release needs a version of its own",
            )


def _size(manifest: Manifest) -> str:
    rank = f" of rank {manifest.body.rank}" if manifest.body.rank else ""
    return f"a {manifest.body.kind} body{rank} and a scout {manifest.scout_width} wide"


def _refuse_without_evidence(members: Sequence[_Side]) -> None:
    lacking = [side for side in members if side.statistics is None]
    raise MergeError(
        f"nothing to choose a method by: no text is given, and no statistics were published by "
        f"{', '.join(side.release for side in lacking)}",
        hint=f"give text, as --data {lacking[0].manifest.name}=FILES, or ask the author to run "
        "`composable check DIR --statistics` before publishing",
    )


class _Judge:
    """Compares candidates by text if there is any, and by statistics otherwise."""

    def __init__(
        self,
        loaded: LoadedBackbone,
        base: _Side,
        sides: Sequence[_Side],
        texts: Mapping[str, ScoredText],
        progress: CountProgress | None,
    ) -> None:
        self._loaded, self._base, self._sides = loaded, base, sides
        self._texts, self._progress = texts, progress
        self._statistics: list[Mapping[str, MatrixStatistics]] = [
            side.statistics.matrices for side in sides if side.statistics is not None
        ]

    def choose(self, methods: Sequence[str], name: str) -> tuple[MergeReport, Pluggable]:
        """Return the report on all candidates, and the expert of the best one."""
        has_statistics = len(self._statistics) == len(self._sides)
        candidates = list_candidates(methods, has_statistics=has_statistics)
        if not candidates:
            raise MergeError(
                f"{', '.join(methods)} needs the statistics of every side",
                hint="their authors compute them with `composable check DIR --statistics`",
            )
        limits = {
            part: {label: text.best(part, self._own(part)) for label, text in self._texts.items()}
            for part in PARTS
        }
        tried: dict[Part, list[Tried]] = {part: [] for part in PARTS}
        for candidate, matrices in self._merge(candidates):
            for part in PARTS:
                changes = self._measure(part, matrices, limits[part])
                tried[part].append(
                    Tried(
                        method=candidate.method,
                        scale=candidate.scale,
                        setting=candidate.setting,
                        changes=changes,
                    )
                )
            if self._progress:
                self._progress(len(tried["body"]), len(candidates))
        ranked = {part: tuple(sorted(tried[part], key=lambda t: t.worst)) for part in PARTS}
        best = {part: ranked[part][0] for part in PARTS}
        chosen: Matrices = {}
        for part in PARTS:
            ((_, matrices),) = self._merge([best[part].candidate])
            chosen |= {name: w for name, w in matrices.items() if name.startswith(part)}
        expert = from_matrices(self._loaded, self._base.manifest, chosen)
        report = MergeReport(
            base=self._base.release,
            sides=tuple(side.release for side in self._sides),
            evidence="text" if self._texts else "statistics",
            tried={part: ranked[part] for part in PARTS},
            chosen={part: str(best[part].candidate) for part in PARTS},
            judgements=tuple(self._judge(expert, chosen)),
            conflicts=tuple(self._find_conflicts(chosen)),
            release=name,
        )
        return report, expert

    def _merge(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Matrices]]:
        """Yield candidates with the matrices of the expert that each gives, as written."""
        merged = merge_candidates(
            self._base.matrices,
            [side.matrices for side in self._sides],
            candidates,
            self._statistics,
        )
        for candidate, matrices in merged:
            expert = from_matrices(self._loaded, self._base.manifest, matrices)
            yield candidate, to_matrices(self._loaded, expert)

    def _own(self, part: Part) -> list[Matrices]:
        return [side.matrices for side in self._sides]

    def _measure(
        self, part: Part, matrices: Matrices, limits: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the change of the loss of one part by text, as a share."""
        if self._texts:
            return {
                label: text.score(part, matrices) / limits[label] - 1
                for label, text in self._texts.items()
            }
        return {
            side.release: sum(
                change
                for name, change in self._predict(side, matrices).items()
                if name.startswith(part)
            )
            / _own_nats(side, part)
            for side in self._sides
        }

    def _predict(self, side: _Side, matrices: Matrices) -> dict[str, float]:
        assert side.statistics is not None  # checked before
        return predict_changes(side.statistics.matrices, side.matrices, matrices)

    def _judge(self, expert: Pluggable, matrices: Matrices) -> Iterator[Judgement]:
        """Yield judgements on the chosen expert."""
        if self._texts:
            yield from judge_on_text(
                self._loaded.plug([expert]),
                {side.release: self._loaded.plug([side.expert]) for side in self._sides},
                {label: text.documents for label, text in self._texts.items()},
            )
            return
        for side in self._sides:
            # The loss of a scout is predicted in order, but many times too large: its changes are
            # far outside the range of a quadratic (docs/results/merging.md).
            before, change = _own_nats(side, "body"), self._measure("body", matrices, {})
            grown = change[side.release]
            yield Judgement(
                text=side.release,
                side=side.release,
                before=before,
                after=before * (1 + grown),
                is_worse=grown > MAX_PREDICTED,
            )

    def _find_conflicts(self, matrices: Matrices) -> Iterator[Conflict]:
        updates = [find_updates(self._base.matrices, side.matrices) for side in self._sides]
        has_statistics = len(self._statistics) == len(self._sides)
        losses = (
            {side.release: self._predict(side, matrices) for side in self._sides}
            if has_statistics
            else {}
        )
        for name in self._base.matrices:
            pairs = list(combinations([update[name] for update in updates], 2))
            yield Conflict(
                name=name,
                cosine=min(_cosine(*pair) for pair in pairs),
                opposed=max(_opposed(*pair) for pair in pairs),
                losses={side: found[name] for side, found in losses.items()},
            )


def judge_on_text(
    merged: Model, sides: Mapping[str, Model], texts: Mapping[str, Sequence[bytes]]
) -> Iterator[Judgement]:
    """Yield, for every text and side, whether a merged model is worse than the side beyond noise.

    Documents are compared one by one, in mix mode, as between two releases: worse is a mean
    difference above zero by a one-sided t test at 95 %, and above 0.5 % of the side's bits per
    byte.

    Args:
        merged: A model with the merged expert installed.
        sides: Models with one side installed each, by name.
        texts: Documents by name of the text.
    """
    for label, documents in texts.items():
        bits_B = _document_bits(merged, documents)
        for side, model in sides.items():
            before_B = _document_bits(model, documents)
            yield Judgement(
                text=label,
                side=side,
                before=float(before_B.mean()),
                after=float(bits_B.mean()),
                is_worse=is_above(bits_B - before_B, MAX_REGRESSION * float(before_B.mean())),
            )


def _document_bits(model: Model, documents: Sequence[bytes]) -> np.ndarray:
    """Return bits per byte of the start of every document in mix mode, shape B."""
    score = score_documents(
        mix_scorer(model), documents, context=model.context, max_bytes=MAX_BYTES
    )
    bits_B: np.ndarray = score.nats_B / score.n_bytes_B / np.log(2)
    return bits_B


def _judge_group(
    loaded: LoadedBackbone,
    base: _Side,
    sides: Sequence[_Side],
    texts: Mapping[str, Sequence[Document]],
    name: str,
    report: MergeReport | None,
) -> MergeReport:
    """Return the report on keeping every side; without text there is nothing to judge."""
    names = [side.manifest.name for side in sides]
    if len({*names, name}) <= len(names):
        if report is not None:
            return report
        raise MergeError(
            f"a group needs packages of different names, found {', '.join([name, *names])}",
            hint="give the group another name with --name, or publish the sides under their own",
        )
    documents = {
        label: [document.text.encode() for document in found[:MAX_DOCUMENTS]]
        for label, found in texts.items()
    }
    judgements: tuple[Judgement, ...] = ()
    if documents:
        judgements = tuple(
            judge_on_text(
                loaded.plug([base.expert, *(side.expert for side in sides)]),
                {side.release: loaded.plug([side.expert]) for side in sides},
                documents,
            )
        )
    return MergeReport(
        base=base.release,
        sides=tuple(side.release for side in sides),
        evidence="text" if documents else "statistics",
        tried=report.tried if report else {},
        chosen=dict.fromkeys(PARTS, GROUP),
        judgements=judgements,
        conflicts=report.conflicts if report else (),
        release=name,
    )


def _describe_losses(report: MergeReport) -> str:
    return "; ".join(
        f"{row.before:.3f} to {row.after:.3f} on {row.text} against {row.side}"
        for row in report.judgements
        if row.is_worse
    )


def _advise(comparison: Comparison) -> str:
    if comparison.texts:
        return "install the sides one beside the other, or train one of them further"
    return (
        "give held-out text with --data, by which more can be told apart, or keep all sides behind "
        f"one name with --method {GROUP}"
    )


def _own_nats(side: _Side, part: Part) -> float:
    """Return a side's own loss in its statistics."""
    assert side.statistics is not None  # checked before
    record = side.statistics.record
    return record.body_nats if part == "body" else record.scout_nats


def _cosine(one_DF: np.ndarray, two_DF: np.ndarray) -> float:
    norm = float(np.linalg.norm(one_DF) * np.linalg.norm(two_DF))
    return float(np.vdot(one_DF, two_DF)) / norm if norm else 0.0


def _opposed(one_DF: np.ndarray, two_DF: np.ndarray) -> float:
    """Return the share of two updates, by magnitude, where their signs are opposite."""
    size_DF = np.minimum(np.abs(one_DF), np.abs(two_DF))
    total = float(size_DF.sum())
    return float(size_DF[one_DF * two_DF < 0].sum()) / total if total else 0.0


def _make_manifest(
    loaded: LoadedBackbone,
    base: _Side,
    sides: Sequence[_Side],
    name: str,
    report: MergeReport,
) -> Manifest:
    """Return the manifest of the merged expert: the base's, with what the sides added."""
    manifests = [base.manifest, *(side.manifest for side in sides)]
    old = fit_interface(base.manifest, loaded.interface)
    requires = _join_ranges([manifest.requires for manifest in manifests])
    is_group = GROUP in report.chosen.values()
    if is_group:
        requires |= {m.name: Constraint(f"^{m.version}") for m in manifests[1:]}
    requires.pop(name, None)
    how = (
        "keeps them all installed"
        if is_group
        else "; ".join(f"{part}: {choice}" for part, choice in report.chosen.items())
    )
    merged = dataclasses.replace(
        old,
        name=name,
        license=_join_licenses(manifests),
        authors=_join(manifest.authors for manifest in manifests),
        languages=_join(manifest.languages for manifest in manifests),
        domains=_join(manifest.domains for manifest in manifests),
        provides=_join(manifest.provides for manifest in manifests),
        derives_from=base.release,
        merges=tuple(side.release for side in sides),
        requires=requires,
        conflicts=_join_conflicts(manifests),
        training=Training(data=f"Merged from {', '.join(report.sides)} ({how})."),
        origin=None,
        provenance=None,
        files=(),
    )
    return dataclasses.replace(merged, version=_propose_version(old, merged, manifests))


def _propose_version(old: Manifest, merged: Manifest, manifests: Sequence[Manifest]) -> Version:
    """Return the lowest version after all releases of that name, or 1.0.0 for a new name."""
    older = [manifest.version for manifest in manifests if manifest.name == merged.name]
    if not older:
        return Version("1.0.0")
    changes = [*compare_manifests(old, merged), Change("patch", "other weights")]
    return next_version(max(older), needed_bump(changes))


def _join(lists: Iterator[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for texts in lists for text in texts))


def _join_ranges(tables: Sequence[Mapping[str, Constraint]]) -> dict[str, Constraint]:
    """Return the ranges of all tables; a package in several of them is in all their ranges."""
    found: dict[str, list[str]] = {}
    for table in tables:
        for name, range_ in table.items():
            if str(range_) not in found.setdefault(name, []):
                found[name].append(str(range_))
    return {name: Constraint(", ".join(ranges)) for name, ranges in found.items()}


def _join_conflicts(manifests: Sequence[Manifest]) -> dict[str, Constraint]:
    """Return the conflicts of all; a range cannot stand for either of two ranges."""
    found: dict[str, Constraint] = {}
    for manifest in manifests:
        for name, range_ in manifest.conflicts.items():
            if found.setdefault(name, range_) != range_:
                raise MergeError(
                    f"{manifest.name}@{manifest.version} conflicts with {name} {range_}, another "
                    f"with {name} {found[name]}",
                    where=f"{manifest.name}@{manifest.version}: conflicts.{name}",
                    hint="give both the same range",
                )
    return found


def _join_licenses(manifests: Sequence[Manifest]) -> str:
    """Return an SPDX expression of all licences; empty if one of them states none."""
    licenses = list(dict.fromkeys(manifest.license for manifest in manifests))
    if len(licenses) == 1:
        return licenses[0]
    if not all(licenses):
        return ""
    return parse_license(" AND ".join(f"({text})" for text in licenses))


def _mix_texts(texts: Mapping[str, Sequence[Document]]) -> Iterator[Document]:
    """Yield documents of all texts in turn: vetting reads the first ones alone."""
    for group in zip_longest(*([(label, d) for d in texts[label]] for label in texts)):
        for label, document in filter(None, group):
            yield dataclasses.replace(document, id=f"{label}/{document.id}")


def _describe(manifest: Manifest, report: MergeReport) -> str:
    lines = [
        f"# {manifest.name}",
        "",
        manifest.description,
        "",
        f"Merged with `composable merge` from {' and '.join(report.sides)}, which derive from "
        f"{report.base}, by {report.evidence}.",
        "",
        *(f"- {part}: {choice}" for part, choice in report.chosen.items()),
    ]
    return "\n".join(lines) + "\n"
