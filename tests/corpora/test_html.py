import pytest

from composable.corpora.html import strip_html

PAGE = """<!DOCTYPE html><html><head><title>A</title><meta name="b" /><style>p {}</style></head>
<body><div class="menu wide">Up <img src="a"> <div>Next</div></div><h2>8.1. Types</h2><p>
   Two   <code>words</code>,&nbsp;&lt;a&gt; and
   <em>more</em>.
  </p><pre class="code">
SELECT <em>a</em>
    FROM b;

  -- end
</pre><dl><dt><span>term</span></dt><dd><p>meaning</p></dd></dl>
<table><tr><th>Name</th><th>Size</th></tr><tr><td>int</td><td>4 <br/>bytes</td></tr></table>
<script>if (a < b) { c(); }</script></body></html>
"""
TEXT = """8.1. Types

Two words, <a> and
more.

SELECT a
    FROM b;

  -- end

term

meaning

Name\tSize
int\t4
bytes"""


def test_a_page_keeps_its_words_and_loses_its_markup():
    assert strip_html(PAGE, ["menu"]) == TEXT


def test_without_classes_to_leave_out_everything_is_kept():
    assert strip_html(PAGE) == "Up\n\nNext\n\n" + TEXT


@pytest.mark.parametrize("text", ["", "plain words", "one\ntwo"])
def test_plain_text_stays(text):
    assert strip_html(text) == text


@pytest.mark.parametrize("source", ["</p>", "</pre></pre>", "<pre>", "<a href=", "&#x110000;"])
def test_what_is_never_opened_or_closed_is_read(source):
    assert strip_html(f"before<p>{source}").startswith("before")
