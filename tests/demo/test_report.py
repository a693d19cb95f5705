"""The report: figures and traces like those of the demo, and names that try to add markup."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from composable.demo.figure import write_readme_figure
from composable.demo.page import colour_text, draw_strip, write_report
from composable.demo.result import (
    Bits,
    DemoResult,
    Property,
    PublishedExpert,
    Recovery,
)
from composable.demo.table import print_table
from composable.demo.trace import Trace
from composable.errors import ModelError

HOSTILE = '<script>alert("x")</script>&$x^2$[red]'
NAMES = ("backbone", "python-code", "set-mm", "legal", "", "")
TEXTS = {
    "python-code": b'def _tag(vrtl, bd):\n    """The tag."""\n    return "{:1x}".format(bd)\n\n',
    "set-mm": b"  ${ wilth.1 $e |- P e. Prime $.\n     $( Wilson's theorem. $)\n     prmdiveq $p ",
    "legal": b"Licensee agrees to indemnify, hold harmless and defend the Licensor from claims, ",
    "public": "Fellow-Citizens of the Senate: it would have been satisfactory — ".encode(),
}


def make_trace(*pieces: str, size: int = 500, seed: int = 0) -> Trace:
    """Return a spliced document, and a router that needs some bytes to notice a switch."""
    rng = np.random.default_rng(seed)
    text, segments, score_E, rows = b"", [], np.zeros(4), []
    for piece in pieces:
        length = int(size * rng.uniform(0.6, 1.2))
        segments.append((piece, len(text), len(text) + length))
        text += (TEXTS[piece] * (length // len(TEXTS[piece]) + 1))[:length]
        true = NAMES.index(piece) if piece in NAMES else 0
        for _ in range(length):
            gain_E = np.where(np.arange(4) == true, 0.35, -0.2) + rng.normal(0, 1.1, 4)
            score_E = 0.95 * score_E + gain_E
            rows.append(np.exp(score_E) / np.exp(score_E).sum())
    weight_TE = np.pad(np.array(rows, np.float32), ((0, 0), (0, len(NAMES) - 4)))
    return Trace(text, tuple(segments), NAMES, weight_TE)


def bits(backbone: float, average: float, mix: float, safe: float, own: float | None) -> Bits:
    return Bits(backbone=backbone, average=average, mix=mix, safe=safe, own_expert=own)


@pytest.fixture
def result() -> DemoResult:
    experts = {
        "python-code": ("Python source: the standard library of CPython 3.11.", "PSF-2.0"),
        "set-mm": ("Formal mathematics in Metamath: the database set.mm.", "CC0-1.0"),
        "legal": ("Licence texts: grants, conditions, warranties, liability.", "Apache-2.0"),
    }
    properties = {
        "remove": (True, "256 logits are equal, bit for bit."),
        "reorder": (True, "the same logits in all 6 orders."),
        "refuse": (True, "from-the-future 1.0.0 wants interface tiny-bytes ^2.0; this is 1.0.0"),
        "withstand": (False, "0.2130% of the bytes are routed to it"),
    }
    return DemoResult(
        safe_bound=0.0006,
        domains={
            "python-code": bits(3.9127, 2.7012, 1.6482, 1.6201, 1.6213),
            "set-mm": bits(4.8031, 3.1022, 1.3611, 1.3189, 1.3104),
            "legal": bits(2.4218, 1.9904, 1.7303, 1.7088, 1.7120),
        },
        public=bits(1.9820, 2.1210, 1.9881, 1.9745, None),
        spliced=bits(3.1203, 2.4310, 1.9822, 1.8754, None),
        recovery=Recovery(mix=0.9793, safe=0.9981),
        properties=tuple(
            Property(name=name, passed=passed, found=found)
            for name, (passed, found) in properties.items()
        ),
        claims=(),
        seconds={
            "contribute python-code": 61.2,
            "contribute set-mm": 58.7,
            "contribute legal": 63.0,
            "install": 2.4,
            "measure": 31.8,
            "properties": 12.9,
        },
        step_rss_bytes={"install": 1_234_567_890},
        peak_rss_bytes=1_234_567_890,
        seed=0,
        steps=200,
        machine="2 cores, x86_64, cpu, jax 0.10.2, Python 3.11.7",
        date="2025-11-23",
        backbone="tiny-bytes 1.0.0",
        experts={
            name: PublishedExpert(
                version="1.0.0",
                size_bytes=2_612_000,
                license=license,
                description=description,
                measured={"gain": 0.5},
                train_seconds=50.0,
                confined_by="Landlock (ABI 7)",
            )
            for name, (description, license) in experts.items()
        },
    )


@pytest.fixture
def traces() -> list[Trace]:
    return [
        make_trace("python-code", "public", "set-mm", "legal"),
        make_trace("legal", "python-code", "public", "set-mm", seed=1),
        make_trace("set-mm", "legal", "set-mm", "public", seed=2),
    ]


class Page(HTMLParser):
    """What a browser would see of a page: tags that are open, all attributes, the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(str(source))  # Markup would escape what is added to it
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def test_the_page_shows_all_figures_and_fetches_nothing(
    result: DemoResult, traces: list[Trace], tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report(path, result, traces)
    source = path.read_text(encoding="utf-8")
    page = Page(source)

    assert path.stat().st_size < 1_500_000
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert "url(" not in source
    assert "@import" not in source
    for expected in ("1.310", "97.9%", "99.8%", "composable demo", "61.2 s", "✗ fails", "3 of 4"):
        assert expected in page.text
    assert page.text.count("✓ holds") == 3


def test_the_best_composed_value_of_a_row_stands_out(result: DemoResult, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", result, [])
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<td class=best>([\d.]+)", source) == [
        "1.620",
        "1.319",
        "1.709",
        "1.974",
        "1.875",
    ]


def test_nothing_from_data_becomes_markup(result: DemoResult, tmp_path: Path) -> None:
    plain, hostile = tmp_path / "plain.html", tmp_path / "hostile.html"
    write_report(plain, result, [make_trace("legal", "public")])

    trace = make_trace("legal", "public")
    domains, experts, seconds = (
        {HOSTILE: values[old], **{name: values[name] for name in values if name != old}}
        for values, old in (
            (result.domains, "legal"),
            (result.experts, "legal"),
            (result.seconds, "install"),
        )
    )
    experts[HOSTILE] = dataclasses.replace(
        experts[HOSTILE], version=HOSTILE, license=HOSTILE, description=HOSTILE
    )
    result = dataclasses.replace(
        result,
        domains=domains,
        experts=experts,
        seconds=seconds,
        properties=(Property(name=HOSTILE, passed=True, found=HOSTILE), *result.properties[1:]),
        machine=HOSTILE,
        date=HOSTILE,
        backbone=HOSTILE,
    )
    names = tuple(HOSTILE if name == "legal" else name for name in NAMES)
    (_, *legal), public = trace.segments
    text = (HOSTILE.encode() * 99)[: len(trace.text)]
    segments = ((HOSTILE, *legal), public)
    write_report(hostile, result, [Trace(text, segments, names, trace.weight_TE)])
    write_readme_figure(
        tmp_path / "figure.png", result, [Trace(text, segments, names, trace.weight_TE)]
    )

    source = hostile.read_text(encoding="utf-8")
    page = Page(source)
    assert "<script" not in source
    assert source.count("&lt;script&gt;") > 15
    assert HOSTILE in page.text
    assert set(page.tags) == set(Page(plain.read_text(encoding="utf-8")).tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "script" not in page.tags


def test_nothing_from_data_acts_on_the_page_unseen(result: DemoResult, tmp_path: Path) -> None:
    hostile = "safe\u202egnp.exe\x1b[2J\u2066"
    experts = {
        name: dataclasses.replace(expert, license=hostile, description=hostile)
        for name, expert in result.experts.items()
    }
    result = dataclasses.replace(result, experts=experts, machine=hostile)
    write_report(tmp_path / "page.html", result, [make_trace("legal", "public")])
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "\u202e" not in source
    assert "\x1b" not in source
    assert r"safe\u202egnp.exe\x1b[2J\u2066" in source


def test_all_bytes_of_the_text_are_shown() -> None:
    text = "é<\n\t".encode() + b"\xff\x00" + "\u202e€".encode()
    weight_TE = np.tile(np.array([[0.2, 0.8]]), (len(text), 1))
    weight_TE[2] = 0.5, 0.5
    html = colour_text(Trace(text, (("a", 0, len(text)),), ("backbone", "a"), weight_TE), "xy", 99)
    page = Page(html)

    assert page.text == "aé<↵\n\t\\xff\\x00\\u202e€"
    assert ("class", "x uncertain") in page.attributes
    assert ("title", "a 80%, backbone 20%") in page.attributes


def test_a_mark_stands_where_each_segment_begins() -> None:
    trace = make_trace("legal", "set-mm", "public", "legal", size=60)
    html = colour_text(trace, NAMES, len(trace.text))
    marks = re.findall(r"<q>(.*?)</q>", html)
    assert marks == [name for name, _, _ in trace.segments]
    before = Page(html[: html.index("<q>set-mm")]).text.removeprefix("legal")
    assert before == trace.text[: trace.segments[0][2]].decode()


def test_the_strip_shows_each_byte_by_its_weights() -> None:
    weight_TE = np.array([[1.0, 0.0], [0.25, 0.75], [0.25, 0.75], [0.0, 1.0]])
    strip = draw_strip(Trace(b"text", (("a", 0, 4),), ("backbone", "a"), weight_TE), ("b", "e"))
    assert 'viewBox="0 0 4 100"' in strip
    assert '<path class="e" d="M0 0V100H4V0Z"/>' in strip
    assert '<path class="b" d="M0 0V100H1V25H3V0H4V0Z"/>' in strip


def test_a_long_document_keeps_the_page_small(result: DemoResult, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    size = 200_000
    weight_TE = rng.dirichlet(np.ones(len(NAMES)), size)
    trace = Trace(rng.bytes(size), (("legal", 0, size),), NAMES, weight_TE)
    write_report(tmp_path / "report.html", result, [trace] * 5)
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


def test_weight_on_truth_is_the_weight_of_the_true_expert() -> None:
    weight_TE = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.2, 0.8]])
    trace = Trace(b"text", (("public", 0, 2), ("a", 2, 4)), ("backbone", "a"), weight_TE)
    assert trace.weight_on_truth() == pytest.approx((1 + 0.5 + 1 + 0.8) / 4)


