"""A strict reader of the pages that runs write."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "line", "polyline", "circle"}


class Strict(HTMLParser):
    """Well-formed, and nothing from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.images, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        assert len(given) == len(attributes), f"{tag} has an attribute twice"
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "action", "data", "srcset"):
                assert value.startswith("data:"), (tag, value)
        if tag == "img":
            assert given["alt"]
            self.images.append(given)
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page: Path) -> Strict:
    found = Strict()
    text = page.read_text(encoding="utf-8")
    found.feed(text)
    found.close()
    assert not found.open and text.startswith("<!DOCTYPE html>")
    assert "http:" not in text and "https:" not in text and "url(" not in text
    return found
