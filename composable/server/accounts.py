"""Accounts and tokens: who may do what.

A token has 256 random bits and is shown once; the database keeps its SHA-256, which needs no salt
and no slow hash, because nobody can try all tokens. There are no passwords and no cookies: every
request carries its own token, so no other site can act for a visitor.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from composable.packaging.versions.names import check_package_name, confusable_key
from composable.server import audit
from composable.server.database import in_hours, now
from composable.server.refusal import RefusedError, missing
from composable.server.tables import Account, Owner, Package, Token

PREFIX: Final = "cxr_"
# What a token may allow. `admin` and `vet` need an administrator's account.
SCOPES: Final = ("read", "publish", "yank", "account", "vet", "admin")
_TOKEN: Final = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}")
MAX_TOKENS: Final = 200
MAX_LABEL_LENGTH: Final = 100


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sent a request, and what the token allows.

    Args:
        account: Id of the account; None for a request without a token.
        name: Its name.
        scopes: What the token allows.
        packages: The only packages that the token is for; empty for all.
        is_admin: Whether the account is an administrator's.
    """

    account: int | None = None
    name: str = "anonymous"
    scopes: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()
    is_admin: bool = False

    def allows(self, scope: str, package: str | None = None) -> bool:
        """Return whether the token has a scope, for a package if one is named."""
        is_for = package is None or not self.packages or package in self.packages
        needs_admin = scope in ("admin", "vet") and not self.is_admin
        return scope in self.scopes and is_for and not needs_admin

    def require(self, scope: str, package: str | None = None) -> int:
        """Return the account's id if the token allows this.

        Raises:
            RefusedError: 401 without a token, 403 if it does not allow it.
        """
        if self.account is None:
            raise RefusedError(401, "a token is needed", hint="send `Authorization: Bearer TOKEN`")
        if not self.allows(scope, package):
            about = f" for {package}" if package else ""
            raise RefusedError(403, f"the token does not allow {scope!r}{about}")
        return self.account


ANONYMOUS: Final = Caller()
# The commands of the machine that holds the database.
SERVER: Final = Caller(account=0, name="server", scopes=frozenset(SCOPES), is_admin=True)


def find_caller(session: Session, header: str | None) -> Caller:
    """Return who sent a request.

    Args:
        session: A session.
        header: The `Authorization` header, if there is one.

    Raises:
        RefusedError: 401 for a token that is malformed, unknown, expired or revoked.
    """
    if not header:
        return ANONYMOUS
    kind, _, text = header.partition(" ")
    if kind.lower() != "bearer" or _TOKEN.fullmatch(text) is None:
        raise RefusedError(401, "is not a token of this registry", where="Authorization")
    token = session.scalar(select(Token).where(Token.digest == _digest(text)))
    if token is None or token.revoked is not None:
        raise RefusedError(401, "the token is unknown or revoked", where="Authorization")
    if token.expires is not None and token.expires <= now():
        raise RefusedError(401, f"the token expired at {token.expires}", where="Authorization")
    return Caller(
        account=token.account_id,
        name=token.account.name,
        scopes=frozenset(token.scopes.split()),
        packages=frozenset(token.packages.split()),
        is_admin=token.account.is_admin,
    )


def create_account(session: Session, by: Caller, name: str, *, is_admin: bool = False) -> Account:
    """Create an account.

    Raises:
        ManifestError: For a name that is not valid; names of accounts are like those of packages.
        RefusedError: 409 when the name is taken, or looks like one that is.
    """
    check_package_name(name, "name")
    key = confusable_key(name)
    taken = session.scalar(select(Account.name).where(Account.key == key))
    if taken is not None or key == confusable_key(SERVER.name):
        raise RefusedError(409, f"{name!r} is taken, or looks like {taken or SERVER.name!r}")
    account = Account(name=name, key=key, is_admin=is_admin, created=now())
    session.add(account)
    session.flush()
    audit.record(session, by.name, "account.create", name, {"admin": is_admin})
    return account


