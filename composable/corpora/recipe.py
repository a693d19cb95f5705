"""Recipes: where an expert's text comes from, pinned, and how it is made again to the byte.

A recipe names a package, its version and its digest. It is executed in one line of steps: fetch
the package with its own client, check the digest, unpack, extract documents, cut them, choose some,
hold families out, write JSON lines, check the digests of what was written.

    python -m composable.corpora.recipe experts/set-mm --out text

No text is ever fetched from a page, and no code of a package is run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from platform import python_version
from typing import Any, get_type_hints

from platformdirs import user_cache_path

from composable.corpora.documents import (
    Document,
    hash_fraction,
    split_documents,
    truncate_utf8,
    write_documents,
)
from composable.corpora.extractors import EXTRACTORS
from composable.corpora.near_duplicates import find_families
from composable.errors import ComposableError, ComposableWarning, IntegrityError, TextError
from composable.files.blobs import digest_file
from composable.files.reading import read_bytes
from composable.files.text import decode_text
from composable.interface.digest import is_digest

# How each kind of package is downloaded into the working directory, by its own client.
_CLIENTS: Mapping[str, Sequence[str]] = {
    "npm": ("npm", "pack", "--silent", "{package}@{version}"),
    "debian": ("apt-get", "download", "{package}={version}"),
    "pypi": (sys.executable, "-m", "pip", "download", "--no-deps", "{package}=={version}"),
}
# Never an option of the client: a name starts with a letter, a digit or the @ of an npm scope.
_PACKAGE = re.compile(r"@?[A-Za-z0-9][A-Za-z0-9._/+-]*")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~:-]*")
_PARTS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class TextPackage:
    """The package that the text comes from.

    Args:
        kind: `npm`, `debian`, `pypi`, or `stdlib` for the running interpreter's own library.
        package: The package's name in its registry.
        version: The exact version; for `stdlib` the version of Python.
        license: SPDX id of the licence of the text (not of the package's code).
        digest: `sha256:` digest of the downloaded file; none for `stdlib`.
    """

    kind: str
    package: str
    version: str
    license: str
    digest: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in {*_CLIENTS, "stdlib"}:
            expected = ", ".join([*_CLIENTS, "stdlib"])
            raise TextError(f"{self.kind!r}, expected one of {expected}", where="kind")
        if not _PACKAGE.fullmatch(self.package):
            raise TextError(f"{self.package!r} is not a package name", where="package")
        if not _VERSION.fullmatch(self.version):
            raise TextError(f"{self.version!r} is not an exact version", where="version")
        if self.kind != "stdlib" and not is_digest(self.digest):
            raise TextError(f"{self.digest!r}, expected sha256:<64 hex digits>", where="digest")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which documents are used, and how much of each.

    Args:
        extractor: A name in `EXTRACTORS`.
        min_document_bytes: Shorter documents are left out.
        max_document_bytes: Longer ones are cut, at a blank line if there is one near.
        max_family_bytes: How much of one family is used.
        total_bytes: How much is used altogether; documents are drawn in an order by hash.
    """

    extractor: str
    min_document_bytes: int = 1
    max_document_bytes: int = sys.maxsize
    max_family_bytes: int = sys.maxsize
    total_bytes: int = sys.maxsize

    def __post_init__(self) -> None:
        if self.extractor not in EXTRACTORS:
            expected = ", ".join(EXTRACTORS)
            raise TextError(f"{self.extractor!r}, expected one of {expected}", where="extractor")
        for name in ("max_document_bytes", "max_family_bytes", "total_bytes"):
            if getattr(self, name) < max(self.min_document_bytes, 1):
                raise TextError(f"{getattr(self, name)} is below min_document_bytes", where=name)


@dataclass(frozen=True, kw_only=True)
class Split:
    """How documents are held out; see `split_documents` and `find_families`.

    Args:
        salt: Another salt is another draw of documents and another split.
        heldout_fraction: Expected share of families to hold out.
        family_pattern: A regular expression on ids: the same find is the same family.
    """

    salt: str
    heldout_fraction: float
    family_pattern: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a text.

    Args:
        source: The package.
        selection: Which of its documents.
        split: Which of them are held out.
        digests: `train` and `heldout` to the digest of the file that must come out; empty in a
            new recipe.
    """

    source: TextPackage
    selection: Selection
    split: Split
    digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.digests, Mapping):
            raise TextError(f"{self.digests!r}, expected a table", where="digests")
        for part, digest in self.digests.items():
            if part not in _PARTS or not is_digest(digest):
                raise TextError(
                    f"{digest!r}, expected sha256:<64 hex digits> of one of {', '.join(_PARTS)}",
                    where=f"digests.{part}",
                )


def shipped_folder(name: str) -> Path:
    """Return the folder of a first-party expert: in the installed package, or the checkout.

    Raises:
        TextError: If none of that name ships with the project.
    """
    package = Path(__file__).parents[1]
    for root in (package / "experts", package.parent / "experts"):
        if (root / name).is_dir():
            return root / name
    raise TextError(f"no first-party expert {name!r} ships with this installation")


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        path: A `recipe.toml`, or the folder that holds one.

    Raises:
        TextError: The file is missing or not TOML, or a field is missing, unknown or invalid.
    """
    path = Path(path) / "recipe.toml" if Path(path).is_dir() else Path(path)
    try:
        table = tomllib.loads(decode_text(read_bytes(path), str(path)))
    except (OSError, ValueError) as error:
        raise TextError(f"cannot be read as a recipe: {error}", where=str(path)) from error
    try:
        recipe: Recipe = _build(Recipe, table)
    except ComposableError as error:
        raise error.within(str(path)) from None
    return recipe


def make_texts(
    recipe: Recipe, out: str | Path, cache: str | Path | None = None
) -> dict[str, list[Document]]:
    """Execute a recipe: write `train.jsonl` and `heldout.jsonl`.

    Args:
        recipe: What to make.
        out: The folder to write into, made if it is missing.
        cache: Folder for downloaded packages; the user's cache folder if not given.

    Returns:
        `train` and `heldout` to the documents written.

    Raises:
        TextError: The package cannot be fetched or holds no usable text.
        IntegrityError: The package is not the one that the recipe names, or what was written is
            not what the recipe states. For the standard library of another version of Python the
            latter is a warning.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            root = _open_source(recipe.source, Path(scratch), cache)
            documents = list(EXTRACTORS[recipe.selection.extractor](root))
        except (OSError, tarfile.TarError, zipfile.BadZipFile, subprocess.SubprocessError) as error:
            raise TextError(f"cannot be extracted: {error}", where=recipe.source.package) from error
    chosen, families = select_documents(documents, recipe.selection, recipe.split)
    parts = split_documents(chosen, recipe.split.heldout_fraction, recipe.split.salt, families)
    texts = dict(zip(_PARTS, parts, strict=True))
    for part, part_documents in texts.items():
        write_documents(Path(out) / f"{part}.jsonl", part_documents)
    try:
        check_digests(recipe, out)
    except IntegrityError as error:
        if recipe.source.kind != "stdlib" or recipe.source.version == python_version():
            raise
        warnings.warn(
            ComposableWarning(
                f"{error.where}: {error.message}; the recipe is for Python "
                f"{recipe.source.version}, this is {python_version()}: the text is as good, but "
                "figures on it do not compare"
            ),
            stacklevel=2,
        )
    return texts


def select_documents(
    documents: Sequence[Document], selection: Selection, split: Split
) -> tuple[list[Document], dict[str, str]]:
    """Cut documents and draw some, in an order by hash, so that they spread over the source.

    Of documents with the same words one is drawn.

    Args:
        documents: Everything that was extracted.
        selection: The limits.
        split: The salt of the order, and what makes a family.

    Returns:
        The documents drawn, in order of their ids, and the family of each of `documents`.

    Raises:
        TextError: No document is long enough.
    """
    usable = [
        Document(document.id, cut_text(document.text, selection.max_document_bytes))
        for document in documents
        if len(document.text.encode()) >= selection.min_document_bytes
    ]
    families = find_families(usable, split.family_pattern)
    chosen, total, used, seen = list[Document](), 0, Counter[str](), set[str]()
    for document in sorted(usable, key=lambda d: hash_fraction(d.id, f"{split.salt}/order")):
        size, family = len(document.text.encode()), families[document.id]
        words = " ".join(document.text.split())
        if words in seen or used[family] + size > selection.max_family_bytes:
            continue
        if total + size > selection.total_bytes:
            break
        chosen.append(document)
        total += size
        used[family] += size
        seen.add(words)
    if not chosen:
        raise TextError(
            f"none of {len(documents)} documents has {selection.min_document_bytes} bytes or more"
        )
    return sorted(chosen, key=lambda d: d.id), families


def cut_text(text: str, max_bytes: int) -> str:
    """Return the start of `text`, at most `max_bytes` of UTF-8.

    The cut is after the last blank line of the second half, else after the last line, else
    between two characters.
    """
    data = text.encode()
    if len(data) <= max_bytes:
        return text
    data = data[:max_bytes]
    end = data.rfind(b"\n\n", max_bytes // 2) + 1 or data.rfind(b"\n") + 1 or max_bytes
    return truncate_utf8(data, end).decode()


def check_digests(recipe: Recipe, folder: str | Path) -> None:
    """Check `train.jsonl` and `heldout.jsonl` in `folder` against the recipe.

    Raises:
        IntegrityError: A file is not the one that the recipe names.
    """
    for part, expected in recipe.digests.items():
        path = Path(folder) / f"{part}.jsonl"
        found = digest_file(path)
        if found != expected:
            raise IntegrityError(f"{found}, expected {expected}", where=str(path))


def fetch_package(source: TextPackage, cache: str | Path | None = None) -> Path:
    """Return the downloaded file of a package, from the cache if it is there.

    Args:
        source: The package; not `stdlib`.
        cache: Folder of downloads; the user's cache folder if not given.

    Raises:
        TextError: The package's client is missing or fails.
        IntegrityError: The downloaded file is not the one that the recipe names.
    """
    cache = Path(cache) if cache else user_cache_path("composable") / "packages"
    folder = cache / str(source.digest).replace(":", "-")
    for file in sorted(folder.glob("[!.]*")):
        _check_package(file, source)
        return file
    names = {"package": source.package, "version": source.version}
    command = [word.format(**names) for word in _CLIENTS[source.kind]]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        try:
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise TextError(f"{command[0]} is not installed", where=" ".join(command)) from error
        except subprocess.CalledProcessError as error:
            raise TextError(error.stderr.strip(), where=" ".join(command)) from error
        files = sorted(Path(scratch).iterdir())
        if len(files) != 1:
            raise TextError(f"brought {len(files)} files, expected one", where=" ".join(command))
        _check_package(files[0], source)
        folder.mkdir(exist_ok=True)
        return files[0].replace(folder / files[0].name)


def _check_package(file: Path, source: TextPackage) -> None:
    found = digest_file(file)
    if found != source.digest:
        raise IntegrityError(
            f"{source.package} {source.version} is {found}, expected {source.digest}",
            where=str(file),
            hint="the registry serves another file than the recipe names; do not use it",
        )


def _open_source(source: TextPackage, scratch: Path, cache: str | Path | None) -> Path:
    """Return a folder with the source's files; a package is unpacked into `scratch`."""
    if source.kind == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    package = fetch_package(source, cache)
    if source.kind == "debian":
        subprocess.run(["dpkg-deb", "--extract", package, scratch], check=True)
    elif package.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(package) as archive:
            archive.extractall(scratch)
    else:
        with tarfile.open(package) as archive:
            archive.extractall(scratch, filter="data")
    return scratch


def _build(kind: type[Any], table: Mapping[str, Any]) -> Any:
    """Return the dataclass `kind` from a TOML table, its nested tables too."""
    known = {f.name for f in fields(kind)}
    if unknown := sorted(table.keys() - known):
        raise TextError(f"unknown, expected one of {sorted(known)}", where=unknown[0])
    values: dict[str, Any] = {}
    for name, value in table.items():
        expected = get_type_hints(kind)[name]
        if expected in (TextPackage, Selection, Split) and isinstance(value, dict):
            try:
                values[name] = _build(expected, value)
            except ComposableError as error:
                raise error.within(name) from None
        elif expected == Mapping[str, str] or isinstance(value, expected):
            values[name] = value
        else:
            raise TextError(f"{value!r}, expected {expected}", where=name)
    try:
        return kind(**values)
    except TypeError as error:
        raise TextError(str(error)) from error


def _describe(part: str, documents: Sequence[Document], path: Path) -> str:
    size = sum(len(document.text.encode()) for document in documents)
    return f'{part} = "{digest_file(path)}"  # {len(documents)} documents, {size:,} B'


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute a recipe from the command line; print the digests in the recipe's format."""
    parser = argparse.ArgumentParser(prog="composable.corpora.recipe", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a recipe.toml or the folder that holds it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--cache", type=Path, help="folder for downloaded packages")
    options = parser.parse_args(arguments)
    try:
        texts = make_texts(load_recipe(options.recipe), options.out, options.cache)
    except ComposableError as error:
        print(error, file=sys.stderr)
        return 1
    for part, documents in texts.items():
        print(_describe(part, documents, options.out / f"{part}.jsonl"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
