"""The demo's report: one HTML page without scripts and with nothing to fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from composable.demo.report import (
    METHODS,
    best_method,
    expert_hues,
    format_bits,
    method_label,
    text_rows,
)
from composable.demo.trace import Trace, colour_text, draw_strip

_COMMAND: Final = "composable demo"


# Bytes of text on the page in all, which keeps the file small.
_SHOWN_BYTES: Final = 9_000


def write_report(path: Path, result: Mapping[str, Any], traces: Sequence[Trace]) -> None:
    """Write the page: one HTML file that fetches nothing.

    Args:
        path: The file.
        result: The demo's figures.
        traces: Documents to show byte by byte; the text is cut where the page would grow large.
    """
    hues = expert_hues(result)
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
    head = "".join(f'<th scope="col">{method_label(method)}</th>' for method in METHODS)
    body = ""
    for name, row in text_rows(result):
        best = best_method(row)
        cells = "".join(
            f"<td{' class=best' if method == best else ''}>{format_bits(row.get(method))}</td>"
            for method in METHODS
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
    top = max(value for _, row in text_rows(result) for value in row.values())
    charts = ""
    for name, row in text_rows(result):
        bars = "".join(
            _bar(method_label(method), row[method] / top, format_bits(row[method]), method)
            for method in METHODS
            if method in row
        )
        charts += f"<div><h3>{escape(name)}</h3>{bars}</div>\n"
    return f"""<h2>The same as bars</h2>
<p class="quiet">All on one scale. <em>average</em> averages the experts’ weights, <em>mix</em>
mixes in one pass the outputs of the experts that a token is routed to,
<em>safe</em> mixes the probabilities of whole
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
    return f"""<h2>Router weights, byte by byte</h2>
<p class="quiet">Documents spliced from held-out texts. Above each strip stands where a piece truly
came from; the router sees only the bytes. The height of a colour is the weight of that expert; the
text has the colour of the expert with the largest weight, faint where no weight is large.</p>
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
<div class="small quiet">{trace.weight_on_truth():.0%} of the router weight
went to the expert of the true domain</div>
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