def create_token(
    session: Session,
    account: Account,
    scopes: Iterable[str],
    *,
    label: str = "",
    packages: Iterable[str] = (),
    hours: float | None = None,
    by: str | None = None,
) -> tuple[Token, str]:
    """Create a token.

    Args:
        session: The transaction.
        account: Whose token it is.
        scopes: What it allows.
        label: What it is for, to recognize it in a list.
        packages: The only packages that it is for; empty for all.
        hours: After how many hours it expires; None for never.
        by: Who created it, for the audit log; by default, the account.

    Returns:
        The row, and the token itself, which cannot be read again.

    Raises:
        RefusedError: 422 for an unknown scope, 403 for one that needs an administrator, 409 for too
            many tokens.
    """
    wanted, names = sorted(set(scopes)), sorted(set(packages))
    for scope in wanted:
        if scope not in SCOPES:
            known = ", ".join(SCOPES)
            raise RefusedError(422, f"{scope[:40]!r} is not one of {known}", where="scopes")
        if scope in ("admin", "vet") and not account.is_admin:
            raise RefusedError(403, f"only an administrator's token has {scope!r}", where="scopes")
    if not wanted:
        raise RefusedError(422, "a token without scopes allows nothing", where="scopes")
    if hours is not None and not 0 < hours <= 24 * 3660:
        raise RefusedError(422, "expected a number of hours up to ten years", where="hours")
    for name in names:
        check_package_name(name, "packages")
    held = session.scalars(
        select(Token.id).where(Token.account_id == account.id, Token.revoked.is_(None))
    ).all()
    if len(held) >= MAX_TOKENS:
        raise RefusedError(409, f"the account has {len(held)} tokens", hint="revoke some")
    text = PREFIX + secrets.token_urlsafe(32)
    token = Token(
        account_id=account.id,
        digest=_digest(text),
        label=label[:MAX_LABEL_LENGTH],
        scopes=" ".join(wanted),
        packages=" ".join(names),
        created=now(),
        expires=None if hours is None else in_hours(hours),
        revoked=None,
    )
    session.add(token)
    session.flush()
    detail = {"token": token.id, "scopes": wanted, "packages": names, "expires": token.expires}
    audit.record(session, by or account.name, "token.create", account.name, detail)
    return token, text


def revoke_token(session: Session, account: int, token_id: int, by: str) -> None:
    """Revoke a token of an account, at once and for good.

    Raises:
        RefusedError: 404 when the account has no such token.
    """
    token = session.scalar(select(Token).where(Token.id == token_id, Token.account_id == account))
    if token is None:
        raise missing("such token")
    if token.revoked is None:
        token.revoked = now()
        audit.record(session, by, "token.revoke", token.account.name, {"token": token.id})


def list_tokens(session: Session, account: int) -> list[dict[str, Any]]:
    """Return the tokens of an account as data, without what would let anyone use them."""
    tokens = session.scalars(select(Token).where(Token.account_id == account).order_by(Token.id))
    return [describe_token(token) for token in tokens]


def describe_token(token: Token) -> dict[str, Any]:
    """Return a token as data, without the token itself."""
    return {
        "id": token.id,
        "label": token.label,
        "scopes": token.scopes.split(),
        "packages": token.packages.split(),
        "created": token.created,
        "expires": token.expires,
        "revoked": token.revoked,
    }


def find_account(session: Session, name: str) -> Account:
    """Return an account.

    Raises:
        RefusedError: 404 when there is none.
    """
    account = session.scalar(select(Account).where(Account.name == name))
    if account is None:
        raise missing(f"account {name[:64]!r}")
    return account


def is_owner(session: Session, account: int | None, package: Package) -> bool:
    """Return whether an account owns a package."""
    return account is not None and session.get(Owner, (package.id, account)) is not None


def add_owner(session: Session, by: Caller, package: Package, account: Account) -> None:
    """Let an account publish a package, unless it may already."""
    if session.get(Owner, (package.id, account.id)) is None:
        session.add(Owner(package_id=package.id, account_id=account.id, added=now()))
        session.flush()
        audit.record(session, by.name, "owner.add", package.name, {"account": account.name})


def remove_owner(session: Session, by: Caller, package: Package, account: Account) -> None:
    """Take a package from an owner; to transfer it, add the next owner first.

    Raises:
        RefusedError: 404 when the account is no owner, 409 when it is the only one.
    """
    owner = session.get(Owner, (package.id, account.id))
    if owner is None:
        raise missing(f"owner {account.name!r}")
    others = select(Owner).where(Owner.package_id == package.id, Owner.account_id != account.id)
    if session.scalars(others).first() is None:
        raise RefusedError(409, f"{account.name} is the only owner", hint="add another owner first")
    session.delete(owner)
    session.flush()
    audit.record(session, by.name, "owner.remove", package.name, {"account": account.name})


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
