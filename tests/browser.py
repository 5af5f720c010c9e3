"""Pages in a real browser. Skips where Chromium or playwright is missing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

AXE = Path(os.environ.get("AXE_CORE", Path(__file__).resolve().parents[1] / "node_modules" / "axe-core" / "axe.min.js"))
"""The accessibility checker axe-core, from npm."""


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, as a context manager of playwright's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def findings(page: Any) -> list[str]:
    """What axe-core finds on a page, in words; none where axe-core is not installed."""
    if not AXE.is_file():
        return []
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    return [f"{each['impact']}: {each['help']}: {each['nodes'][0]['html'][:100]}" for each in found]
