import gzip
import json

import pytest

from composable.corpora.extractors import EXTRACTORS, clean_text
from composable.errors import TextError


def write_files(root, texts):
    for name, words in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(words if isinstance(words, bytes) else words.encode())
    return root


def extract(name, root):
    return {document.id: document.text for document in EXTRACTORS[name](root)}


def test_clean_text():
    assert clean_text(b"\xef\xbb\xbf\r\n a\tb\0\x0c\r\rc\x7f\n\n", "") == " a\tb\n\nc\n"
    with pytest.raises(TextError, match="not UTF-8 at byte 1"):
        clean_text(b"a\xff", "file")


def test_speeches(tmp_path):
    files = {"package/data/1801_b.txt": "Second.", "package/data/1800_a.txt": "First.\r\n"}
    root = write_files(tmp_path, files | {"package/data/1800_a.json": "{}"})
    assert list(extract("speeches", root).items()) == [
        ("1800_a", "First.\n"),
        ("1801_b", "Second.\n"),
    ]


def test_python_modules_leave_out_tests_and_tables(tmp_path):
    kept = ["bisect.py", "json/decoder.py", "testing.py", "unittest/case.py"]
    left_out = [
        "test/test_a.py",
        "ctypes/test/a.py",
        "unittest/test/b.py",
        "idlelib/run.py",
        "encodings/cp037.py",
        "html/entities.py",
        "site-packages/numpy/a.py",
        "_sysconfigdata__linux.py",
        "config-3.11-x86_64-linux-gnu/c.py",
        "LICENSE.txt",
    ]
    root = write_files(tmp_path, dict.fromkeys(kept + left_out, "x = 1"))
    assert list(extract("python-modules", root)) == kept


def heading(rule, title):
    return f"$(\n{rule}\n{title:>20}\n{rule}\n$)\n\n"


CHAPTER, SECTION, PART = "#*" * 39 + "#", "=-" * 39 + "=", "-." * 39 + "-"
LEMMAS = "  lem $p |- ( ph -> ph ) $= ABC $.\n\n" * 40


def test_metamath_sections_run_from_heading_to_heading(tmp_path):
    pieces = [
        "$( preface $)\n",
        heading(SECTION, "Logic") + LEMMAS,
        heading(CHAPTER, "Sets") + heading(SECTION, "Unions") + LEMMAS,
        heading(PART, "Logic") + LEMMAS,
        heading(SECTION, "The end"),
    ]
    root = write_files(tmp_path, {"usr/share/metamath/databases/set.mm": "".join(pieces)})
    assert extract("metamath-sections", root) == {
        name: piece.strip("\n") + "\n"
        for name, piece in zip(["Logic", "Sets", "Logic (2)", "The end"], pieces[1:], strict=True)
    }


@pytest.mark.parametrize(
    ("name", "language", "translators"),
    [
        ("german", "de", "ÜBERSETZUNG"),
        ("spanish", "es", "TRADUCCIÓN"),
        ("french", "fr", "TRADUCTION"),
        ("polish", "pl", "TŁUMACZENIE"),
    ],
)
def test_manual_pages_lose_markup_links_and_translators(tmp_path, name, language, translators):
    page = f".TH A 1\n.SH BÉ\na \\- tut etwas\n.SH {translators}\nDie {translators} ist von N.\n"
    untranslated = ".SH BÉ\nwhich of the files and folders\n"
    pages = {
        f"man/{language}/man1/a.1.gz": gzip.compress(page.encode()),
        f"man/{language}/man1/u.1.gz": gzip.compress(untranslated.encode()),
        f"man/{language}/man8/m.8.gz": gzip.compress(b".Dd 2020\n.Sh NAME\n"),
        "man/it/man1/a.1.gz": gzip.compress(b".SH NOME\n"),
    }
    write_files(tmp_path / "usr/share", pages)
    (tmp_path / f"usr/share/man/{language}/man1/b.1.gz").symlink_to("a.1.gz")
    assert extract(f"{name}-manual-pages", tmp_path) == {"a.1": "BÉ\na - tut etwas\n"}


