import io
import json
import platform
import shutil
import subprocess
import sysconfig
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composable.corpora.documents import Document, read_documents
from composable.corpora.recipe import (
    Recipe,
    Selection,
    Split,
    TextPackage,
    check_digests,
    cut_text,
    fetch_package,
    load_recipe,
    main,
    make_texts,
    select_documents,
)
from composable.errors import IntegrityError, TextError
from composable.interface.digest import digest_bytes


def write_package(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, words in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(words.encode())
            archive.addfile(member, io.BytesIO(words.encode()))
    return path


SPEECHES = {
    f"package/data/{year}_someone.txt": f"In the year {year} we met. " + f"{year}a {year}b. " * 9
    for year in range(1800, 1860)
}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A made-up npm package, and an `npm` on the path that serves it and nothing else."""
    package = write_package(tmp_path / "speeches-1.0.0.tgz", SPEECHES)
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(
        "#!/bin/sh\n"
        'if [ "$*" != "pack --silent @made-up/speeches@1.0.0" ]; then\n'
        '  echo "404 Not Found: $*" >&2; exit 1\n'
        "fi\n"
        f"/bin/cp {package} .\n"
    )
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(client.parent))
    return package


@pytest.fixture
def recipe(registry):
    return Recipe(
        source=TextPackage(
            kind="npm",
            package="@made-up/speeches",
            version="1.0.0",
            license="CC0-1.0",
            digest=digest_bytes(registry.read_bytes()),
        ),
        selection=Selection(extractor="speeches"),
        split=Split(salt="", heldout_fraction=0.2),
    )


def test_a_recipe_makes_the_same_bytes_again(recipe, registry, tmp_path):
    texts = make_texts(recipe, tmp_path / "a", tmp_path / "cache")
    assert {d.id for part in texts.values() for d in part} == {Path(n).stem for n in SPEECHES}
    digests = {
        part: digest_bytes((tmp_path / "a" / f"{part}.jsonl").read_bytes()) for part in texts
    }
    pinned = replace(recipe, digests=digests)
    make_texts(pinned, tmp_path / "b", tmp_path / "other cache")
    check_digests(pinned, tmp_path / "b")
    assert read_documents([tmp_path / "b" / "heldout.jsonl"]) == texts["heldout"]

    with pytest.raises(IntegrityError, match=digests["train"]):
        make_texts(
            replace(pinned, split=Split(salt="other", heldout_fraction=0.2)),
            tmp_path / "c",
            tmp_path / "cache",
        )


def test_a_package_is_fetched_once(recipe, registry, tmp_path, monkeypatch):
    first = fetch_package(recipe.source, tmp_path / "cache")
    monkeypatch.setenv("PATH", "")
    assert fetch_package(recipe.source, tmp_path / "cache") == first
    with pytest.raises(TextError, match="npm is not installed"):
        fetch_package(recipe.source, tmp_path / "empty cache")


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(recipe, registry, tmp_path):
    write_package(registry, {"package/data/1800_mallory.txt": "Trust me."})
    with pytest.raises(IntegrityError, match="expected " + str(recipe.source.digest)):
        fetch_package(recipe.source, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cached_file_that_changed_is_refused(recipe, tmp_path):
    fetch_package(recipe.source, tmp_path / "cache").write_bytes(b"something else")
    with pytest.raises(IntegrityError):
        fetch_package(recipe.source, tmp_path / "cache")


def test_what_the_client_says_is_passed_on(recipe, tmp_path):
    with pytest.raises(TextError, match="404 Not Found"):
        fetch_package(replace(recipe.source, version="2.0.0"), tmp_path / "cache")


def test_an_archive_cannot_write_outside(recipe, registry, tmp_path):
    write_package(registry, SPEECHES | {"../escaped.txt": "x"})
    source = replace(recipe.source, digest=digest_bytes(registry.read_bytes()))
    with pytest.raises(TextError, match="outside the destination"):
        make_texts(replace(recipe, source=source), tmp_path / "out", tmp_path / "cache")


def test_a_package_without_the_extractors_file_is_named(recipe, tmp_path):
    selection = Selection(extractor="license-texts")
    with pytest.raises(TextError, match=r"spdx-full\.json") as caught:
        make_texts(replace(recipe, selection=selection), tmp_path / "out", tmp_path / "cache")
    assert caught.value.where == "@made-up/speeches"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_unpacked(tmp_path):
    section = f"$(\n{'=-' * 20}\n  Sums\n{'=-' * 20}\n$)\n" + "  lem $p |- ph $= A $.\n\n" * 90
    tree = tmp_path / "tree"
    for name, words in {
        "DEBIAN/control": "Package: made-up\nVersion: 1\nArchitecture: all\n"
        "Maintainer: composable contributors <nobody@example.org>\nDescription: made up\n",
        "usr/share/metamath/databases/set.mm": section,
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(words)
    deb = tmp_path / "made-up.deb"
    subprocess.run(["dpkg-deb", "--build", tree, deb], check=True, capture_output=True)
    digest = digest_bytes(deb.read_bytes())
    cached = tmp_path / "cache" / digest.replace(":", "-") / deb.name
    cached.parent.mkdir(parents=True)
    deb.rename(cached)
    recipe = Recipe(
        source=TextPackage(
            kind="debian", package="made-up", version="1", license="CC0-1.0", digest=digest
        ),
        selection=Selection(extractor="metamath-sections"),
        split=Split(salt="", heldout_fraction=0.5),
    )
    texts = make_texts(recipe, tmp_path / "out", tmp_path / "cache")
    documents = [document for part in texts.values() for document in part]
    assert documents == [Document("Sums", section.strip("\n") + "\n")]


@pytest.fixture
def standard_library(tmp_path, monkeypatch):
    """A made-up standard library in the place of the interpreter's."""
    for i in range(9):
        file = tmp_path / "lib" / f"module{i}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"value{i} = {i}\n")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.__getitem__)


def test_the_library_of_another_python_warns_and_still_makes_text(standard_library, tmp_path):
    recipe = Recipe(
        source=TextPackage(kind="stdlib", package="python", version="3.0.0", license="PSF-2.0"),
        selection=Selection(extractor="python-modules"),
        split=Split(salt="", heldout_fraction=0.5),
        digests={"train": digest_bytes(b"")},
    )
    with pytest.warns(UserWarning, match=r"the recipe is for Python 3\.0\.0"):
        texts = make_texts(recipe, tmp_path / "out")
    assert sum(map(len, texts.values())) == 9

    this = replace(recipe.source, version=platform.python_version())
    with pytest.raises(IntegrityError):
        make_texts(replace(recipe, source=this), tmp_path / "out")


@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(4, 40))
def test_a_cut_is_a_start_within_the_limit(text, max_bytes):
    cut = cut_text(text, max_bytes)
    assert text.startswith(cut)
    assert len(cut.encode()) <= max_bytes
    assert cut == text if len(text.encode()) <= max_bytes else cut


