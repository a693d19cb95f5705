"""What people see of the demo: a table in the terminal, a page, and a figure for the README.

The page is one file without scripts and without anything to fetch; its style is `report.css`.
Everything that comes from data is escaped. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.table import Table
from rich.text import Text

from composable.demo.trace import Trace, colour_text, draw_strip, thin_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from rich.console import Console

_METHODS: Final = ("backbone", "own_expert", "average", "mix", "safe")
_COMPOSED: Final = ("average", "mix", "safe")
_COMMAND: Final = "composable demo"
# Hues for experts (Okabe & Ito 2008, made for the colour-blind); methods are greys and one violet.
_BACKBONE_HUE: Final = "#8b939e"
_HUES: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")
_METHOD_HUES: Final = {
    "backbone": _BACKBONE_HUE,
    "own_expert": "none",
    "average": "#c3c8cf",
    "mix": "#a594f0",
    "safe": "#5b3fd6",
}
_INK: Final = "#1b1f24"
_QUIET: Final = "#5b6470"
# Bytes of text on the page in all, which keeps the file small.
_SHOWN_BYTES: Final = 9_000


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Print bits per byte of every text under every method, and the recovery.

    Args:
        result: The demo's figures.
        console: Where to print; 80 columns are enough.
    """
    table = Table(title="bits per byte on held-out text (lower is better)", title_justify="left")
    table.add_column("text", overflow="ellipsis", no_wrap=True, max_width=24)
    for method in _METHODS:
        table.add_column(_label(method), justify="right", no_wrap=True)
    for name, row in _rows(result):
        best = _best(row)
        cells = [Text(_bits(row.get(m)), style="bold" if m == best else "") for m in _METHODS]
        table.add_row(Text(name), *cells)
    table.add_section()
    recovery = [f"{result['recovery'][mode]:.1%}" for mode in ("mix", "safe")]
    table.add_row("recovery", "", "", "", *recovery, style="bold")
    console.print(table)


def write_report(path: Path, result: Mapping[str, Any], traces: Sequence[Trace]) -> None:
    """Write the page: one HTML file that fetches nothing.

    Args:
        path: The file.
        result: The demo's figures.
        traces: Documents to show byte by byte; the text is cut where the page would grow large.
    """
    hues = _expert_hues(result)
    style = Path(__file__).with_suffix(".css").read_text()
    style += "".join(f".e{e} {{ --c: {hue}; }}\n" for e, hue in enumerate(hues.values()))
    classes = {name: f"e{e}" for e, name in enumerate(hues)}
    shown = _SHOWN_BYTES // max(len(traces), 1)
    sections = (
        _heading(result),
        _table(result),
        _charts(result),
        _experts(result, classes),
        _traces_heading(classes) if traces else "",
        *(_trace(number, trace, classes, shown) for number, trace in enumerate(traces, 1)),
        _properties(result),
        _steps(result),
        _footer(result),
    )
    path.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>composable demo</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _rows(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Return the texts and their figures; an own expert only where there is one."""
    rest = [
        (name, {method: result[name][method] for method in result[name] if method != "own_expert"})
        for name in ("public", "spliced")
    ]
    return [*result["domains"].items(), *rest]


def _best(row: Mapping[str, float]) -> str:
    return min(_COMPOSED, key=row.__getitem__)


def _label(method: str) -> str:
    return method.replace("_", " ")


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _expert_hues(result: Mapping[str, Any]) -> dict[str, str]:
    """Return a colour per name, the backbone first; past seven experts colours repeat."""
    hues = {name: _HUES[i % len(_HUES)] for i, name in enumerate(result["experts"])}
    return {"backbone": _BACKBONE_HUE, **hues}


# The figure for the README.


def write_readme_figure(path: Path, result: Mapping[str, Any], traces: Sequence[Trace]) -> None:
    """Write a PNG: bars for every text, and below them whom the router trusted on one document.

    The ground is white, so that it can be read on any page.

    Args:
        path: The file.
        result: The demo's figures.
        traces: The first one is drawn; without any there are only the bars.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.7 if traces else 2.5), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    bars, *below = figure.subfigures(
        1 + bool(traces), 1, squeeze=False, height_ratios=[2.5, 2.2][: 1 + bool(traces)]
    )[:, 0]
    _draw_bars(bars, result)
    if below:
        _draw_routing(below[0], traces[0], _expert_hues(result))
    figure.savefig(path, metadata={"Software": None})


