"""Serves the page of a report on 127.0.0.1, and makes it again whenever a run's files have changed."""

from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from scalegpt.errors import InputError, RunError
from scalegpt.training.runs.records import RunRecords
from scalegpt.training.runs.report.page import report_page
from scalegpt.training.runs.report.read import read_run

HOST = "127.0.0.1"


def version(runs: Sequence[RunRecords]) -> str:
    """A text that changes with the files that a report shows."""
    parts = []
    for run in runs:
        for path in (run.metrics, run.samples, run.status):
            try:
                found = path.stat()
                parts.append(f"{found.st_size}.{found.st_mtime_ns}")
            except OSError:  # not written yet, or gone: both are versions
                parts.append("none")
    return "-".join(parts)


class _Handler(BaseHTTPRequestHandler):
    """Answers ``/`` with the page and ``/version`` with its version. Refuses requests that name another host."""

    server: "LiveReport"

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (HOST, "localhost"):  # a page of elsewhere whose name was pointed at this machine
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        makers: dict[str, Callable[[], tuple[str, str]]] = {
            "/": lambda: ("text/html", self.server.page()),
            "/version": lambda: ("text/plain", version(self.server.runs)),
        }
        if self.path not in makers:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            kind, text = makers[self.path]()
        except (InputError, RunError, OSError) as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
            return
        content = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for a request."""


class LiveReport(ThreadingHTTPServer):
    """The server of a report's page.

    Args:
        runs: the runs.
        port: the port; 0: any free one.

    Raises:
        InputError: the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[RunRecords], port: int) -> None:
        self.runs = runs
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} of {HOST} cannot be used: {error}; give another --port") from None

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self.server_port}/"

    def page(self) -> str:
        """The page for the current content of the files."""
        now = version(self.runs)
        return report_page([read_run(run) for run in self.runs], live=now)
