"""Commands that copy registries, and those of a server, which need `composable[server]`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from composable.cli import bars, signing
from composable.cli.options import Json, Quiet
from composable.cli.output import format_bytes, format_table, note, show

if TYPE_CHECKING:
    from composable.server.accounts import Caller
    from composable.server.services import Services
    from composable.server.settings import Settings

app = typer.Typer(rich_markup_mode=None)
registry = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Sign and copy registries; run and administer a registry server.",
)
app.add_typer(registry, name="registry")
registry.add_typer(signing.app)

Location = Annotated[
    str, typer.Argument(metavar="[DIR]", help="Folder or bucket that holds the bytes.")
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="postgresql://USER@HOST/NAME; by default SQLite in DIR.",
        envvar="COMPOSABLE_DATABASE",
        show_default=False,
    ),
]


@registry.command()
def serve(
    location: Location = "registry",
    database: DatabaseUrl = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8470,
    url: Annotated[str, typer.Option(help="Public URL, if it is another one.")] = "",
    title: Annotated[str, typer.Option(help="Name on the pages.")] = "composable registry",
    public: Annotated[
        bool, typer.Option("--public", help="Anybody may join; releases wait for vetting.")
    ] = False,
    issuer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="OpenID Connect issuer for trusted publishing; repeatable.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a registry with accounts, search and pages.

    Creates the folder and the database if there are none. Stops on SIGTERM or Ctrl-C, after the
    requests that are running.
    """
    with _open(location, database, _make_settings(url, title, issuer or [], is_public=public)) as s:
        from composable.server.serve import serve as run

        note(f"serving {location} at http://{host}:{port}")
        run(s, host=host, port=port)


@registry.command()
def account(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    location: Location = "registry",
    database: DatabaseUrl = None,
    admin: Annotated[bool, typer.Option("--admin", help="Make it an administrator.")] = False,
    as_json: Json = False,
) -> None:
    """Create an account and print its first token, which is not shown again."""
    with _open(location, database) as services:
        from composable.server.accounts import SCOPES, SERVER, create_account, create_token
        from composable.server.api.accounts import FIRST_SCOPES

        with services.database.write() as session:
            created = create_account(session, SERVER, name, is_admin=admin)
            scopes = SCOPES if admin else FIRST_SCOPES
            _, token = create_token(session, created, scopes, label="first token", by="server")
    show(token, {"account": name, "admin": admin, "token": token}, as_json=as_json)


