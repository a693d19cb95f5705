"""Choose among candidates by evidence: by text if there is any, and by statistics otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from typing import Final

import numpy as np

from composable.assembly.backbones import LoadedBackbone
from composable.corpora.documents import Document
from composable.errors import MergeError
from composable.merging.methods import Candidate, list_candidates, merge_candidates
from composable.merging.statistics import MatrixStatistics, predict_changes, sum_terms
from composable.merging.updates import Matrices, find_updates
from composable.model.model import Model, Pluggable
from composable.progress import CountProgress
from composable.vetting.evaluation import Score, mix_scorer, score_documents
from composable.vetting.noninferiority import MARGIN, Outcome, compare_losses
from composable.workflows.expert_matrices import from_matrices, to_matrices
from composable.workflows.merge_report import (
    GROUP,
    PARTS,
    Conflict,
    Judgement,
    MergeReport,
    Part,
    Tried,
)
from composable.workflows.merge_scores import ScoredText
from composable.workflows.merge_sides import Side

# Documents of each text that candidates are compared on, and that the best one is judged on, at
# most; and bytes of each of these.
MAX_CHOOSING: Final = 32
MAX_JUDGING: Final = 256
JUDGED_BYTES: Final = 2048


class Judge:
    """Compares candidates by text if there is any, and by statistics otherwise.

    Args:
        loaded: The backbone.
        base: The base.
        sides: The sides.
        texts: Text that candidates are compared on, by name.
        text_judge: Has other documents of the same texts, on which the best candidate is judged;
            None if there is no text.
        progress: Called with candidates compared and in all.
    """

    def __init__(
        self,
        loaded: LoadedBackbone,
        base: Side,
        sides: Sequence[Side],
        texts: Mapping[str, ScoredText],
        text_judge: TextJudge | None,
        progress: CountProgress | None,
    ) -> None:
        self._loaded, self._base, self._sides = loaded, base, sides
        self._texts, self._text_judge, self._progress = texts, text_judge, progress
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
        sides = [side.matrices for side in self._sides]
        limits = {
            part: {label: text.best(part, sides) for label, text in self._texts.items()}
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

    def _predict(self, side: Side, matrices: Matrices) -> dict[str, float]:
        assert side.statistics is not None  # checked before
        return predict_changes(side.statistics.matrices, side.matrices, matrices)

    def _judge(self, expert: Pluggable, matrices: Matrices) -> Iterator[Judgement]:
        """Yield judgements on the chosen expert."""
        if self._text_judge is not None:
            yield from self._text_judge.judge(self._loaded.plug([expert]))
            return
        for side in self._sides:
            assert side.statistics is not None  # checked before
            # The loss of a scout is predicted in order, but many times too large: its changes are
            # far outside the range of a quadratic (docs/results/merging.md).
            described = {
                name: found
                for name, found in side.statistics.matrices.items()
                if name.startswith("body")
            }
            before = _own_nats(side, "body")
            grown = self._measure("body", matrices, {})[side.release]
            terms = sum_terms(described, side.matrices, matrices) / before
            yield Judgement(
                text=side.release,
                side=side.release,
                before=before,
                after=before * (1 + grown),
                outcome=_judge_prediction(grown, terms),
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


def split_text(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Return the documents that candidates are chosen on, and those that the choice is judged on.

    The best of many candidates looks better than it is on the text that it was chosen on. So every
    fourth document, from the first, chooses and does not judge. Of equal documents one counts.

    Args:
        documents: All that there are; of a single one both use it, and nothing is shown.

    Example:
        >>> choose, judge = split_text([Document(str(i), f"text {i}") for i in range(5)])
        >>> [document.id for document in choose], [document.id for document in judge]
        (['0', '4'], ['1', '2', '3'])
    """
    different = list({document.text: document for document in documents}.values())
    judge = [document for i, document in enumerate(different) if i % 4]
    return different[::4][:MAX_CHOOSING], (judge or different)[:MAX_JUDGING]


def count_documents(judged: int) -> int:
    """Return how many documents are needed, if so many are to be left to judge on.

    Example:
        >>> count_documents(15)
        20
    """
    return judged + -(-judged // 3)


class TextJudge:
    """Judges experts that would replace sides, in mix mode, document by document.

    Args:
        sides: Models with one side installed each, by name; each is scored once.
        texts: Documents by name of the text.
    """

    def __init__(self, sides: Mapping[str, Model], texts: Mapping[str, Sequence[bytes]]) -> None:
        self._sides, self._texts = sides, texts

    @cached_property
    def _before(self) -> dict[str, dict[str, Score]]:
        return {
            label: {side: _score(model, documents) for side, model in self._sides.items()}
            for label, documents in self._texts.items()
        }

    def judge(self, merged: Model) -> Iterator[Judgement]:
        """Yield, for every text and side, what `compare_losses` finds.

        Args:
            merged: A model with what would replace the sides.
        """
        for label, documents in self._texts.items():
            after = _score(merged, documents)
            for side, before in self._before[label].items():
                found = compare_losses(before.nats_B, after.nats_B)
                is_bounded = bool(np.isfinite(found.high))
                yield Judgement(
                    text=label,
                    side=side,
                    before=before.bits_per_byte,
                    after=after.bits_per_byte,
                    outcome=found.outcome,
                    low=found.low if is_bounded else None,
                    high=found.high if is_bounded else None,
                    documents=found.documents,
                    needed=found.needed if found.outcome == "undecided" else 0,
                )


def _score(model: Model, documents: Sequence[bytes]) -> Score:
    """Score the starts of documents in mix mode."""
    return score_documents(
        mix_scorer(model), documents, context=model.context, max_bytes=JUDGED_BYTES
    )


def judge_group(
    loaded: LoadedBackbone,
    base: Side,
    sides: Sequence[Side],
    text_judge: TextJudge | None,
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
    judgements: tuple[Judgement, ...] = ()
    if text_judge is not None:
        model = loaded.plug([base.expert, *(side.expert for side in sides)])
        judgements = tuple(text_judge.judge(model))
    return MergeReport(
        base=base.release,
        sides=tuple(side.release for side in sides),
        evidence="statistics" if text_judge is None else "text",
        tried=report.tried if report else {},
        chosen=dict.fromkeys(PARTS, GROUP),
        judgements=judgements,
        conflicts=report.conflicts if report else (),
        declined=report.judgements if report else (),
        release=name,
    )


def _judge_prediction(change: float, terms: float) -> Outcome:
    """Return what statistics show: they hold as far as every term of the series is small."""
    if terms < MARGIN:
        return "not worse"
    return "worse" if change > MARGIN else "undecided"


def _own_nats(side: Side, part: Part) -> float:
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