def _draw_bars(figure: SubFigure, result: Mapping[str, Any]) -> None:
    rows = _rows(result)
    top = max(value for _, row in rows for value in row.values())
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    figure.subplots_adjust(left=0.09, right=0.99, top=0.73, bottom=0.03, wspace=0.12)
    _write(figure, 0.01, 0.92, "Bits per byte on held-out text", weight="bold", size=11)
    recovery = ", ".join(f"{result['recovery'][mode]:.1%} {mode}" for mode in ("mix", "safe"))
    note = f"lower is better; gap to the own expert that composing closes: {recovery}"
    _write(figure, 0.99, 0.92, note, ha="right", color=_QUIET)
    for panel, (name, row) in zip(panels, rows, strict=True):
        _clear(panel, (0, 1.3 * top), (len(_METHODS) - 0.4, -0.6))
        panel.set_title(name, loc="left", fontsize=9.5, weight="bold", parse_math=False)
        for y, method in enumerate(_METHODS):
            if panel is panels[0]:
                _write(panel, -0.08 * top, y, _label(method), ha="right", color=_QUIET)
            if method not in row:
                continue
            edge = _INK if method == "own_expert" else "none"
            panel.barh(y, row[method], 0.66, color=_METHOD_HUES[method], edgecolor=edge)
            weight = "bold" if method == _best(row) else "normal"
            _write(panel, row[method] + 0.05 * top, y, _bits(row[method]), weight=weight)


def _draw_routing(figure: SubFigure, trace: Trace, hues: Mapping[str, str]) -> None:
    panel = figure.subplots()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.68, bottom=0.19)
    _write(figure, 0.01, 0.91, "Whom the router trusts, byte by byte", weight="bold", size=11)
    weight_TE = thin_weights(trace.weight_TE)
    total = len(trace.text)
    _clear(panel, (0, total), (1, 0))
    # A step lasts until the next point, so the last one is drawn twice.
    weight_TE = np.append(weight_TE, weight_TE[-1:], axis=0)
    depth_TE = np.cumsum(weight_TE, axis=1)
    x_T = np.linspace(0, total, len(weight_TE))
    for e in np.flatnonzero(weight_TE.any(axis=0)).tolist():
        hue = hues.get(trace.names[e], _BACKBONE_HUE)
        depth_T, weight_T = depth_TE[:, e], weight_TE[:, e]
        panel.fill_between(x_T, depth_T - weight_T, depth_T, step="post", color=hue, linewidth=0)
    for name, start, _ in trace.segments:
        panel.plot([start, start], [0, -0.24], color=_INK, linewidth=1, clip_on=False)
        _write(panel, start + 0.005 * total, -0.13, name)
    names = [name for name in hues if name in trace.names]
    for i, name in enumerate(names):
        x = 0.01 + min(0.16, 0.85 / len(names)) * i
        _write(figure, x, 0.1, "■", color=hues[name], size=11)
        _write(figure, x + 0.017, 0.1, name, color=_QUIET)
    _write(figure, 0.99, 0.1, f"{total:,} bytes", ha="right", color=_QUIET)


