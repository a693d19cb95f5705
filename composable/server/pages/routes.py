"""The pages: home, search, experts, backbones, publishers; and the feeds.

A page shows what its reader may see: with a token in the header, private packages too.
"""

from __future__ import annotations

import json
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import selectinload
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from composable.errors import ComposableError
from composable.packaging.registry.registry import parse_manifest
from composable.packaging.registry.release import choose_newest
from composable.packaging.versions.version import Version
from composable.server import basket, documents
from composable.server.access import can_see, can_see_release, find_package
from composable.server.accounts import Caller, find_account, find_caller
from composable.server.api.operation import Call, base_url
from composable.server.api.packages import SORTS, describe_summary, read_query
from composable.server.cards import read_figure
from composable.server.pages.feeds import News, make_feed
from composable.server.pages.rendering import STYLE, render
from composable.server.refusal import missing, status_of
from composable.server.search import FILTERS, PAGE, Query
from composable.server.services import Services
from composable.server.tables import Owner, Package, Release

NEWS: Final = 30
MAX_README: Final = 20_000
MAX_SHOWN: Final = 100


def show_home(request: Request) -> Response:
    """Show what the registry is, its backbones, and the newest and the best experts."""
    services, caller = _start(request)
    with services.database.read() as session:
        search = services.search
        newest = search.search(session, caller, Query(sort="newest"))
        best = search.search(session, caller, Query(sort="gain"))
        backbones = basket.list_backbones(session)
    context = {
        "total": newest.total,
        "newest": [describe_summary(row) for row in newest.rows[:6]],
        "best": [describe_summary(row) for row in best.rows[:6] if row["gain"]],
        "backbones": backbones,
    }
    return render(request, "home.html", context)


