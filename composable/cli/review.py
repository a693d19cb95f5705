"""Commands for maintainers of an expert and those who propose changes of it."""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composable.cli import bars
from composable.cli.contribute import (
    describe_sent,
    note_operator,
    parse_pair,
    parse_release,
    parse_share,
    show_share,
)
from composable.cli.options import (
    BesideData,
    Data,
    ExpertBackbone,
    ExpertFolder,
    InboxRegistry,
    Jobs,
    Json,
    ProposalId,
    Quiet,
    Results,
    Shard,
)
from composable.cli.output import format_bytes, format_table, note, show

if TYPE_CHECKING:
    from composable.packaging.registry.inbox import Inbox, Received
    from composable.workflows.verdicts import ReviewVerdict

app = typer.Typer(rich_markup_mode=None)

_SHOWN_MESSAGE = 60  # characters of a message in the table


@app.command()
def propose(
    folder: ExpertFolder,
    to: Annotated[
        str,
        typer.Option(
            metavar="REGISTRY",
            help="Registry that the expert is published in: a folder, a bucket or a server.",
            envvar="COMPOSABLE_REGISTRY",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME@VERSION",
            help="Release that this is a change of. Default: derives-from in expert.toml.",
            show_default=False,
        ),
    ] = None,
    message: Annotated[
        str, typer.Option("--message", "-m", metavar="TEXT", help="Why; shown to its maintainers.")
    ] = "",
    key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Key to sign with, as `composable registry key NAME` made it. Default: the only "
            "one there is.",
            show_default=False,
        ),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Send whole files, not what changed in them.")
    ] = False,
    backbone: ExpertBackbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Propose a change of a published expert to its maintainers.

    Puts the expert in DIR into the inbox of the registry, from which nothing is installed. Its
    expert.toml must have derives-from = "NAME@VERSION". Only what changed in its tensors is sent
    where that is smaller; its maintainers get the same files either way. `composable review
    REGISTRY` shows what became of it.
    """
    from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
    from composable.packaging.manifests.manifest import EXPERT_FILE, Manifest
    from composable.packaging.registry.locations import open_inbox
    from composable.workflows.propose import propose_expert

    manifest = Manifest.read(folder)
    wanted = base or manifest.derives_from
    if wanted is None:
        raise typer.BadParameter(
            f"expected NAME@VERSION, for {folder / EXPERT_FILE} has no derives-from",
            param_hint="--base",
        )
    name, version = parse_release(wanted)
    home = find_backbone(backbone or manifest.backbone)
    inbox = open_inbox(to)
    with bars.show_bytes(is_quiet=is_quiet) as progress:
        proposal, reasons = propose_expert(
            folder,
            (name, version),
            read_interface(home),
            inbox,
            message=message,
            key=key,
            is_whole=whole,
            progress=progress,
        )
    if not proposal.key:
        note("unsigned: `composable registry key NAME` makes a key to sign with", is_quiet=is_quiet)
    deltas = {name: delta.size for name, delta in proposal.deltas.items()}
    sent = describe_sent(proposal.base_release, proposal.sizes, deltas, reasons)
    show(
        f"proposed {proposal.id[: _shown_digits()]} to {to}: a change of "
        f"{proposal.base_release}{sent}",
        {
            "id": proposal.id,
            "base": proposal.base_release,
            "key": proposal.key,
            "registry": to,
            "bytes": proposal.n_bytes,
            "deltas": deltas,
            "whole": dict(reasons),
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def review(
    registry: InboxRegistry,
    proposal: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]",
            help="Proposal to vet: the first digits of its id; or the expert, if one proposal of "
            "it is open.",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REQ|all",
            help="Vet with this published expert installed; repeatable.",
            show_default="all",
        ),
    ] = None,
    beside_data: BesideData = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to write verdict.json, verdict.html and verdict.md. Default: review-ID.",
            show_default=False,
        ),
    ] = None,
    jobs: Jobs = None,
    results: Results = None,
    shard: Shard = None,
    backbone: ExpertBackbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """List the proposals of a registry, or vet one of them.

    Everything is measured here, on the text of --data, which should be text of the expert's domain
    that its proposer does not have: the checks of `composable check`, alone, against the base, and
    with every published expert for the same backbone; and what public text costs after prefixes
    that lead to the expert. Exits with 1 if a check fails.

    If another release was published since, the change is merged with it, by the method that a
    quarter of the documents choose, and the other documents judge the merged expert.

    With --shard, only measures a part of the published experts, into the folder of --results; the
    command without --shard then measures what is missing, and the rest. Give the same --data: a
    change that has to be merged is merged by every call.
    """
    texts = dict(parse_pair(pair) for pair in beside_data or ())
    share = parse_share(shard, results)
    from composable.packaging.registry.locations import open_inbox

    inbox = open_inbox(registry)
    if proposal is None:
        _show_proposals(inbox, registry, as_json=as_json, is_quiet=is_quiet)
        return
    received = inbox.find(proposal)
    from composable.assembly.backbones import load_backbone
    from composable.workflows.references import ALL
    from composable.workflows.review import measure_share, review_proposal
    from composable.workflows.review_page import write_page, write_summary
    from composable.workflows.verdicts import write_verdict

    loaded = load_backbone(backbone or _backbone_of(inbox, received))
    if shard is not None and results is not None:
        with (
            bars.show_counts("review", is_quiet=is_quiet) as progress,
            tempfile.TemporaryDirectory(prefix="composable-review-") as scratch,
        ):
            worker = measure_share(
                loaded,
                inbox,
                received,
                Path(scratch),
                share=share,
                data=data or (),
                beside=beside or (ALL,),
                texts=texts,
                registry=registry,
                results=results,
                n_jobs=jobs,
                progress=progress,
            )
        show_share(worker, shard, as_json=as_json, is_quiet=is_quiet)
        return
    folder = out or default_folder(received)
    with (
        bars.show_counts("review", is_quiet=is_quiet) as progress,
        tempfile.TemporaryDirectory(prefix="composable-review-") as scratch,
    ):
        verdict = review_proposal(
            loaded,
            inbox,
            received,
            Path(scratch),
            data or (),
            beside=beside or (ALL,),
            texts=texts,
            registry=registry,
            results=results,
            n_jobs=jobs,
            progress=progress,
        )
        path = write_verdict(folder, verdict, Path(scratch))
    page = write_page(folder, verdict)
    write_summary(folder, verdict)
    _show_verdict(verdict, path, page, as_json=as_json, is_quiet=is_quiet and verdict.passed)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command()
def accept(
    registry: InboxRegistry,
    proposal: ProposalId,
    verdict: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where `composable review` wrote the verdict. Default: review-ID.",
            show_default=False,
        ),
    ] = None,
    may_be_worse: Annotated[
        bool,
        typer.Option(
            "--allow-worse",
            help="Accept what is worse than its base and fails no other check: a major version.",
        ),
    ] = False,
    backbone: ExpertBackbone = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Publish a proposal that was reviewed, as the next release.

    The version is the lowest one that the changes permit. The card has the figures of the review,
    and the manifest names the proposal, its proposer's key, its base and the verdict. A verdict no
    longer counts once other releases are published.
    """
    from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
    from composable.packaging.registry.locations import open_inbox
    from composable.workflows.accept import accept_proposal
    from composable.workflows.verdicts import MERGED, read_verdict

    inbox = open_inbox(registry)
    received = inbox.find(proposal)
    place = verdict or default_folder(received)
    found, digest = read_verdict(place)
    home = find_backbone(backbone or found.inputs.backbone)
    with (
        bars.show_bytes(is_quiet=is_quiet) as progress,
        tempfile.TemporaryDirectory(prefix="composable-accept-") as scratch,
    ):
        manifest = accept_proposal(
            inbox,
            received,
            Path(scratch),
            read_interface(home),
            found,
            digest,
            merged=place / MERGED,
            may_be_worse=may_be_worse,
            progress=progress,
        )
    note_operator(inbox.registry, is_quiet=is_quiet)
    release = f"{manifest.name}@{manifest.version}"
    show(
        f"accepted {received.id[: _shown_digits()]} and published {release} to {registry}",
        {
            "id": received.id,
            "release": release,
            "manifest": manifest.digest,
            "verdict": digest,
            "registry": registry,
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def reject(
    registry: InboxRegistry,
    proposal: ProposalId,
    reason: Annotated[str, typer.Option(help="Why; shown to its proposer.", show_default=False)],
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Reject a proposal, and say why.

    Its files are removed; what it stated, and the reason, stay in the list of `composable review`.
    """
    from composable.errors import ProposalError
    from composable.packaging.registry.inbox import Outcome
    from composable.packaging.registry.locations import open_inbox

    if not reason.strip():
        raise typer.BadParameter("say why", param_hint="--reason")
    inbox = open_inbox(registry)
    id_ = inbox.complete(proposal)
    try:
        inbox.decide(inbox.find(id_), Outcome(state="rejected", reason=reason))
    except ProposalError as error:
        inbox.discard(id_)
        note(f"removed a damaged proposal: {error.message}", is_quiet=is_quiet)
    show(
        f"rejected {id_[: _shown_digits()]}",
        {"id": id_, "reason": reason, "registry": registry},
        as_json=as_json,
        is_quiet=is_quiet,
    )


def default_folder(received: Received) -> Path:
    """Return the folder that a review is written to by default."""
    return Path(f"review-{received.id[: _shown_digits()]}")


def _backbone_of(inbox: Inbox, received: Received) -> str:
    """Return the backbone of a proposal's base: its maintainers chose that, not the proposer."""
    assert received.proposal is not None
    from composable.packaging.versions.version import Version

    base = inbox.find_base(received.proposal.name, Version(received.proposal.base))
    return inbox.registry.read_manifest(base).backbone


def _show_proposals(inbox: Inbox, registry: str, *, as_json: bool, is_quiet: bool) -> None:
    entries = inbox.entries()
    digits = _shown_digits()
    rows = []
    for received in entries:
        proposal, outcome = received.proposal, received.outcome
        text = received.problem if proposal is None else proposal.message
        if outcome is not None:
            text = outcome.reason or outcome.release
        rows.append(
            (
                received.id[:digits],
                "" if proposal is None else proposal.base_release,
                inbox.describe_proposer(received),
                "" if proposal is None else format_bytes(proposal.n_bytes),
                received.state,
                text if len(text) <= _SHOWN_MESSAGE else f"{text[: _SHOWN_MESSAGE - 1]}…",
            )
        )
    table = format_table(("ID", "BASE", "PROPOSER", "SIZE", "STATE", "MESSAGE"), rows)
    n_open = sum(received.state == "open" for received in entries)
    if n_open and not as_json:
        note(
            f"vet one with `composable review {shlex.quote(registry)} ID --data FILES`",
            is_quiet=is_quiet,
        )
    show(
        table or "no proposals",
        [_received_to_dict(inbox, received) for received in entries],
        as_json=as_json,
        is_quiet=is_quiet,
    )


def _received_to_dict(inbox: Inbox, received: Received) -> dict[str, Any]:
    data: dict[str, Any] = {"id": received.id, "state": received.state}
    if received.account:
        data["account"] = received.account
    if received.proposal is None:
        return {**data, "problem": received.problem}
    data |= {
        "base": received.proposal.base_release,
        "message": received.proposal.message,
        "key": received.proposal.key or None,
        "publisher": inbox.find_publisher(received.proposal),
        "bytes": received.proposal.n_bytes,
    }
    if received.outcome is not None:
        data["outcome"] = dataclasses.asdict(received.outcome)
    return data


def _show_verdict(
    verdict: ReviewVerdict, path: Path, page: Path, *, as_json: bool, is_quiet: bool
) -> None:
    from composable.files.records import to_plain

    for warning in verdict.warnings:
        note(f"warning: {warning}")
    rows = [
        (
            check.name,
            "ok" if check.passed else "FAILED",
            f"{check.found}; expected {check.expected}",
        )
        for check in verdict.checks
    ]
    show(
        f"{format_table((), rows)}\n\n{verdict.summary}\nwritten to {path} and {page}",
        to_plain(verdict),
        as_json=as_json,
        is_quiet=is_quiet,
    )


def _shown_digits() -> int:
    from composable.packaging.registry.inbox import SHOWN_DIGITS

    return SHOWN_DIGITS
