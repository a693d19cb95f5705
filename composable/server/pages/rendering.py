"""Templates, and how sizes, dates and figures are written on pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse

from composable.files.reading import read_bytes
from composable.server.api.operation import base_url
from composable.server.pages import charts
from composable.server.services import Services

_HOME: Final = Path(__file__).parent
STYLE: Final = read_bytes(_HOME / "style.css")


def format_bytes(size: int) -> str:
    """Return a size with a decimal unit.

    Example:
        >>> format_bytes(2_444_040)
        '2.4 MB'
    """
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def format_percent(fraction: float | None) -> str:
    """Return a fraction as a percentage; a dash for none.

    Example:
        >>> format_percent(0.70792), format_percent(None)
        ('70.8%', '–')
    """
    return "–" if fraction is None else f"{100 * fraction:.1f}%"


def render(
    request: Request, template: str, context: dict[str, Any], status: int = 200
) -> HTMLResponse:
    """Return a page.

    Args:
        request: The request.
        template: Name of the template.
        context: What it shows.
        status: The HTTP status.
    """
    services: Services = request.app.state.services
    text = _TEMPLATES.get_template(template).render(
        title=services.settings.title, url=base_url(request), path=request.url.path, **context
    )
    return HTMLResponse(text, status, {"Cache-Control": "no-cache", "Vary": "Authorization"})


def _make_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HOME / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "percent": format_percent}
    environment.globals["charts"] = charts
    return environment


_TEMPLATES: Final = _make_environment()
