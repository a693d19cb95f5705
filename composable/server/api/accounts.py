"""Operations on accounts and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import select

from composable.packaging.versions.names import check_package_name
from composable.server import accounts
from composable.server.api.operation import Call, Operation
from composable.server.refusal import RefusedError, missing
from composable.server.tables import Account

# What the first token of an account allows.
FIRST_SCOPES: Final = ("read", "publish", "yank", "account")


@dataclass(frozen=True)
class NewAccount:
    """The name of a new account."""

    name: str


@dataclass(frozen=True)
class NewToken:
    """What a new token is for."""

    scopes: list[str]
    label: str = ""
    packages: list[str] = field(default_factory=list)
    hours: float | None = None


@dataclass(frozen=True)
class Identity:
    """An OpenID Connect identity token of a CI job, and the package to publish."""

    identity: str
    package: str


def create_account(call: Call) -> dict[str, Any]:
    """Create an account; its first token is in the answer, once."""
    services, caller = call.services, call.caller
    if not services.settings.is_open and not caller.allows("admin"):
        raise RefusedError(403, "accounts are created by an administrator")
    with services.database.write() as session:
        account = accounts.create_account(session, caller, call.body.name)
        token, text = accounts.create_token(session, account, FIRST_SCOPES, label="first token")
        return {"account": account.name, **accounts.describe_token(token), "token": text}


def who_am_i(call: Call) -> dict[str, Any]:
    """Return the account of a token, and what the token allows."""
    if call.caller.account is None:
        call.caller.require("read")
    return {
        "account": call.caller.name,
        "admin": call.caller.is_admin,
        "scopes": sorted(call.caller.scopes),
        "packages": sorted(call.caller.packages),
    }


def list_tokens(call: Call) -> dict[str, Any]:
    """List the tokens of the account, without the tokens themselves."""
    with call.services.database.read() as session:
        return {"tokens": accounts.list_tokens(session, call.caller.require("account"))}


def create_token(call: Call) -> dict[str, Any]:
    """Create a token; it is in the answer, once."""
    body, caller = call.body, call.caller
    beyond = [scope for scope in body.scopes if scope not in caller.scopes]
    if beyond or (caller.packages and not caller.packages.issuperset(body.packages or [""])):
        raise RefusedError(403, "a token cannot create one that allows more than itself")
    with call.services.database.write() as session:
        account = session.scalars(
            select(Account).where(Account.id == caller.require("account"))
        ).one()
        token, text = accounts.create_token(
            session,
            account,
            body.scopes,
            label=body.label,
            packages=body.packages,
            hours=body.hours,
        )
        return {**accounts.describe_token(token), "token": text}


def revoke_token(call: Call) -> None:
    """Revoke a token, at once and for good."""
    text = call.path["id"]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise missing("such token")
    with call.services.database.write() as session:
        account = call.caller.require("account")
        accounts.revoke_token(session, account, int(text), call.caller.name)


def exchange_identity(call: Call) -> dict[str, Any]:
    """Exchange the identity of a CI job for a token to publish a package, for 15 minutes."""
    services, package = call.services, check_package_name(call.body.package, "package")
    token = services.identities.exchange(services.database, call.body.identity, package)
    return {"token": token}


OPERATIONS: Final = (
    Operation(method="POST", path="/accounts", run=create_account, body=NewAccount, status=201),
    Operation(method="GET", path="/account", run=who_am_i),
    Operation(method="GET", path="/tokens", run=list_tokens, scope="account"),
    Operation(
        method="POST", path="/tokens", run=create_token, body=NewToken, scope="account", status=201
    ),
    Operation(method="DELETE", path="/tokens/{id}", run=revoke_token, scope="account", status=204),
    Operation(method="POST", path="/identities", run=exchange_identity, body=Identity),
)
