"""Measures the page in Chromium: how soon it can be used, and how soon a change is answered.

Usage: ``.venv/bin/python docs/planner_page/measure.py``, after ``make site``. It needs Playwright and Chromium.
"""

import shutil
import sys
from functools import partial
from http.server import ThreadingHTTPServer
from statistics import median
from threading import Thread

from playwright.sync_api import Browser, sync_playwright

from scalegpt.cli.plan.ui import SITE, _Files

STARTS = 5
CHANGES = (
    ("gpus", "4"), ("preset", "350M_1024"), ("gpu", "A100 40GB"), ("micro_batch", "4"), ("nodes", "2"), ("optimizer", "muon"),
    ("preset", "Qwen3-0.6B"), ("gpus", "2"), ("micro_batch", ""), ("backend", "fsdp"), ("preset", "Llama-3-8B"),
    ("gpu", "B200"), ("recompute", "full"), ("gpus", "8"), ("n_layer", "12"), ("precision", "fp32"),
)  # fmt: skip
"""Settings and the values that they are changed to, in this order; most of these plans are computed for the first time."""


def main() -> None:
    """Print the times."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or not (SITE / "index.html").is_file():
        sys.exit("measuring needs Chromium, and the page that `make site` builds")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(SITE))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            _measure(browser, f"http://127.0.0.1:{server.server_port}/")
            browser.close()
        server.shutdown()


def _measure(browser: Browser, address: str) -> None:
    starts = []
    for _ in range(STARTS):
        page = browser.new_context().new_page()  # a new context has an empty cache
        page.goto(address)
        page.wait_for_selector("body[data-state=done]", timeout=120_000)
        starts.append(page.evaluate("performance.getEntriesByName('answer-1')[0]").get("duration"))
        starts[-1] += page.evaluate("performance.getEntriesByName('asked-1')[0].startTime")
    typical, most = median(starts) / 1e3, max(starts) / 1e3
    print(f"from opening to the first answer: {typical:.2f} s (median of {STARTS}), {most:.2f} s at most")
    answers, wholes = [], []
    for name, value in CHANGES:
        page.evaluate(
            "([name, value]) => { const field = document.getElementById(`f-${name}`); document.body.dataset.state = '';"
            "field.value = value; field.dispatchEvent(new Event('input', {bubbles: true})); }",
            [name, value],
        )
        page.wait_for_selector("body[data-state=done]", timeout=120_000)
        newest = page.evaluate("performance.getEntriesByType('measure').slice(-2).map((each) => each.duration)")
        answers.append(newest[0])
        wholes.append(newest[1])
    for what, times in (("plan", answers), ("plan and all that varies it", wholes)):
        print(
            f"from a change to the {what}: {median(times):.0f} ms (median of {len(times)}), {max(times):.0f} ms at most"
        )


if __name__ == "__main__":
    main()
