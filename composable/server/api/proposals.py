"""Operations of the inbox: propose, list, decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from composable.interface.digest import is_digest
from composable.packaging.manifests.manifest import CHUNK_BYTES
from composable.packaging.registry.inbox import Outcome
from composable.server.api.operation import Call, Operation
from composable.server.refusal import RefusedError, missing

MAX_REASON_LENGTH: Final = 4000


@dataclass(frozen=True)
class NewProposal:
    """A proposal in its envelope, and its packed manifest."""

    envelope: str
    manifest: str


@dataclass(frozen=True)
class Decision:
    """What an owner of the package decided."""

    state: Literal["accepted", "rejected"]
    reason: str = ""
    release: str = ""
    verdict: str = ""


def open_proposal(call: Call) -> dict[str, Any]:
    """Propose a change of a package, or find the same proposal."""
    return call.services.proposals.start(call.caller, call.body.envelope, call.body.manifest)


def list_proposals(call: Call) -> dict[str, Any]:
    """List the proposals that the caller made, or may decide on."""
    return {"proposals": call.services.proposals.list_all(call.caller)}


def put_proposed_chunk(call: Call) -> None:
    """Upload a chunk of a proposed file; sending it again has no effect."""
    digest, number = call.path["digest"], call.path["number"]
    if not is_digest(digest) or not (number.isascii() and number.isdigit() and len(number) < 8):
        raise missing("chunk of that digest and number")
    call.services.proposals.receive(call.caller, call.path["id"], digest, int(number), call.body)


def commit_proposal(call: Call) -> dict[str, Any]:
    """Verify all files and put the proposal into the inbox."""
    return call.services.proposals.commit(call.caller, call.path["id"])


def decide_proposal(call: Call) -> None:
    """Record that a proposal was accepted or rejected, and why."""
    decision = call.body
    if len(decision.reason) > MAX_REASON_LENGTH or len(decision.release) > MAX_REASON_LENGTH:
        raise RefusedError(422, f"at most {MAX_REASON_LENGTH:,} characters", where="reason")
    if decision.verdict and not is_digest(decision.verdict):
        raise RefusedError(422, "is not a digest", where="verdict")
    outcome = Outcome(
        state=decision.state,
        reason=decision.reason,
        release=decision.release,
        verdict=decision.verdict,
    )
    call.services.proposals.decide(call.caller, call.path["id"], outcome)


_ONE: Final = "/proposals/{id}"
OPERATIONS: Final = (
    Operation(
        method="POST", path="/proposals", run=open_proposal, body=NewProposal, scope="publish"
    ),
    Operation(method="GET", path="/proposals", run=list_proposals, scope="read"),
    Operation(
        method="PUT",
        path=f"{_ONE}/files/{{digest}}/{{number}}",
        run=put_proposed_chunk,
        body=bytes,
        scope="publish",
        status=204,
        max_bytes=CHUNK_BYTES,
    ),
    Operation(method="POST", path=f"{_ONE}/commit", run=commit_proposal, scope="publish"),
    Operation(
        method="POST",
        path=f"{_ONE}/outcome",
        run=decide_proposal,
        body=Decision,
        scope="publish",
        status=204,
    ),
)