def test_a_cut_prefers_blank_lines_then_lines():
    assert cut_text("one\n\ntwo\nthree", 11) == "one\n\ntwo\n"
    assert cut_text("one\ntwo\n\nthree", 11) == "one\ntwo\n"
    assert cut_text("☃☃☃", 5) == "☃"


def test_selection_limits():
    documents = [Document(f"{i:02}", f"{i} " * (40 + i)) for i in range(40)]
    documents += [Document("short", "x"), Document("copy", documents[3].text)]
    split = Split(salt="", heldout_fraction=0.5, family_pattern="^[01]")
    limits = {"min_document_bytes": 90, "max_document_bytes": 120, "max_family_bytes": 500}
    selection = Selection(extractor="speeches", **limits, total_bytes=1_500)
    chosen, families = select_documents(documents, selection, split)
    sizes = {document.id: len(document.text.encode()) for document in chosen}
    assert 1_500 - 120 < sum(sizes.values()) <= 1_500
    assert all(90 <= size <= 120 for size in sizes.values())
    assert sum(size for name, size in sizes.items() if families[name] == families["10"]) <= 500
    assert list(sizes) == sorted(sizes)
    assert len({document.text for document in chosen}) == len(chosen)
    assert select_documents(documents[::-1], selection, split)[0] == chosen

    with pytest.raises(TextError, match="none of 42 documents has 9999 bytes"):
        none = Selection(extractor="speeches", min_document_bytes=9_999)
        select_documents(documents, none, split)


GOOD = """
[source]
kind = "npm"
package = "p"
version = "1"
license = "MIT"
digest = "sha256:%s"
[selection]
extractor = "speeches"
[split]
salt = ""
heldout_fraction = 0.1
""" % ("0" * 64)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('kind = "npm"', 'kind = "http"', "source.kind"),
        ('package = "p"', 'package = "--registry=x"', "source.package"),
        ('version = "1"', 'version = "^1"', "source.version"),
        ('digest = "sha256:', 'digest = "md5:', "source.digest"),
        ('license = "MIT"', "license = 5", "source.license"),
        ('license = "MIT"', 'licence = "MIT"', "source.licence"),
        ('salt = ""', "", "split"),
        ('extractor = "speeches"', 'extractor = "os.system"', "selection.extractor"),
        ("[selection]", "[selection]\ntotal_bytes = 0", "selection.total_bytes"),
        ("[split]", '[digests]\nextra = "sha256:"\n[split]', "digests.extra"),
        ("[split]", "digests = 3\n[split]", "selection.digests"),
        ("[source]", "digests = 3\n[source]", "digests"),
        ("[source]", "[source", None),
    ],
)
def test_a_bad_field_is_named(tmp_path, old, new, where):
    path = tmp_path / "recipe.toml"
    path.write_text(GOOD)
    load_recipe(path)
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(TextError) as caught:
        load_recipe(tmp_path)
    assert caught.value.where == (f"{path}.{where}" if where else str(path))


def test_the_command_prints_the_digests(recipe, tmp_path, capsys):
    source = recipe.source
    text = GOOD.replace("0" * 64, str(source.digest).removeprefix("sha256:"))
    text = text.replace('"p"', f'"{source.package}"').replace('"1"', f'"{source.version}"')
    (tmp_path / "recipe.toml").write_text(text)
    arguments = [str(tmp_path), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "c")]
    assert main(arguments) == 0
    printed = dict(
        line.split("  #")[0].split(" = ") for line in capsys.readouterr().out.split("\n")[:-1]
    )
    for part, digest in printed.items():
        data = (tmp_path / "out" / f"{part}.jsonl").read_bytes()
        assert json.loads(digest) == digest_bytes(data)
    assert main([str(tmp_path / "nowhere"), *arguments[1:]]) == 1
    assert "nowhere" in capsys.readouterr().err