def show_search(request: Request) -> Response:
    """Show the packages that words and filters find."""
    services, caller = _start(request)
    query = read_query(_as_call(request, services, caller))
    with services.database.read() as session:
        found = services.search.search(session, caller, query)
    context = {
        "query": query,
        "found": found,
        "packages": [describe_summary(row) for row in found.rows],
        "pages": -(-found.total // PAGE),
        "sorts": SORTS,
        "filters": FILTERS,
        "gain": request.query_params.get("gain", ""),
    }
    return render(request, "search.html", context)


def show_expert(request: Request) -> Response:
    """Show a package: how to install it, its versions, what it fits, and what was measured."""
    services, caller = _start(request)
    name = request.path_params["name"]
    with services.database.read() as session:
        package = find_package(session, caller, name)
        rows = list(
            session.scalars(
                select(Release)
                .where(Release.package_id == package.id, can_see_release(caller))
                .options(selectinload(Release.files))
            )
        )
        owners = sorted(owner.account.name for owner in package.owners)
        if package.removal is not None or not rows:
            context = {"package": package, "owners": owners}
            return render(request, "removed.html", context, 410 if package.removal else 404)
        listed = {documents.to_listed(row).version: row for row in rows}
        release = _choose(listed, request.path_params.get("version"), name)
        manifest = parse_manifest(release.manifest.encode(), name)
        backbones = basket.list_backbones(session)
        against = _choose_backbone(request, backbones, manifest.interface.name)
        card = json.loads(release.card)
        context = {
            "package": package,
            "owners": owners,
            "release": release,
            "manifest": manifest,
            "versions": _describe_versions(listed, against),
            "backbones": backbones,
            "against": against,
            "card": card,
            "n_documents": read_figure(card, "documents", "own"),
            "files": sorted(release.files, key=lambda file: file.name),
            "readme": release.readme[:MAX_README],
            "dependents": services.search.dependents(session, caller, name)[:MAX_SHOWN],
        }
        return render(request, "expert.html", context)


def show_backbone(request: Request) -> Response:
    """Show what plugs into a backbone, and resolve a basket of experts for it."""
    services, caller = _start(request)
    name = request.path_params["name"]
    wanted = [text for text in request.query_params.getlist("with") if text][: basket.MAX_BASKET]
    text = request.query_params.get("q", "")
    with services.database.read() as session:
        backbone = basket.find_backbone(session, name, request.query_params.get("version", ""))
        query = Query(text=text, filters={"backbone": name})
        found = services.search.search(session, caller, query)
        chosen, problem = None, ""
        if wanted:
            try:
                chosen = basket.resolve_basket(session, caller, backbone, wanted, base_url(request))
            except ComposableError as error:
                problem = str(error)
        versions = [row.version for row in basket.list_backbones(session) if row.name == name]
    shown = [describe_summary(row) for row in found.rows]
    listed = {row["name"] for row in shown}
    context = {
        "backbone": backbone,
        "interface": basket.read_interface(backbone),
        "versions": versions,
        "found": found,
        "packages": shown,
        "text": text,
        "wanted": wanted,
        "kept": [item for item in wanted if item not in listed],
        "chosen": chosen,
        "problem": problem,
    }
    return render(request, "backbone.html", context)


def show_publisher(request: Request) -> Response:
    """Show the packages of an account."""
    services, caller = _start(request)
    with services.database.read() as session:
        account = find_account(session, request.path_params["name"])
        theirs = (
            select(Package.name)
            .join(Owner)
            .where(Owner.account_id == account.id, can_see(caller), Package.removal.is_(None))
        )
        total = session.scalar(select(func.count()).select_from(theirs.subquery()))
        names = session.scalars(theirs.order_by(Package.name).limit(MAX_SHOWN))
        rows = services.search.summaries(session, names)
    packages = [describe_summary(row) for row in rows]
    context = {"account": account, "packages": packages, "total": total}
    return render(request, "publisher.html", context)


def show_feed(request: Request) -> Response:
    """Return the newest releases as a feed: of all, of a package, or of a publisher."""
    services, caller = _start(request)
    newest = (
        select(Release)
        .join(Package)
        .where(can_see(caller), can_see_release(caller), Package.removal.is_(None))
        .order_by(Release.published.desc(), Release.id.desc())
        .limit(NEWS)
    )
    title = services.settings.title
    package, account = request.path_params.get("expert"), request.path_params.get("publisher")
    with services.database.read() as session:
        if package is not None:
            title = f"{title}: {find_package(session, caller, package).name}"
            newest = newest.where(Package.name == package)
        if account is not None:
            title = f"{title}: {find_account(session, account).name}"
            newest = newest.where(Release.publisher == account)
        news = [_to_news(row) for row in session.scalars(newest)]
    return make_feed(title, base_url(request), request.url.path, news)


def get_style(request: Request) -> Response:
    """Return the style sheet."""
    return Response(STYLE, media_type="text/css", headers={"Cache-Control": "max-age=3600"})


def render_error(request: Request, error: ComposableError) -> HTMLResponse:
    """Return the page for an error."""
    return render(
        request, "error.html", {"error": error, "status": status_of(error)}, status_of(error)
    )


def _start(request: Request) -> tuple[Services, Caller]:
    services: Services = request.app.state.services
    with services.database.read() as session:
        return services, find_caller(session, request.headers.get("authorization"))


def _as_call(request: Request, services: Services, caller: Caller) -> Call:
    return Call(
        services=services,
        caller=caller,
        path=request.path_params,
        query={key: value for key, value in request.query_params.items() if value},
        body=None,
        url=base_url(request),
    )


def _choose(listed: dict[Version, Release], text: str | None, name: str) -> Release:
    """Return the release of a version, or the newest."""
    if text is None:
        return listed[choose_newest(map(documents.to_listed, listed.values())).version]
    wanted = Version(text)
    if wanted not in listed:
        raise missing(f"release {name} {wanted}")
    return listed[wanted]


def _choose_backbone(request: Request, backbones: list[Any], name: str) -> Any:
    """Return the backbone that the visitor picked, or the newest that the expert names."""
    picked = request.query_params.get("backbone", "")
    for row in backbones:
        if picked == f"{row.name}@{row.version}":
            return row
    return next((row for row in backbones if row.name == name), None)


def _describe_versions(listed: dict[Version, Release], against: Any) -> list[dict[str, Any]]:
    interface = None if against is None else basket.read_interface(against)
    rows = []
    for version in sorted(listed, reverse=True)[:MAX_SHOWN]:
        release = documents.to_listed(listed[version])
        misfit = None if interface is None else basket.explain_misfit(release, interface)
        rows.append({"release": listed[version], "needs": release.interface, "misfit": misfit})
    return rows


def _to_news(row: Release) -> News:
    return News(
        name=row.row["name"],
        version=row.version,
        published=row.published,
        publisher=row.publisher,
        description=row.row["description"],
    )


ROUTES: Final = (
    ("/", show_home),
    ("/search", show_search),
    ("/feed.atom", show_feed),
    ("/experts/{expert}/feed.atom", show_feed),
    ("/publishers/{publisher}/feed.atom", show_feed),
    ("/experts/{name}", show_expert),
    ("/experts/{name}/{version}", show_expert),
    ("/backbones/{name}", show_backbone),
    ("/publishers/{name}", show_publisher),
    ("/style.css", get_style),
)