@registry.command()
def backbone(
    folder: Annotated[
        str, typer.Argument(metavar="NAME|DIR", help="A backbone package.", show_default=False)
    ],
    location: Location = "registry",
    database: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Add a backbone, so that its page shows what plugs into it and tensors are checked."""
    with _open(location, database) as services:
        from composable.server.basket import add_backbone

        name, version = add_backbone(services.database, folder)
    show(f"added {name} {version}", {"name": name, "version": version}, as_json=as_json)


@registry.command()
def audit(
    location: Location = "registry", database: DatabaseUrl = None, as_json: Json = False
) -> None:
    """Verify the audit log and print its last hash.

    Exits with 1 if an entry was changed, removed or inserted.
    """
    with _open(location, database) as services:
        from composable.server.audit import verify_chain

        with services.database.read() as session:
            n, last = verify_chain(session)
    show(f"{n} entries, the last is {last}", {"entries": n, "hash": last}, as_json=as_json)


@registry.command()
def backup(
    target: Annotated[Path, typer.Argument(metavar="OUT", show_default=False)],
    location: Location = "registry",
    database: DatabaseUrl = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Write a backup of a registry to the folder OUT, while it runs."""
    with _open(location, database) as services:
        from composable.server.backup import write_backup

        rows, blobs = write_backup(services, target)
    data = {"rows": rows, "blobs": blobs}
    show(f"{rows} rows, {blobs} blobs", data, as_json=as_json, is_quiet=is_quiet)


@registry.command()
def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", show_default=False)],
    location: Location = "registry",
    database: DatabaseUrl = None,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Restore a backup into a new registry, and verify every byte of it."""
    with _open(location, database) as services:
        from composable.server.backup import restore_backup

        rows, blobs = restore_backup(services, source)
    data = {"rows": rows, "blobs": blobs}
    show(f"{rows} rows, {blobs} blobs", data, as_json=as_json, is_quiet=is_quiet)


@registry.command(name="import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Another registry.", show_default=False)
    ],
    location: Location = "registry",
    database: DatabaseUrl = None,
    owner: Annotated[
        str, typer.Option("--account", metavar="NAME", help="Who publishes the releases.")
    ] = "importer",
    as_json: Json = False,
) -> None:
    """Publish all releases of another registry here, each verified like any other.

    Creates the account if there is none. Exits with 1 if a release was refused.
    """
    from composable.packaging.registry.locations import open_registry

    with _open(location, database) as services:
        from composable.server.importing import import_registry

        found = import_registry(services, _find_caller(services, owner), open_registry(source))
    rows = [(f"{row.name} {row.version}", str(row.problem or "published")) for row in found]
    data = [
        {"name": r.name, "version": r.version, "problem": str(r.problem) if r.problem else None}
        for r in found
    ]
    show(format_table((), rows), data, as_json=as_json)
    if any(row.problem for row in found):
        raise typer.Exit(1)


@registry.command()
def mirror(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="The registry to copy from.", show_default=False),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="The registry to copy to: a folder, a bucket, oci:// or hf://.",
            show_default=False,
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REQ",
            help="Only releases of NAME or 'NAME>=1.2', and what they require; repeatable.",
            show_default=False,
        ),
    ] = None,
    backbone_name: Annotated[
        str,
        typer.Option(
            "--backbone",
            metavar="NAME",
            help="Only releases for the router interface of that name.",
            show_default=False,
        ),
    ] = "",
    is_latest: Annotated[
        bool, typer.Option("--latest", help="Only the newest release of each expert.")
    ] = False,
    is_checking: Annotated[
        bool,
        typer.Option("--check", help="Read files that DST has already, and replace damaged ones."),
    ] = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Copy releases from one registry to another; run again to continue or update.

    Files are verified. Yanks and advisories follow; nothing is removed from DST. Without a filter,
    indexes and signatures are copied as they are.
    """
    from composable.packaging.install.mirror import Selection, mirror_registry
    from composable.packaging.registry.budget import share_budget
    from composable.packaging.registry.locations import open_for_publishing, open_registry
    from composable.packaging.versions.constraint import Requirement

    selection = Selection(
        requirements=tuple(map(Requirement.parse, only or ())),
        interface=backbone_name,
        is_latest=is_latest,
    )
    with share_budget(), bars.show_bytes(is_quiet=is_quiet) as progress:
        done = mirror_registry(
            open_registry(source),
            open_for_publishing(target),
            selection,
            is_checking=is_checking,
            progress=progress,
        )
    for requirement in done.missing:
        note(f"note: {requirement} is required, and {source} does not have it", is_quiet=is_quiet)
    count = f"{len(done.releases)} release{'s' * (len(done.releases) != 1)}"
    yanks = [f"{len(done.yanked)} yanked"] * bool(done.yanked)
    yanks += [f"{len(done.unyanked)} no longer yanked"] * bool(done.unyanked)
    text = f"copied {count}, {format_bytes(done.n_bytes)}; {done.n_present} were there"
    show(
        "; ".join([text, *yanks]),
        {
            "source": source,
            "target": target,
            "copied": [
                {"name": name, "version": str(version), "bytes": size}
                for name, version, size in done.releases
            ],
            "present": done.n_present,
            "yanked": [f"{name}@{version}" for name, version in done.yanked],
            "unyanked": [f"{name}@{version}" for name, version in done.unyanked],
            "documents": list(done.documents),
            "missing": list(done.missing),
        },
        as_json=as_json,
        is_quiet=is_quiet,
    )


@registry.command()
def tokens(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    location: Location = "registry",
    database: DatabaseUrl = None,
    revoke: Annotated[
        int | None, typer.Option(metavar="ID", help="Revoke this one.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the tokens of an account, without what would let anyone use them."""
    with _open(location, database) as services:
        from composable.server import accounts

        with services.database.write() as session:
            found = accounts.find_account(session, name)
            if revoke is not None:
                accounts.revoke_token(session, found.id, revoke, "server")
            rows = accounts.list_tokens(session, found.id)
    head = ("id", "label", "scopes", "packages", "expires", "revoked")
    table = format_table(
        head,
        [
            (
                row["id"],
                row["label"],
                " ".join(row["scopes"]),
                " ".join(row["packages"]) or "all",
                row["expires"] or "never",
                row["revoked"] or "",
            )
            for row in rows
        ],
    )
    show(table, rows, as_json=as_json)


def _make_settings(url: str, title: str, issuers: list[str], *, is_public: bool) -> Settings:
    _require_server()
    import dataclasses

    from composable.server.settings import Settings

    if is_public:
        settings = Settings.for_the_world(url=url.rstrip("/"), issuers=tuple(issuers))
        return dataclasses.replace(settings, title=title)
    return Settings(url=url.rstrip("/"), title=title, issuers=tuple(issuers))


def _find_caller(services: Services, name: str) -> Caller:
    """Return an account of this machine's choice as a caller; it is created if there is none."""
    from composable.errors import RegistryError
    from composable.server.accounts import SERVER, Caller, create_account, find_account

    with services.database.write() as session:
        try:
            account = find_account(session, name)
        except RegistryError:
            account = create_account(session, SERVER, name)
    scopes = frozenset({"read", "publish"})
    return Caller(account=account.id, name=account.name, scopes=scopes)


@contextlib.contextmanager
def _open(
    location: str, database: str | None, settings: Settings | None = None
) -> Iterator[Services]:
    _require_server()
    from composable.server.services import open_services

    services = open_services(location, database, settings)
    try:
        yield services
    finally:
        services.close()


def _require_server() -> None:
    from composable.errors import RegistryError

    try:
        import alembic  # noqa: F401
        import joserfc  # noqa: F401
        import sqlalchemy  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RegistryError(
            f"a server needs the package {error.name}", hint="pip install 'composable[server]'"
        ) from error
