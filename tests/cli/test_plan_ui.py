"""``scalegpt plan --ui``: serves the page that `make site` has built, on this machine only."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from scalegpt.cli.main import main
from scalegpt.cli.plan import ui
from scalegpt.plan_page.form import POLICY

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "index.html").write_text("the page", encoding="utf-8")
    (folder / "main.mjs").write_text("", encoding="utf-8")
    monkeypatch.setattr(ui, "SITE", folder)
    return folder


@pytest.fixture
def served(site: Path) -> Iterator[Callable[..., tuple[str, "subprocess.Popen[str]"]]]:
    """Serve a folder with a small page; return the address and the process."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: str) -> tuple[str, "subprocess.Popen[str]"]:
        program = (
            "import sys; from pathlib import Path; from scalegpt.cli.plan import ui; from scalegpt.cli.main import main\n"
            f"ui.SITE = Path({str(site)!r}); sys.exit(main(['plan', '--ui', '--port', '0', *sys.argv[1:]]))"
        )
        started.append(
            subprocess.Popen(
                [sys.executable, "-u", "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                cwd=ROOT,
            )
        )  # fmt: skip
        assert started[-1].stdout is not None
        line = started[-1].stdout.readline()
        address = re.fullmatch(r"the planner is at (http://127\.0\.0\.1:\d+/\S*) \(Ctrl-C ends it\)\n", line)
        assert address is not None, line
        return address[1], started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_it_serves_the_page_until_ctrl_c(served: Callable[..., tuple[str, "subprocess.Popen[str]"]]) -> None:
    address, process = served()
    with urlopen(address) as page:
        assert page.read() == b"the page"
        assert page.headers["Content-Security-Policy"] == POLICY
    with urlopen(f"{address}main.mjs") as script:
        assert script.headers["Content-Type"] == "text/javascript"
    with pytest.raises(HTTPError):
        urlopen(f"{address}../pyproject.toml")
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (0, "", "")


def test_the_form_is_filled_from_the_flags(served: Callable[..., tuple[str, "subprocess.Popen[str]"]]) -> None:
    address, _ = served("--preset", "tiny", "--gpu", "8x H100", "--micro-batch", "4")
    assert address.partition("#")[2] == "preset=tiny&gpu=8x+H100&micro_batch=4"


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err.removeprefix("scalegpt plan: error: ")


def test_a_page_that_is_not_built_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ui, "SITE", tmp_path / "none")
    message = refusal(capsys, "--ui")
    assert message.startswith("ui: the page is not built; run `make site`")
    assert message.count("\n") == 1


@pytest.mark.usefixtures("site")
def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert "port must be a whole number" in refusal(capsys, "--ui", "--port", "http")
    assert "give --ui too" in refusal(capsys, "--port", "80")
    assert "html does not go with --ui" in refusal(capsys, "--ui", "--html", "page.html")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: " in refusal(capsys, "--ui", "--port", str(port))
