"""``scalegpt plan --ui``: serves the planner as a page on this machine; the page computes its plans in the browser."""

from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from scalegpt.cli.output import show
from scalegpt.errors import InputError
from scalegpt.plan_page.form import POLICY

SITE = Path(__file__).resolve().parents[3] / "build" / "site"
"""The folder that ``make site`` writes, in a checkout of the repository."""

PORT = 8765
"""The port, unless ``--port`` gives another."""


class _Files(SimpleHTTPRequestHandler):
    """Serves the files of a folder, with a policy that forbids loading anything from elsewhere."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}  # noqa: RUF012

    def end_headers(self) -> None:
        """Add the headers that are sent with every file."""
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")  # after the next `make site` the new files are used
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for a request."""


def serve(values: Mapping[str, str], port: str | None = None) -> int:
    """Serve the page on 127.0.0.1 until Ctrl-C, and print its address. Return 0.

    Args:
        values: the first content of the form, as :func:`scalegpt.plan_page.browser.parts` takes it.
        port: the port; ``0``: any free one; None: :data:`PORT`.

    Raises:
        InputError: the page is not built, or the port is not a number or is not free.
    """
    if not (SITE / "index.html").is_file():
        raise InputError(
            "ui: the page is not built; run `make site` in a checkout of the repository, which needs Node.js "
            "(the installed package does not contain the page)"
        )
    if port is not None and not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise InputError(f"port must be a whole number from 0 to 65,535, not {port!r}")
    number = PORT if port is None else int(port)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", number), partial(_Files, directory=str(SITE)))
    except OSError as error:
        raise InputError(f"port {number}: {error.strerror}; give --port N, or --port 0 for a free one") from None
    with server:
        fragment = f"#{urlencode(values)}" if values else ""
        show(f"the planner is at http://127.0.0.1:{server.server_port}/{fragment} (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
