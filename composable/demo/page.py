"""The demo's report: one HTML page without scripts that fetches nothing.

Its text and structure are in `page.html` and `trace.html`, its style in `page.css`. Jinja escapes
every value, so names and texts cannot add markup, and what a browser would act on or hide is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from composable.demo.report import (
    METHODS,
    best_method,
    expert_hues,
    format_bits,
    method_label,
    text_rows,
)
from composable.demo.result import DemoResult
from composable.demo.trace import Trace, split_runs, stack_layers
from composable.printable import printable

# Bytes of text on the page in all, which keeps the file small.
_SHOWN_BYTES: Final = 9_000


def write_report(path: Path, result: DemoResult, traces: Sequence[Trace]) -> None:
    """Write the page.

    Args:
        path: The file.
        result: The demo's results.
        traces: Documents to show byte by byte; the text is cut where the page would grow large.
    """
    rows = text_rows(result)
    hues = expert_hues(result.experts)
    classes = {name: f"e{e}" for e, name in enumerate(hues)}
    shown = _SHOWN_BYTES // max(len(traces), 1)
    page = _ENVIRONMENT.get_template("page.html").render(
        result=result,
        style=Markup(_read_source("page.css")),
        hues=hues,
        classes=classes,
        tiles=_list_tiles(result),
        methods=METHODS,
        rows=rows,
        most_bits=max(bits for _, row in rows for bits in row.values()),
        longest_step=max(result.seconds.values(), default=0) or 1,
        traces=[_describe_trace(trace, classes, shown) for trace in traces],
        shown=shown,
    )
    path.write_text(page, encoding="utf-8")


def draw_strip(trace: Trace, class_of: Sequence[str]) -> Markup:
    """Return the router weights of a document as stacked layers, in SVG.

    Args:
        trace: The document and its weights.
        class_of: Style class of each name's layer.

    Example:
        >>> import numpy as np
        >>> trace = Trace(b"ab", (("a", 0, 2),), ("backbone", "a"), np.array([[1.0, 0.0]] * 2))
        >>> draw_strip(trace, ("e0", "e1")).partition(">")[2]
        Markup('<path class="e0" d="M0 0V100H2V0Z"/></svg>')
    """
    strip = stack_layers(trace)
    return _call_macro("strip", strip.layers, strip.width, class_of)


def colour_text(trace: Trace, class_of: Sequence[str], n_bytes: int) -> Markup:
    """Return the text of a document in HTML, each character in a run of one style class.

    The class is that of the largest weight; "uncertain" is added where no weight is large. The
    title of a run lists the weights. A label marks the start of each segment.

    Args:
        trace: The document and its weights.
        class_of: Style class of each name's runs.
        n_bytes: Length of the text to return.

    Example:
        >>> import numpy as np
        >>> trace = Trace(b"<b", (("a", 0, 2),), ("backbone", "a"), np.array([[0.0, 1.0]] * 2))
        >>> colour_text(trace, ("e0", "e1"), 2)
        Markup('<q>a</q><b class="e1" title="a 100%">&lt;b</b>')
    """
    return _call_macro("text", split_runs(trace, n_bytes), class_of)


def _list_tiles(result: DemoResult) -> dict[str, str]:
    """Return the figures at the top of the page by label."""
    change = result.public.safe / result.public.backbone - 1
    held = sum(item.passed for item in result.properties)
    return {
        "recovery in mix mode": f"{result.recovery.mix:.1%}",
        "recovery in safe mode": f"{result.recovery.safe:.1%}",
        "bits on public text, safe mode": f"{change:+z.2%}".replace("-", "−"),
        "properties that held": f"{held} of {len(result.properties)}",
    }


def _describe_trace(trace: Trace, classes: Mapping[str, str], shown: int) -> dict[str, Any]:
    """Return what the page shows of a document."""
    n_bytes = len(trace.text)
    class_of = [classes.get(name, "e0") for name in trace.names]
    return {
        "n_bytes": n_bytes,
        "weight_on_truth": trace.weight_on_truth(),
        "segments": [(name, (end - start) / n_bytes) for name, start, end in trace.segments],
        "strip": draw_strip(trace, class_of),
        "coloured_text": colour_text(trace, class_of, shown),
    }


def _call_macro(name: str, *arguments: Any) -> Markup:
    macro = getattr(_ENVIRONMENT.get_template("trace.html").module, name)
    return Markup(macro(*arguments))


def _read_source(name: str) -> str:
    """Return a file of this package."""
    return resources.files("composable.demo").joinpath(name).read_text(encoding="utf-8")


def _make_environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read_source),
        autoescape=True,
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "best_method": best_method,
        "format_bits": format_bits,
        "method_label": method_label,
    }
    return environment


_ENVIRONMENT: Final = _make_environment()
