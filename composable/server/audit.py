"""The audit log: every change, in one order, each entry with the hash of the one before.

Removing, changing or inserting an entry breaks the chain at that place. Whoever copies the last
hash to somewhere else can prove later that nothing before it was rewritten.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from composable.errors import IntegrityError
from composable.interface.digest import canonical_json, digest_bytes
from composable.server.database import now
from composable.server.tables import Audit, Head

GENESIS: Final = "0" * 64


def record(
    session: Session, account: str, action: str, subject: str, detail: dict[str, Any] | None = None
) -> int:
    """Append an entry in the transaction of the change that it records.

    Args:
        session: The transaction, from `Database.write`.
        account: Who made the change; `server` for the machine's own commands.
        action: What was done, such as `publish`.
        subject: What it was done to, such as `german@1.0.0`.
        detail: More about it. No secrets.

    Returns:
        The number of the entry, which also numbers the state of the registry.
    """
    head = session.execute(select(Head.entries, Head.hash)).one()
    entry = Audit(
        number=head.entries + 1,
        time=now(),
        account=account,
        action=action,
        subject=subject,
        detail=detail or {},
        previous=head.hash,
    )
    entry.hash = _hash(entry)
    session.add(entry)
    session.execute(update(Head).values(entries=entry.number, hash=entry.hash))
    session.flush()
    return entry.number


def verify_chain(session: Session) -> tuple[int, str]:
    """Check the whole log.

    Returns:
        The number of entries, and the hash of the last.

    Raises:
        IntegrityError: With the number of the first entry that does not follow from the one before.
    """
    previous, number = GENESIS, 0
    for entry in session.scalars(select(Audit).order_by(Audit.number)).yield_per(1000):
        number += 1
        if entry.number != number or entry.previous != previous or entry.hash != _hash(entry):
            raise IntegrityError(
                "does not follow from the entry before it: the audit log was changed",
                where=f"audit entry {entry.number}",
                hint="compare with a backup; trust no change after this entry",
            )
        previous = entry.hash
    head = session.execute(select(Head.entries, Head.hash)).one()
    if (head.entries, head.hash) != (number, previous):
        raise IntegrityError(
            f"ends at entry {number}, expected {head.entries}: entries were removed",
            where="audit log",
        )
    return number, previous


def to_row(entry: Audit) -> dict[str, Any]:
    """Return an entry as data."""
    return {
        "number": entry.number,
        "time": entry.time,
        "account": entry.account,
        "action": entry.action,
        "subject": entry.subject,
        "detail": entry.detail,
        "previous": entry.previous,
        "hash": entry.hash,
    }


def _hash(entry: Audit) -> str:
    fields = {key: value for key, value in to_row(entry).items() if key != "hash"}
    return digest_bytes(canonical_json(fields)).removeprefix("sha256:")
