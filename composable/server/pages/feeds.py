"""Atom feeds of releases.

References:
    RFC 4287.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

from starlette.responses import Response

_ATOM = "http://www.w3.org/2005/Atom"
START = "1970-01-01T00:00:00Z"


@dataclass(frozen=True, kw_only=True)
class News:
    """An entry of a feed.

    Args:
        name: The package.
        version: The version.
        published: When it was published.
        publisher: The account that published it.
        description: One line.
    """

    name: str
    version: str
    published: str
    publisher: str
    description: str


def make_feed(title: str, url: str, path: str, news: Iterable[News]) -> Response:
    """Return a feed, newest first.

    Args:
        title: Its title.
        url: The registry's URL.
        path: Path of the feed.
        news: The releases.
    """
    items = list(news)
    ElementTree.register_namespace("", _ATOM)
    feed = ElementTree.Element(f"{{{_ATOM}}}feed")
    _add(feed, "title", title)
    _add(feed, "id", url + path)
    _add(feed, "updated", items[0].published if items else START)
    _add(feed, "link", href=url + path, rel="self")
    for item in items:
        address = f"{url}/experts/{item.name}/{item.version}"
        entry = ElementTree.SubElement(feed, f"{{{_ATOM}}}entry")
        _add(entry, "title", f"{item.name} {item.version}")
        _add(entry, "id", address)
        _add(entry, "updated", item.published)
        _add(entry, "link", href=address)
        author = ElementTree.SubElement(entry, f"{{{_ATOM}}}author")
        _add(author, "name", item.publisher)
        _add(entry, "summary", item.description)
    data = ElementTree.tostring(feed, encoding="utf-8", xml_declaration=True)
    return Response(data, media_type="application/atom+xml")


def _add(parent: ElementTree.Element, tag: str, text: str = "", **attributes: str) -> None:
    element = ElementTree.SubElement(parent, f"{{{_ATOM}}}{tag}", attributes)
    # XML has no way to write control characters, and a description may have any.
    element.text = "".join(ch for ch in text if ch.isprintable()) or None
