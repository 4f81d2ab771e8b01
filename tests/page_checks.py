"""Checks of HTML pages that several tests use."""

import re
from html.parser import HTMLParser

VOID_TAGS = {"meta", "img", "br"}


class PageParser(HTMLParser):
    """Collect tags with their attributes and the text; check that every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        """The text with single spaces."""
        return " ".join(" ".join(self.text).split())


def check_self_contained(html):
    """Check that nothing is fetched or executed, and that no ID occurs twice; return the parser."""
    page = PageParser(html)
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
        "img",
    }
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]?)", html)) <= {"#"}
    assert "prefers-color-scheme: dark" in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return page
