"""The documentation site, as ``make docs`` builds it: all pages, all flags, and nothing fetched from elsewhere."""

import re
from argparse import SUPPRESS
from html import unescape
from pathlib import Path

import pytest

from scalegpt.cli.main import COMMANDS
from scalegpt.cli.train import make_parser

BUILT = Path(__file__).resolve().parents[2] / "build" / "docs"

pytestmark = pytest.mark.skipif(not (BUILT / "index.html").is_file(), reason="the site is not built: make docs")


def text_of(page: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", (BUILT / page).read_text(encoding="utf-8")))


def test_each_document_is_a_page() -> None:
    documents = {path.stem for path in (BUILT.parents[1] / "docs").glob("*.md")} - {"README"}
    assert documents
    assert documents <= {path.stem for path in BUILT.glob("*.html")}


def test_the_command_reference_has_every_command_and_every_flag_of_train() -> None:
    text = text_of("commands.html")
    flags = [flag for action in make_parser()._actions if action.help != SUPPRESS for flag in action.option_strings]
    assert len(flags) > 50
    assert [flag for flag in flags if flag not in text] == []
    html = (BUILT / "commands.html").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f'id="{name}"' not in html] == []


def test_the_python_reference_has_the_docstrings() -> None:
    text = text_of("python.html")
    assert [name for name in ("plan", "train", "load", "generate") if f"{name}(" not in text] == []
    assert not re.search(r":(func|data|class|attr):", text)
    assert "Choose the fastest way to train a model within a machine's memory" in text


def test_no_page_fetches_anything_from_elsewhere() -> None:
    pattern = re.compile(
        r"<(?:script|img|iframe|source)[^>]*src=\"(?:https?:)?//|<link[^>]*rel=\"(?:stylesheet|preconnect)\"[^>]*href=\"(?:https?:)?//"
    )
    pages = list(BUILT.rglob("*.html"))
    assert pages
    assert [page.name for page in pages if pattern.search(page.read_text(encoding="utf-8"))] == []
