"""Pages: self-contained, escaped, and written atomically."""

import pytest
from page_checks import check_self_contained

from dmt.report import html
from dmt.report.html import Card, Page, Sample
from dmt.report.svg import Series, draw_plot
from dmt.report.tables import Row, Table


def test_text_is_escaped(tmp_path):
    text = "<script>alert(1)</script>\"'&amp;\x00\ud800"
    page = Page(
        text, text, text, provenance=text, notes=[text], locations=[(text, text)], context=text
    )
    page.tables = [
        Table(text, (text,), [Row(text, (text,), text, best=frozenset({0}))], text, text),
        Table(text, (text,), [Row(text, (text,), text)], text),
    ]
    page.cards = [Card(text, text, text)]
    page.samples = [Sample(text, text, [(text, [(text, True), (text, False)])], text)]
    page.plots = [
        draw_plot(text, text, text, [Series(text, [1, 2], [3, 4], tips=[text, text])], text)
    ]
    html.write_page(page, tmp_path / "page.html")
    parser = check_self_contained((tmp_path / "page.html").read_bytes().decode())
    assert "".join(parser.text).count("<script>alert(1)</script>\"'&amp;") >= 15


def test_pages_are_written_atomically(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    file.write_text("before")
    with pytest.raises(Exception, match="no attribute"):
        html.write_page(Page("a", "b", "c", cards=["no card"]), file)
    assert file.read_text() == "before"

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "replace", fail)
    assert "no page.html (OSError" in html.write_report_safely(lambda: Page("a", "b", "c"), file)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
