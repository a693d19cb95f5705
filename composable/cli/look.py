"""Commands that read projects and registries and change nothing."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composable.cli.options import Json, LookupRegistry, MaxStale, Offline, Quiet, complete_names
from composable.cli.output import format_bytes, format_table, note, show
from composable.cli.project import open_project
from composable.errors import ComposableError
from composable.files.records import parse_record, parse_table
from composable.printable import printable

if TYPE_CHECKING:
    from composable.packaging.project.audit import Finding
    from composable.packaging.project.project import Project
    from composable.packaging.project.queries import Details, Need

app = typer.Typer(rich_markup_mode=None)


@app.command(name="list")
def list_(as_json: Json = False, is_quiet: Quiet = False) -> None:
    """List installed experts."""
    from composable.packaging.project.project import Project

    experts = Project.find().environment.lock.experts
    rows = [
        (e.name, e.version, format_bytes(sum(file.size for file in e.files)), e.origin)
        for e in experts
    ]
    data = [
        {
            "name": e.name,
            "version": str(e.version),
            "bytes": sum(file.size for file in e.files),
            "registry": e.registry,
            "path": e.path,
            "editable": e.is_editable,
        }
        for e in experts
    ]
    text = format_table(("NAME", "VERSION", "SIZE", "FROM"), rows)
    show(text or "no experts installed", data, as_json=as_json, is_quiet=is_quiet)


@app.command()
def tree(as_json: Json = False, is_quiet: Quiet = False) -> None:
    """Show the locked experts as a dependency tree."""
    from composable.packaging.install.lock import Lock
    from composable.packaging.project.project import Project
    from composable.packaging.project.queries import build_dependency_tree

    project = Project.find()
    needs = build_dependency_tree(project, Lock.read(project.root))
    text = "\n".join(_format_tree(needs)) or "no experts locked"
    show(text, [_need_to_dict(need) for need in needs], as_json=as_json, is_quiet=is_quiet)


@app.command()
def why(
    name: Annotated[
        str, typer.Argument(metavar="NAME", autocompletion=complete_names, show_default=False)
    ],
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Show which requirements lead to an expert."""
    from composable.packaging.install.lock import Lock
    from composable.packaging.project.project import PROJECT_FILE, Project
    from composable.packaging.project.queries import find_reasons

    project = Project.find()
    lock = Lock.read(project.root)
    chains = find_reasons(project, lock, name)
    lines = [f"{name} {lock.versions[name]}"]
    for chain in chains:
        dependents = [
            PROJECT_FILE,
            *(f"{step.name} {lock.versions[step.name]}" for step in chain[:-1]),
        ]
        steps = (
            f"{dependent} requires {step}"
            for dependent, step in zip(dependents, chain, strict=True)
        )
        lines.append("  " + ", ".join(steps))
    data = [
        [{"name": step.name, "range": str(step.constraint)} for step in chain] for chain in chains
    ]
    show(
        "\n".join(lines),
        {"name": name, "version": str(lock.versions[name]), "reasons": data},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def outdated(
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """List installed experts that have a newer release."""
    from composable.packaging.install.lock import Lock
    from composable.packaging.project.queries import find_outdated

    project, interface = open_project(is_offline, max_stale)
    found = find_outdated(project, Lock.read(project.root), interface)
    rows = [(item.name, item.locked, item.allowed, item.newest) for item in found]
    data = [{key: str(value) for key, value in dataclasses.asdict(i).items()} for i in found]
    text = format_table(("NAME", "LOCKED", "ALLOWED", "NEWEST"), rows)
    show(text or "everything is up to date", data, as_json=as_json, is_quiet=is_quiet)


@app.command()
def search(
    word: Annotated[str, typer.Argument(metavar="WORD", show_default=False)],
    registry: LookupRegistry = None,
    only_signed: Annotated[
        bool, typer.Option("--signed", help="Search signed registries only.")
    ] = False,
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Search the registries by name, description and tags."""
    from composable.packaging.project.queries import search_experts

    project = _open_registries(registry, is_offline, max_stale)
    found = list(search_experts(project, word, only_signed=only_signed))
    rows = [(r.name, r.version, name, r.description) for name, r in found]
    data = [
        {
            "name": r.name,
            "version": str(r.version),
            "registry": name,
            "description": r.description,
            "tags": list(r.tags),
            "interface": r.interface,
        }
        for name, r in found
    ]
    text = format_table(("NAME", "VERSION", "REGISTRY", "DESCRIPTION"), rows)
    show(text or f"nothing found for {word!r}", data, as_json=as_json, is_quiet=is_quiet)


@app.command()
def info(
    requirement: Annotated[str, typer.Argument(metavar="NAME[@V]", show_default=False)],
    registry: LookupRegistry = None,
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Show the details of a release."""
    from composable.packaging.project.queries import describe_expert
    from composable.packaging.versions.constraint import Requirement

    details = describe_expert(
        _open_registries(registry, is_offline, max_stale), Requirement.parse(requirement)
    )
    facts = dict(_facts(details))
    show(format_table((), facts.items()), _all_facts(details), as_json=as_json, is_quiet=is_quiet)


@app.command()
def audit(
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Check the locked experts against advisories.

    Reads the feed of advisories of every registry in the lock. Exits with 1 if one of them affects
    a locked release, and lists which release fixes it.
    """
    from composable.packaging.install.lock import Lock
    from composable.packaging.project.audit import audit_lock
    from composable.packaging.project.project import Project

    project = dataclasses.replace(
        Project.find(), is_offline=is_offline, max_stale=datetime.timedelta(days=max_stale)
    )
    lock = Lock.read(project.root)
    found = audit_lock(project, lock)
    for registry, n in found.feeds.items():
        if n is None:
            note(f"note: registry {registry!r} has no advisories", is_quiet=is_quiet or as_json)
    rows = [
        (
            f"{finding.expert.name} {finding.expert.version}",
            finding.advisory.kind,
            finding.advisory.id,
            finding.fix or "-",
        )
        for finding in found.findings
    ]
    text = format_table(("RELEASE", "KIND", "ADVISORY", "FIXED IN"), rows)
    texts = {finding.advisory.id: finding.advisory.text for finding in found.findings}
    text += "".join(f"\n{printable(f'{id_}: {said}')}" for id_, said in texts.items())
    text += "".join(f"\n{line}" for line in _list_remedies(found.findings))
    n = len(lock.experts)
    total = sum(number or 0 for number in found.feeds.values())
    show(
        text
        or f"{n} locked expert{'s' * (n != 1)}, {total} advisor{'ies' if total != 1 else 'y'}: "
        "none is affected",
        {
            "affected": [_finding_to_dict(finding) for finding in found.findings],
            "feeds": found.feeds,
            "without_registry": list(found.without_registry),
        },
        as_json=as_json,
        is_quiet=is_quiet and not rows,
    )
    if rows:
        raise typer.Exit(1)


@app.command()
def bom(
    kind: Annotated[
        str, typer.Option("--format", metavar="cyclonedx|spdx", help="CycloneDX 1.6 or SPDX 2.3.")
    ] = "cyclonedx",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Output file. Default: print it.", show_default=False),
    ] = None,
    is_offline: Offline = False,
    max_stale: MaxStale = 0,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Write a bill of materials: what the locked model consists of.

    Lists the backbone and every locked expert with licences, digests, data and figures, as JSON.
    The same lock gives the same bytes; a time is included if SOURCE_DATE_EPOCH is set.
    """
    if kind not in ("cyclonedx", "spdx"):
        raise typer.BadParameter(f"{kind!r}: expected cyclonedx or spdx", param_hint="--format")
    from composable import __version__
    from composable.files import atomic
    from composable.packaging.bom.cyclonedx import format_cyclonedx
    from composable.packaging.bom.inventory import read_source_date, take_inventory
    from composable.packaging.bom.spdx import format_spdx
    from composable.packaging.install.lock import Lock
    from composable.packaging.install.store import Store

    time = read_source_date()
    project, interface = open_project(is_offline, max_stale)
    inventory = take_inventory(project, Lock.read(project.root), Store(), interface)
    format_bom = format_cyclonedx if kind == "cyclonedx" else format_spdx
    text = format_bom(inventory, __version__, time)
    if output is None:
        print(text, end="")
        return
    atomic.write_text(output, text)
    n = len(inventory.parts)
    show(
        f"wrote {output}: {n} package{'s' * (n != 1)}",
        {
            "written": str(output),
            "format": kind,
            "packages": [part.purl for part in inventory.parts],
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def resolve(
    universe: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE.json",
            help="Releases and requirements.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Resolve requirements against releases listed in a JSON file.

    Prints {"packages": {NAME: VERSION}}. If there is no solution, prints why and exits with 1.
    """

    from composable.errors import ManifestError
    from composable.files.reading import read_bytes
    from composable.packaging.resolution.resolver import resolve as resolve_universe
    from composable.packaging.resolution.universe import Universe

    data = parse_table(read_bytes(universe), str(universe), ManifestError)
    packages = resolve_universe(Universe.from_dict(data, universe.name)).packages
    chosen = {name: str(version) for name, version in packages.items()}
    show("", {"packages": chosen}, as_json=True)


def _list_remedies(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield what to do about each affected release, once."""
    lines: dict[str, None] = {}
    for finding in findings:
        name = finding.expert.name
        if finding.expert.path is not None:
            line = f"{name}: comes from {printable(finding.expert.origin)}; replace that folder"
        elif finding.fix is None:
            line = f"{name}: no release fixes it; run `composable remove {name} && composable sync`"
        elif finding.is_fix_allowed:
            line = f"{name}: run `composable upgrade {name}`"
        else:
            line = f"{name}: {finding.fix} is out of range; see `composable why {name}`"
        lines[line] = None
    yield from lines


def _finding_to_dict(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.expert.name,
        "version": str(finding.expert.version),
        "registry": finding.registry,
        "fix": str(finding.fix) if finding.fix else None,
        "fix_allowed": finding.is_fix_allowed,
        "advisory": finding.advisory.to_row(),
    }


def _open_registries(registry: str | None, is_offline: bool, max_stale_days: float) -> Project:
    """Return the project, or an empty one with a single registry."""
    from composable.packaging.project.project import Project

    max_stale = datetime.timedelta(days=max_stale_days)
    if registry is None:
        return dataclasses.replace(Project.find(), is_offline=is_offline, max_stale=max_stale)
    return Project(
        root=Path.cwd(),
        backbone="",
        registries={"default": registry},
        default_registry="default",
        is_offline=is_offline,
        max_stale=max_stale,
    )


def _format_tree(needs: Sequence[Need], indent: str = "") -> Iterator[str]:
    """Yield the lines of a dependency tree."""
    for index, need in enumerate(needs):
        is_last = index == len(needs) - 1
        branch = "└── " if is_last else "├── "
        wanted = "" if str(need.range) == "*" else f" ({need.range})"
        again = " (see above)" if need.is_repeated else ""
        yield f"{indent}{branch}{need.name} {need.version}{wanted}{again}"
        yield from _format_tree(need.needs, indent + ("    " if is_last else "│   "))


def _need_to_dict(need: Need) -> dict[str, Any]:
    return {
        "name": need.name,
        "version": str(need.version),
        "range": str(need.range),
        "needs": [_need_to_dict(other) for other in need.needs],
        "repeated": need.is_repeated,
    }


def _facts(details: Details) -> Iterator[tuple[str, str]]:
    """Yield the main fields of a release, without empty ones."""
    release, manifest = details.release, details.manifest
    yanked = " (yanked)" if release.is_yanked else ""
    yield "name", release.name
    yield "version", f"{release.version}{yanked}"
    requires = ", ".join(f"{name} {range_}" for name, range_ in manifest.requires.items())
    conflicts = ", ".join(f"{name} {range_}" for name, range_ in manifest.conflicts.items())
    size = sum(file.size for file in manifest.files)
    facts = {
        "description": manifest.description,
        "licence": manifest.license,
        "authors": ", ".join(manifest.authors),
        "interface": f"{manifest.interface.name} {manifest.interface.requires}",
        "body": manifest.body.kind + (f", rank {manifest.body.rank}" if manifest.body.rank else ""),
        "languages": ", ".join(manifest.languages),
        "domains": ", ".join(manifest.domains),
        "derives from": manifest.derives_from or "",
        "merges": ", ".join(manifest.merges),
        "requires": requires,
        "extras": "; ".join(
            f"{extra}: {', '.join(f'{name} {range_}' for name, range_ in ranges.items())}"
            for extra, ranges in manifest.extras.items()
        ),
        "conflicts": conflicts,
        "data": manifest.training.data if manifest.training else "",
        "size": format_bytes(size),
        "published": release.published,
        "signed by": f"{details.signer.publisher} ({details.signer.key})" if details.signer else "",
        "measured": format_measured(details.card),
        "versions": ", ".join(
            f"{r.version}{' (yanked)' if r.is_yanked else ''}" for r in details.versions
        ),
    }
    yield from ((key, value) for key, value in facts.items() if value)


def _all_facts(details: Details) -> dict[str, Any]:
    return {
        **dict(_facts(details)),
        "manifest": details.release.manifest,
        "yanked": details.release.is_yanked,
        "interface_digest": details.release.interface.digest,
        "size": sum(file.size for file in details.release.files),
        "files": [dataclasses.asdict(file) for file in details.release.files],
        "versions": [str(release.version) for release in details.versions],
        "card": details.card,
        "signer": dataclasses.asdict(details.signer) if details.signer else None,
    }


@dataclass(frozen=True, kw_only=True)
class _Bits:
    own_backbone: float
    own_expert: float
    own_mix: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Measured:
    bits_per_byte: _Bits
    anchor_loss: float


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """The figures of a card that are shown; cards are what others wrote."""

    measured: _Measured


def format_measured(card: dict[str, Any]) -> str:
    """Return the figures of a card in a line; an empty string if it has none.

    Example:
        >>> bits = {"own_backbone": 6.32, "own_expert": 2.46, "own_mix": 2.5}
        >>> format_measured({"measured": {"bits_per_byte": bits, "anchor_loss": 0.0}}).split(";")[0]
        '6.320 to 2.460 bits per byte on its own held-out text, 2.500 in mix mode'
    """
    try:
        measured = parse_record(_Figures, json.dumps(card), "card.json").measured
    except ComposableError:
        return ""
    bits = measured.bits_per_byte
    mix = "" if bits.own_mix is None else f", {bits.own_mix:.3f} in mix mode"
    return (
        f"{bits.own_backbone:.3f} to {bits.own_expert:.3f} bits per byte on its own "
        f"held-out text{mix}; public text {measured.anchor_loss:+.2%}"
    )
