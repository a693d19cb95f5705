"""Commands for contributors: create, check, publish and yank experts."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composable.cli import bars
from composable.cli.group import join_group, stop_on_request
from composable.cli.options import (
    Against,
    Beside,
    BesideData,
    Coordinator,
    Data,
    ExpertBackbone,
    ExpertFolder,
    InitTimeout,
    Jobs,
    Json,
    MoreData,
    NumProcesses,
    ProcessId,
    PublishRegistry,
    Quiet,
    ReferenceRegistry,
    Release,
    Results,
    Shard,
)
from composable.cli.output import format_table, note, show

if TYPE_CHECKING:
    from collections.abc import Mapping

    from composable.packaging.registry.compatibility import Step
    from composable.packaging.registry.registry import Registry
    from composable.progress import CountProgress
    from composable.vetting.checks import Verdict
    from composable.workflows.peer_units import PeerWorker

app = typer.Typer(rich_markup_mode=None)


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    backbone: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="Backbone to train for.")
    ] = "tiny-bytes",
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Create an expert from the template.

    Creates the folder NAME in the current directory.
    """
    from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
    from composable.packaging.manifests.manifest import BackbonePackage
    from composable.packaging.manifests.template import create_expert

    home = find_backbone(backbone)
    package = BackbonePackage.read(home)
    folder = Path(name)
    create_expert(folder, name, package.name, read_interface(home))
    show(
        f"created {folder}/: describe the expert in {folder / 'expert.toml'}, then\n"
        f"  composable train {shlex.quote(str(folder))} --data FILES",
        {"created": str(folder), "backbone": package.name},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
@stop_on_request()
def check(
    folder: ExpertFolder,
    more: MoreData = None,
    data: Data = None,
    beside: Beside = None,
    beside_data: BesideData = None,
    against: Against = None,
    statistics: Annotated[
        bool,
        typer.Option(
            "--statistics",
            help="Also write statistics of the text, to publish for those who merge the expert.",
        ),
    ] = False,
    jobs: Jobs = None,
    results: Results = None,
    shard: Shard = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    init_timeout: InitTimeout = 300,
    registry: ReferenceRegistry = None,
    backbone: ExpertBackbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Check an expert and write its card.

    Without --data, uses the text held out by `composable train`. Exits with 1 if a check fails, or
    if --against requires a larger version bump than the one in expert.toml. Of many processes, the
    first one checks.

    With --statistics, the expert also gets statistics.safetensors: figures about that
    text, from which others can merge the expert without the text. The contributor guide describes
    what they reveal. To publish without them, delete the file.

    With --beside, what was measured is kept in the folder of --results, and is not measured again.
    Other machines can do a part of it: each runs the same command with --shard, which writes no
    card; the command without --shard then measures what is missing and writes it.
    """
    texts = dict(parse_pair(pair) for pair in beside_data or ())
    share = parse_share(shard, results)
    if shard is not None and not beside:
        raise typer.BadParameter("needs --beside", param_hint="--shard")
    from composable.packaging.manifests.manifest import Manifest

    manifest = Manifest.read(folder)
    from composable.parallel import wait_for_all

    if not join_group(coordinator, num_processes, process_id, init_timeout, has_steps=False):
        wait_for_all("check")
        return
    from composable.assembly.backbones import load_backbone
    from composable.workflows.peer_units import PeerWorker, make_job
    from composable.workflows.references import compare_releases, find_previous, list_peers
    from composable.workflows.vet import check_expert, require_trained
    from composable.workflows.worker_pool import compute_units, vet_in_units

    files = [*(data or ()), *(more or ())]
    loaded = load_backbone(backbone or manifest.backbone)
    peers = list_peers(
        loaded,
        manifest.name,
        beside or (),
        texts,
        derives_from=manifest.derives_from,
        registry=registry,
    )
    require_trained(folder)
    job = make_job(loaded, folder, peers, registry=registry, results=results, share=share)
    if shard is not None:
        with bars.show_counts("check", is_quiet=is_quiet) as progress:
            worker = PeerWorker(job, loaded)
            compute_units(worker, loaded, n_jobs=jobs, progress=progress)
        wait_for_all("check")
        show_share(worker, shard, as_json=as_json, is_quiet=is_quiet)
        return

    def vet_peers(progress: CountProgress | None) -> Any:
        return vet_in_units(job, loaded, n_jobs=jobs, progress=progress)

    previous = find_previous(loaded, folder, against, registry=registry) if against else None
    with bars.show_counts("check", is_quiet=is_quiet) as progress:
        verdict = check_expert(
            loaded,
            folder,
            files,
            vet_peers=vet_peers if peers else None,
            previous=previous,
            progress=progress,
        )
    if statistics and verdict.evidence is not None:
        from composable.workflows.vet import write_heldout_statistics

        with bars.show_counts("statistics", is_quiet=is_quiet) as progress:
            written = write_heldout_statistics(loaded, folder, files, progress=progress)
        note(
            f"wrote {written}, which `composable publish` will publish with the expert",
            is_quiet=is_quiet,
        )
    wait_for_all("check")
    for warning in verdict.warnings:
        note(f"warning: {warning}")
    rows, outcome, has_passed = _report_verdict(verdict)
    if previous is not None:
        step = compare_releases(folder, loaded.interface, previous, verdict)
        rows.append(_version_row(step))
        outcome["against"] = _version_to_dict(manifest.name, step)
        has_passed = has_passed and step.is_enough
    show(format_table((), rows), outcome, as_json=as_json, is_quiet=is_quiet and has_passed)
    if not has_passed:
        raise typer.Exit(1)


@app.command()
def publish(
    folder: ExpertFolder,
    registry: PublishRegistry,
    whole: Annotated[
        bool, typer.Option("--whole", help="Send whole files, not what changed in them.")
    ] = False,
    backbone: ExpertBackbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Publish a checked expert to a registry.

    Releases are immutable: publishing the same content again has no effect.

    If the registry has the release that the expert derives from, or its previous one, only what
    changed in its tensors is sent where that is smaller. The release is the same either way.
    """
    from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
    from composable.packaging.manifests.manifest import Manifest
    from composable.packaging.registry.locations import open_for_publishing
    from composable.workflows.publish import publish_expert

    home = find_backbone(backbone or Manifest.read(folder).backbone)
    target = open_for_publishing(registry)
    with bars.show_bytes(is_quiet=is_quiet) as progress:
        published = publish_expert(
            folder, read_interface(home), target, is_whole=whole, progress=progress
        )
    note_operator(target, is_quiet=is_quiet)
    manifest = published.manifest
    sizes = {file.name: file.size for file in manifest.files}
    sent = describe_sent(published.parent, sizes, published.deltas, published.whole)
    show(
        f"published {manifest.name} {manifest.version} to {registry}{sent}",
        {
            "name": manifest.name,
            "version": str(manifest.version),
            "manifest": manifest.digest,
            "registry": registry,
            "parent": published.parent,
            "deltas": dict(published.deltas),
            "whole": dict(published.whole),
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


def describe_sent(
    parent: str | None,
    sizes: Mapping[str, int],
    deltas: Mapping[str, int],
    whole: Mapping[str, str],
) -> str:
    """Return what was sent of an expert's files, on lines of their own; nothing without a parent.

    Args:
        parent: The release that deltas start from.
        sizes: Bytes of the files, by name.
        deltas: Bytes of the deltas that were sent.
        whole: Why a file was sent whole, by its name.
    """
    if parent is None:
        return ""
    lines = [
        f"{name}: {size:,} of {sizes[name]:,} bytes, as a change of {parent}"
        for name, size in deltas.items()
    ]
    lines += [f"{name}: whole ({reason})" for name, reason in whole.items()]
    return "".join(f"\n  {line}" for line in lines)


@app.command()
def yank(
    release: Release,
    registry: PublishRegistry,
    reason: Annotated[
        str, typer.Option(help="Why; kept and shown by a server.", show_default=False)
    ] = "",
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Exclude a release from new resolutions.

    Existing locks with this release keep working.
    """
    name, version = parse_release(release)
    from composable.packaging.registry.locations import open_for_publishing

    target = open_for_publishing(registry)
    target.yank(name, version, reason)
    note_operator(target, is_quiet=is_quiet)
    show(f"yanked {name} {version}", {"yanked": release}, as_json=as_json, is_quiet=is_quiet)


@app.command()
def unyank(
    release: Release, registry: PublishRegistry, as_json: Json = False, is_quiet: Quiet = False
) -> None:
    """Undo a yank."""
    name, version = parse_release(release)
    from composable.packaging.registry.locations import open_for_publishing

    target = open_for_publishing(registry)
    target.unyank(name, version)
    note_operator(target, is_quiet=is_quiet)
    show(f"unyanked {name} {version}", {"unyanked": release}, as_json=as_json, is_quiet=is_quiet)


@app.command()
def advise(
    affected: Annotated[
        str,
        typer.Argument(
            metavar="REQ", help="NAME, or 'NAME<1.2': the affected versions.", show_default=False
        ),
    ],
    registry: PublishRegistry,
    kind: Annotated[
        str, typer.Option(metavar="recalled|poisoned|licence-withdrawn", help="What happened.")
    ] = "recalled",
    text: Annotated[
        str, typer.Option(help="What is wrong, and what to do.", show_default=False)
    ] = "",
    fixed: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VERSION", help="A release that fixes it; repeatable.", show_default=False
        ),
    ] = None,
    digest: Annotated[
        list[str] | None,
        typer.Option(
            metavar="sha256:…",
            help="Digest of a manifest or a file that is affected under any name; repeatable.",
            show_default=False,
        ),
    ] = None,
    id_: Annotated[
        str | None,
        typer.Option(
            "--id", help="Its name; that of an existing one changes it.", show_default=False
        ),
    ] = None,
    withdraw: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Withdraw this advisory instead.", show_default=False),
    ] = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Publish an advisory on releases, or withdraw one.

    `composable audit` reports it to every project that has locked an affected release. NAME alone
    affects every version, or with --digest only what has that content.
    """
    from composable.packaging.registry.advisories import Advisory, check_id, check_kind, make_id
    from composable.packaging.registry.locations import open_for_publishing
    from composable.packaging.registry.release import TIME_FORMAT
    from composable.packaging.versions.constraint import ANY, Requirement
    from composable.packaging.versions.version import Version

    requirement = Requirement.parse(affected)
    if requirement.extras:
        raise typer.BadParameter(f"{affected!r}: an extra is no release", param_hint="REQ")
    if not text and withdraw is None:
        raise typer.BadParameter("say what is wrong", param_hint="--text")
    home = open_for_publishing(registry)
    now = datetime.datetime.now(datetime.UTC).strftime(TIME_FORMAT)
    if withdraw is not None:
        known = home.advisory(withdraw)
        advisory = dataclasses.replace(known, is_withdrawn=True, published=now)
    else:
        is_by_content = bool(digest) and requirement.constraint == ANY
        advisory = Advisory(
            id=check_id(id_) if id_ is not None else make_id(requirement.name),
            name=requirement.name,
            kind=check_kind(kind),
            affected=() if is_by_content else (requirement.constraint,),
            digests=tuple(digest or ()),
            fixed=tuple(Version(version) for version in fixed or ()),
            text=text,
            published=now,
        )
    home.advise(advisory)
    note_operator(home, is_quiet=is_quiet)
    show(
        f"{'published' if withdraw is None else 'withdrew'} advisory {advisory.id}",
        advisory.to_row(),
        as_json=as_json,
        is_quiet=is_quiet,
    )


def note_operator(registry: Registry, *, is_quiet: bool) -> None:
    """Say that a change of a signed registry is not visible yet, if its operator has to confirm."""
    if registry.awaits_vetting:
        note(
            "in quarantine; once vetting has passed, list it with `composable registry sign "
            f"{registry.location}`",
            is_quiet=is_quiet,
        )
    if registry.awaits_operator:
        note(
            "signed; clients see it once the operator has run `composable registry sign "
            f"{registry.location}`",
            is_quiet=is_quiet,
        )


def _report_verdict(verdict: Verdict) -> tuple[list[tuple[str, str, str]], dict[str, Any], bool]:
    """Return the table, the JSON data and the outcome of the checks."""
    rows = [
        (
            check.name,
            "ok" if check.passed else "FAILED",
            f"{check.found}; expected {check.expected}",
        )
        for check in verdict.checks
    ]
    data: dict[str, Any] = {
        "passed": verdict.passed,
        "checks": [dataclasses.asdict(check) for check in verdict.checks],
        "measured": verdict.measured,
        "warnings": list(verdict.warnings),
    }
    return rows, data, verdict.passed


def _version_row(step: Step) -> tuple[str, str, str]:
    """Return the row on the version bump since a previous release."""
    from composable.packaging.manifests.manifest import EXPERT_FILE

    reasons = "; ".join(step.reasons) or "nothing changed"
    hint = "" if step.is_enough else f'; write version = "{step.version}" in {EXPERT_FILE}'
    return (
        "version",
        "ok" if step.is_enough else "FAILED",
        f"{step.old} to {step.new}: a {step.needed} change ({reasons}){hint}",
    )


def _version_to_dict(name: str, step: Step) -> dict[str, Any]:
    return {
        "release": f"{name}@{step.old}",
        "needs": step.needed,
        "version": str(step.new),
        "enough": step.is_enough,
        "write": None if step.is_enough else str(step.version),
        "changes": [dataclasses.asdict(change) for change in step.changes],
    }


def parse_share(shard: str | None, results: Path | None) -> tuple[int, int]:
    """Parse `I/N`, a part of the peers and of how many."""
    if shard is None:
        return 1, 1
    if results is None:
        raise typer.BadParameter(
            "needs --results with a folder that all machines see", param_hint="--shard"
        )
    part, slash, n_parts = shard.partition("/")
    if slash and part.isdecimal() and n_parts.isdecimal() and 1 <= int(part) <= int(n_parts):
        return int(part), int(n_parts)
    raise typer.BadParameter(f"{shard!r}: expected I/N, with I from 1 to N", param_hint="--shard")


def show_share(worker: PeerWorker, shard: str, *, as_json: bool, is_quiet: bool) -> None:
    """Report that a part of the peers is measured."""
    ledger = worker.results.count(unit.key for group in worker.groups for unit in group)
    show(
        f"shard {shard}: {ledger.n_recorded} of {ledger.n_units} results are in "
        f"{worker.results.root}",
        {
            "shard": shard,
            "results": str(worker.results.root),
            "units": ledger.n_units,
            "done": ledger.n_recorded,
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


def parse_pair(text: str) -> tuple[str, Path]:
    """Parse `NAME=FILE`."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise typer.BadParameter(f"{text!r}: expected NAME=FILE", param_hint="--beside-data")
    return name, Path(file)


def parse_release(text: str) -> tuple[str, Any]:
    """Parse `NAME@VERSION`."""
    from composable.packaging.versions.constraint import Requirement

    requirement = Requirement.parse(text)
    if requirement.constraint.pinned is None:
        raise typer.BadParameter(f"{text!r}: expected NAME@VERSION", param_hint="NAME@VERSION")
    return requirement.name, requirement.constraint.pinned
