"""Commands on the store: verify it, list it, remove unused files."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from composable.cli import bars
from composable.cli.options import Json, Quiet
from composable.cli.output import format_bytes, format_table, show
from composable.printable import printable

app = typer.Typer(rich_markup_mode=None)
cache = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Manage the store, which all projects share.",
)
app.add_typer(cache, name="cache")


@app.command()
def verify(
    signatures: Annotated[
        bool,
        typer.Option(
            "--signatures",
            help="Verify the signatures of what is installed here too, without the network.",
        ),
    ] = False,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Verify the digests of all stored and installed files.

    The installed files are those of every project that uses the store. Damaged files are moved
    aside, so that the next `composable sync` fetches them again. Experts that the policy of their
    project refuses are listed. Exits with 1 if there is anything to report.
    """
    from composable.errors import PackagingError
    from composable.packaging.install.store import Store
    from composable.packaging.project.project import Project
    from composable.packaging.project.verification import verify_everything, verify_signatures

    store = Store()
    try:
        here = [Project.find().root]
    except PackagingError:
        here = []  # not in a project
    with bars.show_counts("verify", is_quiet=is_quiet) as count:
        progress = None if count is None else lambda label, done, total: count(done, total)
        damage = verify_everything(store, here, progress)
    names = {digest: uses[0].file for digest, uses in damage.uses.items() if uses}
    rows = [
        ("store", f"{names.get(b.digest, 'not in any project')} ({b.digest})")
        for b in damage.corrupt
    ]
    rows += [("installed", str(path)) for paths in damage.installed.values() for path in paths]
    rows += [("not verified", f"{root}: {why}") for root, why in damage.unverified.items()]
    is_damaged = bool(rows)
    rows += [("policy", f"{root}: {why}") for root, each in damage.refused.items() for why in each]
    checked = verify_signatures(here[0]) if signatures and here else []
    rows += [
        ("signature", f"{each.name} {each.version}: {each.problem.message}")
        for each in checked
        if each.problem is not None
    ]
    hints = {each.problem.hint: None for each in checked if each.problem and each.problem.hint}
    n = len(store.digests())
    text = format_table((), rows) or f"no damage found: {n} file{'s' * (n != 1)} in the store"
    if is_damaged and damage.projects == here:
        text += "\nrun `composable sync` to fetch them again" * bool(here)
    elif damage.projects:
        text += "\nrun `composable sync` in each of these projects to fetch them again:"
        text += "".join(f"\n  {printable(str(root))}" for root in damage.projects)
    text += "".join(f"\nhint: {printable(hint)}" for hint in hints if hint)
    signed = {each.name: each.signer for each in checked if each.problem is None}
    text += "".join(
        f"\n{name} is signed by {signer.publisher} ({signer.key})"
        if signer
        else f"\n{name} is unsigned"
        for name, signer in signed.items()
    )
    data: dict[str, Any] = {
        "corrupt": [blob.digest for blob in damage.corrupt],
        "files": {blob.digest: names.get(blob.digest) for blob in damage.corrupt},
        "damaged": [str(path) for paths in damage.installed.values() for path in paths],
        "projects": [str(root) for root in damage.projects],
        "refused": {str(root): each for root, each in damage.refused.items()},
        "unverified": {str(root): why for root, why in damage.unverified.items()},
    }
    if signatures:
        data["signatures"] = {
            each.name: {
                "version": str(each.version),
                "signer": dataclasses.asdict(each.signer) if each.signer else None,
                "problem": str(each.problem) if each.problem else None,
            }
            for each in checked
        }
    show(text, data, as_json=as_json, is_quiet=is_quiet and not rows)
    if rows:
        raise typer.Exit(1)


@cache.command(name="list")
def list_(as_json: Json = False, is_quiet: Quiet = False) -> None:
    """List the files in the store."""
    from composable.packaging.install.store import Store
    from composable.packaging.project.verification import find_uses

    store = Store()
    uses = find_uses(store)
    names = {digest: found[0].file for digest, found in uses.items()}
    in_use = store.linked() | {
        digest for digest, found in uses.items() if any(use.is_installed for use in found)
    }
    files = [(digest, store.path(digest).stat().st_size) for digest in store.digests()]
    rows = [
        (d[:19] + "…", format_bytes(size), "in use" if d in in_use else "", names.get(d, ""))
        for d, size in files
    ]
    total = f"{len(files)} file{'s' * (len(files) != 1)}, {format_bytes(store.size())}"
    data = [
        {"digest": d, "bytes": size, "in_use": d in in_use, "file": names.get(d)}
        for d, size in files
    ]
    text = "\n".join(filter(None, (format_table((), rows), total)))
    show(text, data, as_json=as_json, is_quiet=is_quiet)


@cache.command()
def prune(
    older_than: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="Keep files younger than this.")
    ] = 1.0,
    as_json: Json = False,
    is_quiet: Quiet = False,
) -> None:
    """Remove files that no project on this machine uses.

    Files named in a project's lock are kept, whether they are installed or not.
    """
    from composable.packaging.install.store import Store
    from composable.packaging.project.edits import prune_store

    pruned = prune_store(Store(), older_than * 3600)
    n = len(pruned.digests)
    show(
        f"removed {n} file{'s' * (n != 1)}, {format_bytes(pruned.bytes_freed)}",
        {"removed": list(pruned.digests), "bytes_freed": pruned.bytes_freed},
        as_json=as_json,
        is_quiet=is_quiet,
    )


@cache.command(name="dir")
def dir_(as_json: Json = False, is_quiet: Quiet = False) -> None:
    """Print the path of the store."""
    from composable.packaging.install.store import Store

    root = str(Store().root)
    show(root, {"dir": root}, as_json=as_json, is_quiet=is_quiet)