@pytest.mark.parametrize(("text", "shape"), [(b"", (0, 1)), (b"ab", (3, 1)), (b"ab", (2, 2))])
def test_a_trace_has_one_row_per_byte(text: bytes, shape: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="weights of shape"):
        Trace(text, (("a", 0, len(text)),), ("backbone",), np.zeros(shape))


def test_the_figure_is_small_and_white(
    result: DemoResult, traces: list[Trace], tmp_path: Path
) -> None:
    from matplotlib.image import imread

    path = tmp_path / "figure.png"
    write_readme_figure(path, result, traces)
    pixels = imread(path)
    assert path.stat().st_size <= 200_000
    assert pixels.shape[1] == 1600
    assert np.all(pixels[[0, -1]] == 1)
    assert np.all(pixels[:, [0, -1]] == 1)


def test_the_figure_needs_no_trace(result: DemoResult, tmp_path: Path) -> None:
    write_readme_figure(tmp_path / "figure.png", result, [])
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_the_table_fits_in_80_columns(result: DemoResult) -> None:
    long_name = "a-name-longer-than-any-that-a-person-would-choose"
    result = dataclasses.replace(result, domains={**result.domains, long_name: bits(1, 3, 4, 5, 2)})
    out = io.StringIO()
    print_table(result, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    table = {line.split("│")[1].strip(): line for line in lines if "│" in line}
    assert {"python-code", "public", "spliced", "recovery"} <= set(table)
    assert "97.9%" in table["recovery"]
    assert table["public"].split("│")[3].strip() == "–"


def test_importing_it_loads_neither_jax_nor_matplotlib() -> None:
    code = "import sys, composable.demo.report; print({'jax', 'matplotlib'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert out.stdout.strip() == b"set()"
