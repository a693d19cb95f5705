"""Merge experts that derive from one release, by the method that the evidence favours.

Body and scout are merged with the same methods and chosen separately. The evidence is either the
statistics that every side publishes, or text. Where no method is good enough, the error holds a
report of what conflicts, and nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from composable.assembly.backbones import LoadedBackbone
from composable.corpora.documents import Document, write_documents
from composable.errors import MergeConflictError, MergeError
from composable.files import atomic
from composable.files.folders import require_empty_folder
from composable.files.safetensors import write_tensors
from composable.merging.methods import METHODS
from composable.model.model import Pluggable
from composable.model.tensors import to_tensors
from composable.packaging.manifests.manifest import (
    BODY_FILE,
    EXPERT_FILE,
    SCOUT_FILE,
    Manifest,
)
from composable.packaging.versions.names import check_package_name
from composable.progress import CountProgress
from composable.vetting.noninferiority import MARGIN
from composable.workflows.merge_choice import (
    Judge,
    TextJudge,
    count_documents,
    judge_group,
    split_text,
)
from composable.workflows.merge_manifest import describe_merge, make_manifest
from composable.workflows.merge_report import GROUP, MergeReport, describe_judgement
from composable.workflows.merge_scores import prepare_text
from composable.workflows.merge_sides import Side, read_sides, refuse_without_evidence
from composable.workflows.workspace import HELDOUT_FILE, WORK


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
        message, hint = _explain(comparison.report)
        raise MergeConflictError(message, report=comparison.report, hint=hint)
    comparison.write(out)
    return comparison.report


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The best merged expert, whether it is good enough or not.

    Args:
        report: What was tried, and what was chosen.
        manifest: Manifest of the merged expert.
        expert: The expert; of a group, the base.
        texts: The documents that it was judged on; none if statistics decided.
    """

    report: MergeReport
    manifest: Manifest
    expert: Pluggable
    texts: Mapping[str, Sequence[Document]]

    def write(self, out: Path) -> None:
        """Write the expert's folder.

        Args:
            out: The folder. `composable check` scores the expert on the documents that judged it.
        """
        atomic.make_directory(out)
        write_tensors(out / BODY_FILE, to_tensors(self.expert.body, self.manifest.body.dtype))
        write_tensors(out / SCOUT_FILE, to_tensors(self.expert.scout))
        if self.texts:
            atomic.make_directory(out / WORK)
            write_documents(out / WORK / HELDOUT_FILE, list(_mix_texts(self.texts)))
        atomic.write_text(out / "README.md", describe_merge(self.manifest, self.report))
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
    root, members = read_sides(loaded, base, sides)
    name = check_package_name(name or root.manifest.name, "--name")
    texts = texts or {}
    merged = [method for method in wanted if method != GROUP]
    may_group = GROUP in wanted and (bool(texts) or methods is not None)
    if not texts and merged and any(side.statistics is None for side in members):
        refuse_without_evidence(members)
    split = {label: split_text(documents) for label, documents in texts.items()}
    judged = {label: judge for label, (_, judge) in split.items()}
    text_judge = _make_text_judge(loaded, members, judged) if texts else None
    report, expert = None, root.expert
    if merged:
        scored = {label: prepare_text(loaded, choose) for label, (choose, _) in split.items()}
        judge = Judge(loaded, root, members, scored, text_judge, progress)
        report, expert = judge.choose(merged, name)
    if (report is None or not report.is_good) and may_group:
        grouped = judge_group(loaded, root, members, text_judge, name, report)
        if grouped.is_good or report is None:
            report, expert = grouped, root.expert
    assert report is not None  # there is a method
    manifest = make_manifest(loaded, root, members, name, report)
    report = dataclasses.replace(report, release=f"{manifest.name}@{manifest.version}")
    return Comparison(report=report, manifest=manifest, expert=expert, texts=judged)


def _make_text_judge(
    loaded: LoadedBackbone, sides: Sequence[Side], texts: Mapping[str, Sequence[Document]]
) -> TextJudge:
    return TextJudge(
        {side.release: loaded.plug([side.expert]) for side in sides},
        {label: [d.text.encode() for d in documents] for label, documents in texts.items()},
    )


def _check_methods(methods: Sequence[str] | None) -> tuple[str, ...]:
    known = (*METHODS, GROUP)
    for method in methods or ():
        if method not in known:
            raise MergeError(f"{method!r} is not a method, expected one of {', '.join(known)}")
    return tuple(methods) if methods else known


def _explain(report: MergeReport) -> tuple[str, str]:
    """Return why a merged expert is refused, and what can be done about it."""
    worse = [row for row in report.judgements if row.outcome == "worse"]
    if worse:
        return (
            "no method gives an expert that is not worse than a side: at best "
            f"{'; '.join(describe_judgement(row) for row in worse)}",
            "install the sides one beside the other, or train one of them further"
            if report.evidence == "text"
            else "give held-out text with --data, by which more can be told apart, or keep all "
            f"sides behind one name with --method {GROUP}",
        )
    unclear = [row for row in report.judgements if row.outcome == "undecided"]
    found = "; ".join(describe_judgement(row) for row in unclear)
    if report.evidence == "statistics":
        return (
            f"the changes are too large for statistics to predict their effect: {found}",
            "give held-out text of every side with --data NAME=FILES, or keep all sides behind one "
            f"name with --method {GROUP}",
        )
    return (
        "there is too little text to show that the merged expert is not worse than a side by "
        f"{MARGIN:.0%}: {found}",
        f"give at least {count_documents(max(row.needed for row in unclear))} documents of each "
        "text with --data",
    )


def _mix_texts(texts: Mapping[str, Sequence[Document]]) -> Iterator[Document]:
    """Yield documents of all texts in turn: vetting reads the first ones alone."""
    for group in zip_longest(*([(label, d) for d in texts[label]] for label in texts)):
        for label, document in filter(None, group):
            yield dataclasses.replace(document, id=f"{label}/{document.id}")
