"""The manifest and README of a merged expert: the base's, with what the sides added."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from composable.assembly.backbones import LoadedBackbone
from composable.errors import MergeError
from composable.packaging.manifests.licenses import parse_license
from composable.packaging.manifests.manifest import Manifest, Training
from composable.packaging.manifests.packing import fit_interface
from composable.packaging.registry.compatibility import (
    Change,
    compare_manifests,
    needed_bump,
    next_version,
)
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.version import Version
from composable.workflows.merge_report import GROUP, MergeReport
from composable.workflows.merge_sides import Side


def make_manifest(
    loaded: LoadedBackbone,
    base: Side,
    sides: Sequence[Side],
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


def describe_merge(manifest: Manifest, report: MergeReport) -> str:
    """Return the README of a merged expert."""
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
