"""Commands that sign a registry, and change who may sign what in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from composable.cli.options import Json, Quiet
from composable.cli.output import format_table, note, show

if TYPE_CHECKING:
    from composable.packaging.registry.signed import Signatures
    from composable.packaging.trust.offline import Outcome

app = typer.Typer(rich_markup_mode=None)

Registry = Annotated[
    str,
    typer.Argument(
        metavar="REGISTRY", help="A folder, or the URL of a bucket.", show_default=False
    ),
]
Publisher = Annotated[
    str, typer.Argument(metavar="PUBLISHER", help="Its name.", show_default=False)
]
NoPassphrase = Annotated[
    bool,
    typer.Option(
        "--no-passphrase", help="Store the private key as it is, for machines without a person."
    ),
]


@app.command()
def init(
    location: Registry,
    is_signed: Annotated[
        bool, typer.Option("--signed", help="Create keys, and sign the registry with them.")
    ] = False,
    no_passphrase: NoPassphrase = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Create a registry; with --signed, its keys too, or sign an existing registry.

    Creates three root keys, of which two are needed to change who may publish, and an online key,
    which confirms what was published. Keys are stored in COMPOSABLE_KEYS, by default a folder of
    the user's settings, encrypted with a pass phrase.
    """
    from composable.packaging.registry.locations import open_for_publishing

    registry = open_for_publishing(location)
    registry.create()
    if not is_signed:
        show(
            f"created {location}, unsigned",
            {"registry": location, "signed": False},
            as_json=as_json,
            is_quiet=is_quiet,
        )
        return
    signatures = registry.open_signatures()
    keys = signatures.create(None if no_passphrase else _read_new_passphrase())
    fingerprint = signatures.documents.root_fingerprint
    show(
        f"signed {location} with new keys in {signatures.keyring.folder}\n"
        f"root keys: {fingerprint}\n"
        "Tell this to those who use the registry. Move the files root-1, root-2 and root-3 to\n"
        "three places that are offline; keep online where you run `composable registry sign`.",
        {
            "registry": location,
            "signed": True,
            "keys": str(signatures.keyring.folder),
            "root": keys[:-1],
            "online": keys[-1],
            "fingerprint": fingerprint,
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


@app.command()
def key(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    no_passphrase: NoPassphrase = False,
    as_json: Json = False,
) -> None:
    """Create a key for signing, and print its public part for the operator of a registry.

    Prints the public part of the key again if there is one of that name.
    """
    from composable.packaging.trust.keys import (
        SUFFIX,
        KeyFile,
        create_key,
        default_keys,
        format_public_key,
    )
    from composable.packaging.versions.names import check_package_name

    folder = default_keys()
    path = folder / f"{check_package_name(name)}{SUFFIX}"
    if path.exists():
        file = KeyFile.read(path)
    else:
        file = create_key(folder, name, None if no_passphrase else _read_new_passphrase())
        note(f"created {file.path}")
    public = format_public_key(file.public)
    show(public, {"key": public, "file": str(file.path)}, as_json=as_json)


@app.command()
def grant(
    location: Registry,
    publisher: Publisher,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME...]",
            help="Packages that it may publish; 'alice-*' for all that start so.",
            show_default=False,
        ),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            metavar="KEY",
            help="A public key that it signs with, ed25519:…, or an identity, "
            "'sigstore:ISSUER#SUBJECT'; repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Let a publisher publish packages, or give it further names, keys or identities.

    Needs two root keys. A name can belong to one publisher only. An identity is an account of an
    OpenID provider, exactly as sigstore writes it into certificates: a person,
    'sigstore:https://accounts.google.com#alice@example.org', or a workflow on GitHub,
    'sigstore:https://token.actions.githubusercontent.com#https://github.com/alice/german/.github/workflows/publish.yml@refs/heads/main'.
    """
    from composable.packaging.trust.identities import parse_signer
    from composable.packaging.trust.metadata import check_pattern
    from composable.packaging.versions.names import check_package_name

    signatures = _open(location)
    outcome = signatures.authority().grant(
        check_package_name(publisher),
        [check_pattern(name) for name in names or ()],
        [parse_signer(text) for text in keys or ()],
    )
    _report(signatures, signatures.change(outcome), location, as_json=as_json, is_quiet=is_quiet)


@app.command()
def sigstore(
    location: Registry,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A client trust configuration of another sigstore than the public one.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Accept identities that sigstore proves, by its certificates and keys as they are now.

    Needs two root keys, and the extra composable[sigstore]. Run it again when the sigstore has new
    keys; identities that only the previous ones prove are refused from then on. Clients use
    nothing but what is stated here, so they verify without a network.
    """
    from composable.packaging.trust.identities import Sigstore
    from composable.packaging.trust.sign_in import read_trusted_root

    signatures = _open(location)
    accepted = Sigstore(read_trusted_root(file))
    accepted.check()
    outcome = signatures.authority().accept_sigstore(accepted)
    _report(signatures, signatures.change(outcome), location, as_json=as_json, is_quiet=is_quiet)


@app.command()
def revoke(
    location: Registry,
    publisher: Publisher,
    key_: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="KEY",
            help="Only this key or identity, or the start of it. Default: all of them.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Take keys or identities of a publisher away: nothing they signed is accepted any more.

    Needs two root keys. The names of the publisher stay its own: grant it a new key to continue.
    """
    signatures = _open(location)
    outcome = signatures.authority().revoke(publisher, key_)
    _report(signatures, signatures.change(outcome), location, as_json=as_json, is_quiet=is_quiet)


@app.command()
def rotate(
    location: Registry,
    who: Annotated[
        str,
        typer.Argument(
            metavar="root|online|PUBLISHER", help="Whose key to replace.", show_default=False
        ),
    ],
    new: Annotated[
        str,
        typer.Option(
            "--new",
            metavar="KEY",
            help="The new key; for a publisher, also an identity, 'sigstore:ISSUER#SUBJECT'.",
            show_default=False,
        ),
    ],
    old: Annotated[
        str,
        typer.Option(
            "--old",
            metavar="ed25519:…",
            help="The root key to replace, or the start of it.",
            show_default=False,
        ),
    ] = "",
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Replace a key by a new one, which `composable registry key` creates.

    Needs two root keys; for `online`, run it where the new key is. A publisher then signs its
    releases again with `composable registry sign`.
    """
    from composable.packaging.trust.identities import parse_signer
    from composable.packaging.trust.keys import parse_public_key

    signatures = _open(location)
    authority = signatures.authority()
    public = parse_public_key(new) if who in ("root", "online") else parse_signer(new)
    if who == "root":
        if not old:
            raise typer.BadParameter("say which root key to replace", param_hint="--old")
        outcome = authority.rotate_root(old, public)
    elif who == "online":
        outcome = authority.rotate_online(public)
    else:
        outcome = authority.rotate_publisher(who, public)
    _report(signatures, signatures.change(outcome), location, as_json=as_json, is_quiet=is_quiet)


@app.command()
def sign(
    location: Registry,
    vouch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REQ",
            help="Sign NAME, or 'NAME<1.2', though no valid signature is there; repeatable.",
            show_default=False,
        ),
    ] = None,
    days: Annotated[float, typer.Option(min=0.01, help="Days that the confirmation holds.")] = 30,
    approve: Annotated[
        bool, typer.Option("--approve", help="Add a root signature to the change that waits.")
    ] = False,
    discard: Annotated[
        bool, typer.Option("--discard", help="Drop the change that waits for signatures.")
    ] = False,
    as_identity: Annotated[
        bool, typer.Option("--identity", help="Sign in with sigstore, and sign as that identity.")
    ] = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Sign whatever the keys on this machine are for.

    With the online key: make visible what publishers signed, and confirm that it is current. Run it
    after publications, and at least every 30 days. With the key or identity of a publisher: sign
    its releases again after a change of keys. With a root key: see --approve.
    """
    from composable.packaging.versions.constraint import Requirement

    signatures = _open(location)
    authority = signatures.authority()
    if discard:
        lines = authority.discard()
        show(
            "\n".join(f"dropped: {line}" for line in lines) or "no change waits",
            {"dropped": lines},
            as_json=as_json,
            is_quiet=is_quiet,
        )
        return
    if approve:
        outcome = signatures.change(authority.approve())
    else:
        for line in authority.describe_pending():
            note(
                f"waits for a root signature: {line}; add it with --approve, or drop it with "
                "--discard",
                is_quiet=is_quiet,
            )
        requirements = [Requirement.parse(text) for text in vouch or ()]
        outcome = signatures.sign(requirements, days=days, as_identity=as_identity)
    _report(signatures, outcome, location, as_json=as_json, is_quiet=is_quiet)


@app.command()
def signers(location: Registry, as_json: Json = False) -> None:
    """List the keys of a signed registry: who may sign what, and until when it holds.

    Verifies the registry with the keys that this machine has pinned, or pins its keys.
    """
    from composable.packaging.registry.locations import open_registry
    from composable.packaging.registry.signed import describe_signers

    registry = open_registry(location)
    found = registry.find_signatures()
    if found is None:
        show("unsigned", {"signed": False}, as_json=as_json)
        return
    rows = describe_signers(found)
    fingerprint = found.documents.root_fingerprint
    table = format_table(
        ("SIGNER", "KEY", "FOR"), [(row["signer"], row["key"], row["for"]) for row in rows]
    )
    show(
        f"root keys: {fingerprint}\n{table}",
        {"signed": True, "fingerprint": fingerprint, "signers": rows},
        as_json=as_json,
    )


def _open(location: str) -> Signatures:
    """Return the signatures of a registry that is signed."""
    from composable.errors import RegistryError
    from composable.packaging.registry.locations import open_for_publishing

    found = open_for_publishing(location).find_signatures()
    if found is None:
        raise RegistryError(
            "is unsigned",
            where=location,
            hint=f"sign it: `composable registry init {location} --signed`",
        )
    return found


def _report(
    signatures: Signatures, outcome: Outcome, location: str, *, as_json: bool, is_quiet: bool
) -> None:
    """Print what was signed, and what is still to do."""
    if outcome.missing:
        note(
            f"{outcome.missing} more root signature{'s' * (outcome.missing != 1)} needed: on a "
            f"machine with another root key, run `composable registry sign {location} --approve`",
            is_quiet=is_quiet,
        )
    elif not outcome.is_visible and outcome.signed:
        note(
            f"clients see it once the operator has run `composable registry sign {location}`",
            is_quiet=is_quiet,
        )
    lines = [f"signed: {line}" for line in outcome.signed]
    lines += [f"waits: {line}" for line in outcome.waiting]
    show(
        "\n".join(lines) or "nothing to sign",
        {
            "signed": outcome.signed,
            "waiting": outcome.waiting,
            "missing_signatures": outcome.missing,
            "visible": outcome.is_visible,
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


def _read_new_passphrase() -> str:
    """Return the pass phrase for new keys: from the environment, or else from the terminal."""
    from composable.errors import KeyFileError
    from composable.packaging.trust.keys import PASSPHRASE_VARIABLE, default_keys

    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given:
        return given
    if not sys.stdin.isatty():
        raise KeyFileError(
            "a new key needs a pass phrase",
            where=str(default_keys()),
            hint=f"set {PASSPHRASE_VARIABLE}, run this in a terminal, or give --no-passphrase",
        )
    phrase: str = typer.prompt(
        "Pass phrase for the new keys", hide_input=True, confirmation_prompt=True
    )
    return phrase