def _clear(panel: Axes, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    """Leave nothing of a plot but what is drawn in it."""
    panel.set(xlim=xlim, ylim=ylim, xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def _write(
    place: Axes | SubFigure, x: float, y: float, text: str, size: float = 8.5, **look: Any
) -> None:
    place.text(x, y, text, size=size, va="center", parse_math=False, **look)


# The page, from top to bottom.


def _heading(result: Mapping[str, Any]) -> str:
    count, recovery, public = len(result["domains"]), result["recovery"], result["public"]
    held = sum(bool(item["passed"]) for item in result["properties"])
    tiles = {
        "recovery in mix mode": f"{recovery['mix']:.1%}",
        "recovery in safe mode": f"{recovery['safe']:.1%}",
        "bits on public text, safe mode": f"{public['safe'] / public['backbone'] - 1:+.1%}".replace(
            "-", "−"
        ),
        "properties that held": f"{held} of {len(result['properties'])}",
    }
    cells = "".join(
        f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items()
    )
    return f"""<header>
<h1>Experts that never met, plugged together</h1>
<p>{count} contributors each trained an expert for the frozen backbone
<b>{escape(result["backbone"])}</b>, alone, in a process that could read only its own text and the
backbone. A user then installed the experts by name. Nothing was trained jointly. Recovery is the
share of the gap between the backbone and each domain’s own expert that the composed model
closes.</p>
<div class="tiles">{cells}</div>
</header>"""


def _table(result: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{_label(method)}</th>' for method in _METHODS)
    body = ""
    for name, row in _rows(result):
        best = _best(row)
        cells = "".join(
            f"<td{' class=best' if method == best else ''}>{_bits(row.get(method))}</td>"
            for method in _METHODS
        )
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>\n'
    recovery = "".join(f"<td>{result['recovery'][mode]:.1%}</td>" for mode in ("mix", "safe"))
    return f"""<h2>Bits per byte on held-out text</h2>
<p class="quiet">Lower is better. The best composed model of each row stands out.</p>
<table>
<thead><tr><th scope="col">text</th>{head}</tr></thead>
<tbody>
{body}</tbody>
<tfoot><tr><th scope="row">recovery</th><td></td><td></td><td></td>{recovery}</tr></tfoot>
</table>"""


def _charts(result: Mapping[str, Any]) -> str:
    top = max(value for _, row in _rows(result) for value in row.values())
    charts = ""
    for name, row in _rows(result):
        bars = "".join(
            _bar(_label(method), row[method] / top, _bits(row[method]), method)
            for method in _METHODS
            if method in row
        )
        charts += f"<div><h3>{escape(name)}</h3>{bars}</div>\n"
    return f"""<h2>The same as bars</h2>
<p class="quiet">All on one scale. <em>average</em> averages the experts’ weights, <em>mix</em>
mixes what the trusted experts compute in one pass, <em>safe</em> mixes the probabilities of whole
paths, the backbone’s among them.</p>
<div class="charts">
{charts}</div>"""


def _bar(label: str, share: float, value: str, method: str = "") -> str:
    hue = f"--c: var(--{method}); " if method else ""
    return (
        f'<div class="bar {method}"><span title="{escape(label)}">{escape(label)}</span>'
        f'<span class="track"><i style="{hue}--share: {share:.4f}"></i>{value}</span></div>'
    )


def _experts(result: Mapping[str, Any], classes: Mapping[str, str]) -> str:
    items = "".join(
        f'<li class="{classes[name]}"><h3>{escape(name)} {escape(str(expert["version"]))}</h3>'
        f"<p>{escape(expert['description'])}</p>"
        f'<p class="quiet">{expert["size_bytes"] / 1e6:.1f} MB, {escape(expert["license"])}</p>'
        "</li>"
        for name, expert in result["experts"].items()
    )
    return f'<h2>The experts</h2>\n<ul class="experts">{items}</ul>'


def _traces_heading(classes: Mapping[str, str]) -> str:
    key = "".join(f'<span class="{c}">{escape(name)}</span>' for name, c in classes.items())
    return f"""<h2>Who was trusted, byte by byte</h2>
<p class="quiet">Documents spliced from held-out texts. Above each strip stands where a piece truly
came from; the router sees only the bytes. The height of a colour is the weight of that expert; the
text has the colour of the most trusted one, faint where nobody has most of the trust.</p>
<div class="key">{key}</div>"""


def _trace(number: int, trace: Trace, classes: Mapping[str, str], shown: int) -> str:
    total = len(trace.text)
    truth = "".join(
        f'<span style="width: {(end - start) / total:.3%}" title="{escape(name)}">'
        f"{escape(name)}</span>"
        for name, start, end in trace.segments
    )
    class_of = [classes.get(name, "e0") for name in trace.names]
    cut = f", the first {shown:,} bytes" if total > shown else ""
    return f"""<div class="trace">
<h3>Document {number}</h3>
<div class="small quiet">{trace.trust_in_truth():.0%} of the trust went to the expert of the true
domain</div>
<div class="truth">{truth}</div>
{draw_strip(trace, class_of)}
<div class="scale"><span>0</span><span>{total:,} bytes</span></div>
<details{" open" if number == 1 else ""}><summary>The text{cut}</summary>
<pre class="text">{colour_text(trace, class_of, shown)}</pre></details>
</div>"""


def _properties(result: Mapping[str, Any]) -> str:
    items = "".join(
        f'<li><span class="{"pass" if item["passed"] else "fail"}">'
        f"{'✓ holds' if item['passed'] else '✗ fails'}</span>"
        f"<div><h3>{escape(item['name'])}</h3><p>{escape(item['found'])}</p></div></li>\n"
        for item in result["properties"]
    )
    return f'<h2>What makes it open source</h2>\n<ul class="checks">\n{items}</ul>'


def _steps(result: Mapping[str, Any]) -> str:
    seconds = result["seconds"]
    longest = max(seconds.values(), default=0) or 1
    bars = "".join(_bar(step, value / longest, f"{value:.1f} s") for step, value in seconds.items())
    return f'<h2>Where the time went</h2>\n<div class="steps">{bars}</div>'


def _footer(result: Mapping[str, Any]) -> str:
    facts = {
        "machine": result["machine"],
        "date": result["date"],
        "time": f"{sum(result['seconds'].values()):.0f} s",
        "memory": f"{result['peak_rss_bytes'] / 1e9:.1f} GB at most",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<footer><dl>{rows}<dt>again</dt><dd><code>{_COMMAND}</code></dd></dl>\n</footer>"
