import pytest

from composable.corpora.roff import strip_roff

PAGE = r""".\" a comment
.TH LS 1 "September 2022" "GNU coreutils 9.1"
.SH ÜBERSICHT
\fBls\fP [\fI\,OPTION\/\fP]…
.PP
Die Dateien \- alle.\" bis hier
.TP
\fB\-a\fP, \fB\-\-all\fP
Einträge nicht \f(CWignorieren\fR
.IP \(bu 2
ein Punkt
.BR ls (1),
.B "fett und" weiter
.if n \{\
.  in +2
verborgen
.\}
.de XX
auch verborgen
..
.TS
l l.
Zelle
.TE
.UR https://example.org
.UE
ein\ Wort, C:\e, \[aq]so\[aq], \h'4n'Ende\&.
"""
TEXT = """ÜBERSICHT
ls [OPTION]…

Die Dateien - alle.

-a, --all
Einträge nicht ignorieren

•
ein Punkt
ls(1),
fett und weiter
https://example.org
ein Wort, C:\\, 'so', Ende."""


def test_a_page_keeps_its_words_and_loses_its_markup():
    assert strip_roff(PAGE) == TEXT


def test_an_mdoc_page_is_not_read():
    assert strip_roff(".Dd January 1, 2020\n.Sh NAME\n.Nm ls") == ""


@pytest.mark.parametrize("text", ["", "plain\n\nwords", "a (b) [c] {d}"])
def test_plain_text_stays(text):
    assert strip_roff(text) == text


@pytest.mark.parametrize("source", [r".if t \{ never closed", ".de XX", ".TS", "\\", "\\f", "\\("])
def test_what_never_ends_ends_with_the_page(source):
    assert strip_roff(f"before\n{source}").startswith("before")
