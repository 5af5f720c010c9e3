"""What every page of the project must be: well formed, and in need of nothing else."""

import re
from html.parser import HTMLParser

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open in ([], ["html", "body"], ["html"]), self.open  # HTML lets the last two stay open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def needs_nothing_else(source: str, page: Page, *, scripts: int = 0) -> None:
    """Check that a page loads nothing, from wherever, and runs nothing but that number of scripts that it holds itself."""
    assert page.tags.count("script") == scripts
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onclick", "onload"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|//|@import|url\(", source)
