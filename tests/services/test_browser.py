"""The pages in Chromium, at the width of a desk and of a phone, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
from composable.server.basket import add_backbone
from tests.support.registries import Served, make_vetted_expert, run_server
from tests.support.servers import require

CHROMIUM = shutil.which("chromium")
AXE = find_spec("axe_playwright_python")
PAGES = (
    "/",
    "/search?q=knows",
    "/experts/german",
    "/backbones/tiny-bytes",
    "/backbones/tiny-bytes?with=german&with=french",
    "/backbones/tiny-bytes?with=german&with=poetry",
    "/publishers/ann",
    "/experts/none",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("site")
    interface = read_interface(find_backbone("tiny-bytes"))
    measured = {
        "bits_per_byte": {"own_backbone": 3.0, "own_expert": 2.0, "own_mix": 2.1},
        "gain": 0.3,
        "gain_interval": {"low": 0.25, "high": 0.36},
        "anchor_taken": 0.01,
        "anchor_taken_bound": 0.3,
    }
    with run_server(home / "served") as server:
        add_backbone(server.services.database, "tiny-bytes")
        registry = server.registry(server.account("ann"))
        for name, tail in (
            ("german", ""),
            ("french", ""),
            ("poetry", '[conflicts]\ngerman = "*"\n'),
        ):
            folder = make_vetted_expert(home / name, interface, name, tail=tail, measured=measured)
            registry.publish(folder, interface=interface)
        yield server


@pytest.fixture(scope="module", params=[(1200, "light"), (390, "dark")], ids=["desk", "phone"])
def context(request: pytest.FixtureRequest):
    require(CHROMIUM is not None, "chromium")
    require(AXE is not None, "requirements-browser.lock")
    from playwright import sync_api

    width, scheme = request.param
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
        )
        browser.close()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_accessible_and_fits(site: Served, context, path: str) -> None:
    """axe finds nothing, no page scrolls sideways, and none needs a script or another server."""
    assert AXE is not None and AXE.origin is not None
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.url + path)
    page.add_script_tag(path=str(Path(AXE.origin).parent / "axe.min.js"))
    found = page.evaluate("axe.run()")["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert {url.split("?")[0] for url in asked} <= {
        site.url + path.split("?")[0],
        site.url + "/style.css",
        site.url + "/favicon.ico",
    }
    page.close()


def test_plots_are_not_cut_off(site: Served, context) -> None:
    page = context.new_page()
    page.goto(f"{site.url}/experts/german")
    cut = page.evaluate(
        """[...document.querySelectorAll("svg.plot text")].filter(text => {
            const a = text.getBoundingClientRect()
            const b = text.ownerSVGElement.getBoundingClientRect()
            return a.left < b.left - 1 || a.right > b.right + 1
        }).map(text => text.textContent)"""
    )
    assert page.locator("svg.plot").count() == 3
    assert cut == []
    page.close()


def test_a_visitor_fills_the_basket(site: Served, context) -> None:
    """From the first page to the command, by clicks alone."""
    page = context.new_page()
    page.goto(site.url)
    page.get_by_role("link", name="tiny-bytes").first.click()
    page.get_by_role("checkbox", name="german").check()
    page.get_by_role("checkbox", name="french").check()
    page.get_by_role("button", name="Update basket").last.click()
    assert page.get_by_text("These go together.").is_visible()
    assert "composable install" in page.content()
    page.get_by_role("checkbox", name="poetry").check()
    page.get_by_role("button", name="Update basket").last.click()
    assert page.get_by_text("These do not go together.").is_visible()
    page.close()
