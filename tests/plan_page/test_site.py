"""The built page in a real browser: it plans, needs nothing from elsewhere, and can be used by everyone.

``make site-test`` builds the page and runs these tests; without the page, Chromium, Playwright or axe-core they are skipped.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from scalegpt.cli.main import main
from scalegpt.cli.plan.ui import SITE, _Files

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")

AXE = SITE.parent / "npm" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.site,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="the page is not built; run `make site`"),
]

DOES_NOT_FIT = {"preset": "500M_1024", "gpu": "3060", "micro_batch": "64", "recompute": "none", "backend": "plain"}
BAD = {"n_embd": "100", "gpu": "h100"}
LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(SITE))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """The page in a tab; what the console says and which addresses are asked for is kept."""

    def __init__(self, browser: Any, address: str, values: dict[str, str] | None = None, **settings: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **settings)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.context.on("request", lambda request: self.requests.append(request.url))
        query = "&".join(f"{key}={value}" for key, value in (values or {}).items())
        self.page.goto(f"{address}#{query}" if query else address)
        self.wait()

    def wait(self) -> None:
        """Wait until the newest question is answered whole."""
        self.page.wait_for_timeout(150)  # longer than the page waits for the next key
        self.page.wait_for_selector("body[data-state=done], body[data-state=failed]", timeout=120_000)

    def text(self, selector: str) -> str:
        return str(self.page.text_content(selector))

    def set(self, name: str, value: str) -> None:
        field = self.page.locator(f"#f-{name}")
        if field.evaluate("field => field.tagName") == "SELECT":
            field.evaluate(
                "(field, value) => { field.value = value; field.dispatchEvent(new Event('input', {bubbles: true})); }",
                value,
            )
        else:
            field.evaluate("field => { const all = field.closest('details'); if (all) all.open = true; }")
            field.fill(value)
        self.wait()

    def saved(self) -> Any:
        """The plan that "Save as JSON" saves."""
        with self.page.expect_download() as download:
            self.page.click("#save")
        return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    tabs: list[Opened] = []

    def run(values: dict[str, str] | None = None, **settings: Any) -> Opened:
        tabs.append(Opened(browser, address, values, **settings))
        return tabs[-1]

    yield run
    for tab in tabs:
        tab.context.close()


# --- it plans --------------------------------------------------------------------------------------------------------


def test_a_change_is_answered_and_kept_in_the_address(opened: Any, address: str) -> None:
    tab = opened()
    assert "on 8 × H100 SXM" in tab.text("#summary h2")
    tab.set("gpus", "2")
    tab.set("preset", "350M_1024")
    tab.set("recompute", "full")
    assert "350M_1024 on 2 × H100 SXM" in tab.text("#summary h2")
    assert "--recompute full" in tab.text("#command pre")
    assert tab.page.url.startswith(f"{address}#")
    again = opened(dict(each.split("=") for each in tab.page.url.partition("#")[2].split("&")))
    assert again.text("main") == tab.text("main")
    assert again.page.input_value("#f-recompute") == "full"
    assert tab.said == again.said == []


def test_nothing_is_asked_for_from_elsewhere(opened: Any, address: str) -> None:
    tab = opened()
    tab.set("gpu", "4090")
    assert len(tab.requests) > 8
    assert [each for each in tab.requests if not each.startswith((address, "blob:"))] == []
    answer = tab.page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'blocked')")
    assert answer == "blocked"


@pytest.mark.parametrize(
    "values",
    [
        {"preset": "350M_1024", "gpu": "a100-40gb", "gpus": "4"},
        {"preset": "Qwen3-0.6B", "gpu": "4090", "optimizer": "muon", "tokens_per_step": "65536"},
        DOES_NOT_FIT,
    ],
)
def test_the_browser_computes_what_the_command_computes(
    opened: Any, values: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Only these differ: commands, since a browser has no installation; the remark on DeepSpeed; the last digits of times."""

    def figures(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: figures(each) for key, each in value.items() if key not in {"command", "notes"}}
        if isinstance(value, list):
            return [figures(each) for each in value]
        return float(f"{value:.12g}") if isinstance(value, float) else value

    main(["plan", "--json", *(f"--{name}={value}" for name, value in values.items())])
    assert figures(opened(values).saved()) == figures(json.loads(capsys.readouterr().out))


