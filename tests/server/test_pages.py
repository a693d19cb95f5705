"""The pages: what they show, to whom, and that nothing a publisher writes becomes markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from composable.interface import RouterInterface
from composable.packaging import Version
from composable.server.importing import import_registry
from composable.server.tables import Backbone
from tests.support.registries import Served, fetch

if TYPE_CHECKING:
    from tests.server.conftest import MakeVetted

MEASURED = {
    "bits_per_byte": {
        "own_backbone": 3.4,
        "own_expert": 2.1,
        "own_mix": 2.2,
        "anchor_backbone": 1.452,
        "anchor_mix": 1.453,
    },
    "gain": 0.35,
    "gain_interval": {"low": 0.3, "high": 0.41},
    "anchor_taken": 0.002,
    "anchor_taken_bound": 0.31,
    "beside": {"french": {"own": {"without": 2.0, "with": 2.01}, "anchor": None}},
    "documents": {"own": 8},
}


def add_backbone(server: Served, interface: RouterInterface) -> None:
    with server.services.database.write() as session:
        session.add(
            Backbone(
                name=interface.name,
                version=interface.version,
                interface=interface.to_json(),
                description="A small backbone.",
                license="Apache-2.0",
                added="2026-11-29T12:00:00Z",
            )
        )


@pytest.fixture
def filled(server: Served, make_vetted: MakeVetted, interface: RouterInterface) -> Served:
    """A server with a backbone and experts, two of which conflict."""
    add_backbone(server, interface)
    registry = server.registry(server.account("ann"))
    tags = 'languages = ["de"]\ndomains = ["law"]'
    registry.publish(make_vetted("german", measured=MEASURED, head=tags), interface=interface)
    registry.publish(make_vetted("german", "2.0.0", seed=1, head=tags), interface=interface)
    needs = '[requires]\ngerman = "^1"\n'
    registry.publish(make_vetted("contracts", tail=needs, seed=2), interface=interface)
    clash = '[conflicts]\ncontracts = "*"\n'
    registry.publish(make_vetted("poetry", tail=clash, seed=3), interface=interface)
    return server


def page(server: Served, path: str, status: int = 200) -> str:
    found, data, kind = fetch(server.url + path, Accept="text/html")
    assert (found, kind) == (status, "text/html; charset=utf-8"), data[:300]
    assert len(data) < 100_000
    return data.decode()


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_home_lists_backbones_and_the_newest(filled: Served) -> None:
    html = page(filled, "/")
    assert "3 experts" in html
    assert "A small backbone." in html
    assert f"composable init --registry {filled.url}" in html


def test_search_finds_by_word_and_filter(filled: Served) -> None:
    def names(query: str) -> list[str]:
        return re.findall(r'<h3><a href="/experts/([a-z-]+)"', page(filled, f"/search?{query}"))

    assert names("q=germ") == ["german"]
    assert names("q=law+germ") == ["german"]
    assert names("q=law+poetry") == []
    assert names("domain=law") == ["german"]
    assert names("language=fr") == []
    assert names("sort=name") == ["contracts", "german", "poetry"]
    assert names("gain=60") == []
    assert set(names("gain=40")) == {"contracts", "german", "poetry"}
    assert names("q=" + "x" * 5000 + "&page=999") == []


def test_an_experts_page(filled: Served) -> None:
    html = page(filled, "/experts/german/1.0.0")
    text = text_of(html)
    assert "composable install german@1.0.0" in text
    assert "Apache-2.0" in text
    assert "backbone alone: 3.400; expert always on: 2.100; routed: 2.200" in html
    assert "0.20% (≤ 31.0%)" in text
    assert "With french installed" in text
    assert "8 documents" in text
    assert 'Used by </h2><ul><li><a href="/experts/contracts">' in html.replace("by<", "by <")
    newest = text_of(page(filled, "/experts/german"))
    assert "composable install german Fits" in newest
    assert "2.0.0" in newest
    page(filled, "/experts/german/3.0.0", 404)
    page(filled, "/experts/german/x", 422)
    page(filled, "/experts/none", 404)


def test_compatibility_with_a_backbone_that_the_visitor_picks(
    filled: Served, interface: RouterInterface
) -> None:
    import dataclasses

    add_backbone(filled, dataclasses.replace(interface, version="2.0.0"))
    one = text_of(page(filled, "/experts/german?backbone=tiny-bytes%401.2.0"))
    two = text_of(page(filled, "/experts/german?backbone=tiny-bytes%402.0.0"))
    assert one.count("tiny-bytes ^1 fits") == 2
    assert two.count("does not fit : it needs tiny-bytes ^1") == 2


def test_a_yank_and_a_takedown_are_explained(filled: Served) -> None:
    admin = filled.account("root", is_admin=True, scopes=["admin", "yank"])
    filled.registry(admin).yank("german", Version("2.0.0"), "trained on <b>test</b> text")
    assert "trained on &lt;b&gt;test&lt;/b&gt; text" in page(filled, "/experts/german/2.0.0")
    filled.api("POST", "/packages/poetry/takedown", {"reason": "court order"}, admin)
    assert "court order" in page(filled, "/experts/poetry", 410)
    assert "poetry" not in page(filled, "/search")


def test_the_basket_resolves_or_explains(filled: Served) -> None:
    text = text_of(page(filled, "/backbones/tiny-bytes?with=contracts"))
    assert "These go together." in text
    assert re.search(r"german 1\.0\.0", text), "contracts needs german 1"
    assert "composable install contracts" in text
    assert 'wanted-by = ["contracts 1.0.0: ^1"]' in text.replace("&#34;", '"')
    text = text_of(page(filled, "/backbones/tiny-bytes?with=contracts&with=poetry"))
    assert "These do not go together." in text
    assert "poetry 1.0.0 cannot be installed with contracts." in text
    assert "That is no basket." in page(filled, "/backbones/tiny-bytes?with=%3Cx%3E")
    unknown = text_of(page(filled, "/backbones/tiny-bytes?with=germen"))
    assert "did you mean &#39;german&#39;?" in unknown
    page(filled, "/backbones/none", 404)


def test_a_locked_basket_is_a_lock(filled: Served) -> None:
    from composable.packaging import Lock

    body = {"backbone": "tiny-bytes", "experts": ["contracts"]}
    answer = filled.api("POST", "/resolve", body)[1]
    lock = Lock.loads(answer["lock"])
    assert {name: str(v) for name, v in lock.versions.items()} == {
        "contracts": "1.0.0",
        "german": "1.0.0",
    }
    assert lock.registries == {"registry": filled.url}


def test_publishers_and_feeds(filled: Served) -> None:
    assert "3 experts" in page(filled, "/publishers/ann")
    page(filled, "/publishers/none", 404)
    atom = "{http://www.w3.org/2005/Atom}"
    for path, n in (("", 4), ("/experts/german", 2), ("/publishers/ann", 4)):
        _, data, _ = fetch(f"{filled.url}{path}/feed.atom")
        feed = ElementTree.fromstring(data)
        assert len(feed.findall(f"{atom}entry")) == n, path
        assert feed.find(f"{atom}updated") is not None
    assert fetch(f"{filled.url}/experts/none/feed.atom")[0] == 404


def test_what_publishers_write_is_no_markup(
    server: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    evil = "<script>alert(1)</script>"
    measured = {**MEASURED, "gain": evil, "beside": {evil: {"own": {"with": 1.0}}, "x": evil}}
    measured |= {"documents": evil, "bits_per_byte": {"own_backbone": True, "own_mix": -1.0}}
    folder = make_vetted(measured=measured, head=f'authors = ["{evil}"]')
    (folder / "README.md").write_text(evil)
    text = (folder / "expert.toml").read_text()
    (folder / "expert.toml").write_text(text.replace("Knows german.", evil))
    server.registry(server.account("ann")).publish(folder, interface=interface)
    add_backbone(server, interface)
    for path in ("/", "/search", "/experts/german", "/backbones/tiny-bytes?with=german"):
        html = page(server, path)
        assert "<script" not in html, path
        assert "&lt;script&gt;" in html, path
    found = page(server, "/search?q=%3Cscript%3E&license=%22%3E%3Cscript%3E")
    assert "<script" not in found
    ElementTree.fromstring(fetch(f"{server.url}/feed.atom")[1])


def test_errors_are_pages_for_browsers_only(server: Served) -> None:
    assert "no package" in page(server, "/experts/none", 404)
    assert server.ask("GET", "/experts/none")[1]["error"]["message"].startswith("no package")
    page(server, "/nothing", 404)


def test_imports_another_registry(
    filled: Served, make_vetted: MakeVetted, interface: RouterInterface, tmp_path: Path
) -> None:
    from composable.packaging import open_registry
    from composable.server.accounts import Caller
    from tests.support.registries import run_server

    with run_server(tmp_path / "copy") as copy:
        copy.account("bob")
        caller = Caller(account=1, name="bob", scopes=frozenset({"publish", "read"}))
        source = open_registry(filled.url)
        for _ in range(2):
            found = import_registry(copy.services, caller, source)
            assert [(row.name, row.version) for row in found] == [
                ("contracts", "1.0.0"),
                ("german", "1.0.0"),
                ("german", "2.0.0"),
                ("poetry", "1.0.0"),
            ]
            assert [row.problem for row in found] == [None] * 4
        ours, theirs = open_registry(copy.url), source
        for name in theirs.names():
            assert [r.manifest for r in ours.versions(name)] == [
                r.manifest for r in theirs.versions(name)
            ]


def test_search_follows_every_change(
    filled: Served, make_vetted: MakeVetted, interface: RouterInterface
) -> None:
    """Answers are kept, but not beyond a change."""

    def total() -> int:
        return int(filled.api("GET", "/search?q=knows")[1]["total"])

    assert [total(), total()] == [3, 3]
    bob = filled.account("bob")
    filled.registry(bob).publish(make_vetted("swahili", seed=9), interface=interface)
    assert total() == 4
    filled.api("PATCH", "/packages/swahili", {"private": True}, bob)
    assert total() == 3
    assert filled.api("GET", "/search?q=knows", None, bob)[1]["total"] == 4
    assert total() == 3