def test_rust_files_leave_out_tests_and_tables(tmp_path):
    kept = ["alloc/src/vec/mod.rs", "core/src/contest.rs", "core/src/lib.rs"]
    left_out = [
        "alloc/benches/vec.rs",
        "alloc/src/vec/tests.rs",
        "alloc/src/testing/rng.rs",
        "core/src/neon/shift_tests.rs",
        "core/src/neon/generated.rs",
        "core/src/unicode/unicode_data.rs",
        "core/tests/lib.rs",
        "portable-simd/crates/test_helpers/src/lib.rs",
        "core/README.md",
    ]
    write_files(tmp_path / "usr/src/rustc-1.0/library", dict.fromkeys(kept + left_out, "mod a;"))
    write_files(tmp_path / "usr/src/rustc-1.0/compiler", {"a.rs": "mod a;"})
    assert list(extract("rust-library", tmp_path)) == kept


def test_hol_light_leaves_out_other_licences_copies_and_lists(tmp_path):
    kept = ["Jordan/real_ext.ml", "Library/floor.ml", "sets.ml"]
    left_out = [
        "Jordan/float.ml",
        "Multivariate/complex_database.ml",
        "Multivariate/make.ml",
        "Proofrecording/diffs/sets.ml",
        "README",
        "pa_j_4.xx_7.xx.ml",
        "update_database_4.ml",
    ]
    write_files(tmp_path / "usr/share/hol-light", dict.fromkeys(kept + left_out, "let x = 1;;"))
    assert list(extract("hol-light", tmp_path)) == kept


def test_kernel_documents_leave_out_translations_and_other_licences(tmp_path):
    line = ".. SPDX-License-Identifier: {}\n"
    kept = {
        "a.rst": "Words\n",
        "mm/b.rst": line.format("GPL-2.0"),
        "mm/c.rst": line.format("(GPL-2.0+ OR CC-BY-4.0)"),
    }
    left_out = {
        "d.rst": line.format("GFDL-1.1-no-invariants-or-later"),
        "e.rst": line.format("(LGPL-2.1 OR BSD-2-Clause)"),
        "translations/it_IT/a.rst": "Parole\n",
        "f.txt": "Words\n",
    }
    pages = {f"{name}.gz": gzip.compress(text.encode()) for name, text in (kept | left_out).items()}
    write_files(tmp_path / "usr/share/doc/linux-doc-6.1/Documentation", pages)
    assert extract("kernel-documents", tmp_path) == kept


def test_postgresql_pages_lose_navigation_and_lists(tmp_path):
    page = (
        '<html><head><title>A</title></head><body><div class="navheader">Next</div>'
        '<h2>A</h2><p>One.</p><div class="toc"><p>B</p></div></body></html>'
    )
    left_out = ["index", "bookindex", "release-15-1", "errcodes-appendix"]
    pages = {f"{name}.html": page for name in ["sql-a", *left_out]}
    pages["empty.html"] = "<html><head><title>A</title></head><body></body></html>"
    write_files(tmp_path / "usr/share/doc/postgresql-doc-15/html", pages)
    assert extract("postgresql-pages", tmp_path) == {"sql-a": "A\n\nOne.\n"}


FREE = "Permission is granted to use, copy and change the software."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LGPL-2.1-only", FREE),
        ("GFDL-1.3", FREE),
        ("SMAIL-GPL", FREE),
        ("eCos-2.0", "redistribute it under the terms of the GNU General Public License"),
        ("LPPL-1.0", "copy verbatim copies of this license document,\n but"),
        ("Artistic-2.0", "changing it is not allowed."),
        ("CDL-1.0", "but changing or adding to it in any way is not permitted."),
        ("OSL-1.0", "granted to copy and distribute this license without modification."),
        ("QPL-1.0", "Everyone is permitted to copy and distribute this license document."),
        ("EPL-1.0", "the Agreement is copyrighted and may only be modified in the following"),
        ("BUSL-1.1", "License text copyright (c) 2017"),
        ("CAL-1.0", "The text of this license is released under the Creative Commons"),
        ("LAL-1.3", "Avec la présente licence, l'auteur autorise à copier ses œuvres créées."),
    ],
)
def test_licences_that_must_not_be_cut_are_left_out(tmp_path, name, words):
    licenses = {name: {"licenseText": words}, "Free": {"licenseText": FREE}}
    root = write_files(tmp_path, {"package/spdx-full.json": json.dumps(licenses)})
    assert extract("license-texts", root) == {"Free": FREE + "\n"}