def test_a_config_json_is_read(opened: Any) -> None:
    tab = opened()
    file = {"name": "config.json", "mimeType": "application/json", "buffer": json.dumps(LLAMA).encode()}
    tab.page.set_input_files("#f-hf", file)
    tab.wait()
    assert "model on 8 × H100 SXM" in tab.text("#summary h2")
    assert "--n_layer 16" in tab.text("#command pre")
    assert (
        opened({"hf": json.dumps(LLAMA), "hf_name": "llama", "gpu": "h100"}).text("#summary h2").startswith("llama on")
    )
    tab.page.set_input_files("#f-hf", {**file, "buffer": b'{"model_type": "mamba"}'})
    tab.wait()
    assert "config.json: model_type 'mamba' is not supported" in tab.text("#e-hf")
    tab.page.click("#file button")
    tab.wait()
    assert tab.text("#error") == ""


def test_bad_input_is_shown_beside_its_field_and_mended(opened: Any) -> None:
    tab = opened()
    tab.set("n_embd", "100")
    tab.set("n_head", "7")
    message = "n_embd 100 is not divisible by n_head 7; n_head 5 would work"
    assert tab.text("#error") == tab.text("#e-n_embd") == message
    assert tab.page.get_attribute("#f-n_embd", "aria-invalid") == "true"
    assert tab.page.get_attribute("#error", "role") == "alert"
    assert not tab.page.is_enabled("#save")
    tab.set("n_embd", "")
    tab.set("n_head", "")
    assert tab.text("#error") == tab.text("#e-n_embd") == ""
    assert "It fits." in tab.text("#summary")
    assert tab.said == []


def test_a_setting_without_a_field_is_kept_or_refused(opened: Any) -> None:
    tab = opened({"preset": "tiny", "gpu": "4090", "beta2": "0.9"})
    assert "--beta2 0.9" in tab.text("#command pre")
    assert "beta2=0.9" in tab.text("#others")
    assert "did you mean" in opened({"preset": "tiny", "gpu": "4090", "micro_bach": "0.9"}).text("#error")


def test_the_link_and_the_command_are_copied(opened: Any) -> None:
    tab = opened(permissions=["clipboard-read", "clipboard-write"])
    for button, text in (("#copy-link", tab.page.url), ("#copy-command", tab.text("#command pre"))):
        tab.page.click(button)
        tab.page.wait_for_selector(f"{button}:text-is('Copied')")
        assert tab.page.evaluate("navigator.clipboard.readText()") == text


# --- everyone can use it ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed; run `make site`")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("values", [{}, DOES_NOT_FIT, BAD], ids=["fits", "does not fit", "bad input"])
def test_it_is_accessible_and_as_wide_as_the_screen(
    opened: Any, values: dict[str, str], width: int, scheme: str
) -> None:
    tab = opened(values, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    tab.page.evaluate(AXE.read_text(encoding="utf-8"))
    found = tab.page.evaluate("axe.run()")
    assert len(found["passes"]) > 20
    assert [(each["id"], each["impact"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    assert tab.said == []


def test_it_is_used_with_the_keyboard(opened: Any) -> None:
    tab = opened()
    seen = []
    for _ in range(40):
        tab.page.keyboard.press("Tab")
        seen.append(tab.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    for each in (
        "f-preset",
        "f-hf",
        "Shape",
        "f-gpu",
        "f-gpus",
        "Fix what the planner chooses",
        "copy-link",
        "copy-command",
    ):
        assert each in seen
    tab.page.focus("#f-gpus")
    tab.page.keyboard.press("Control+A")
    tab.page.keyboard.type("4")
    tab.wait()
    assert "on 4 × H100 SXM" in tab.text("#summary h2")
