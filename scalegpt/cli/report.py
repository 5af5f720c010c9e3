"""``scalegpt report``: writes a page on one run or on several, or serves it while they train."""

from collections.abc import Sequence
from pathlib import Path

from scalegpt.cli.output import show
from scalegpt.cli.parser import Parser, path_argument
from scalegpt.errors import InputError
from scalegpt.storage import disk_errors
from scalegpt.text import brief

EXAMPLES = """\
scalegpt report runs/tiny
scalegpt report runs/tiny runs/tiny-2 --out compare.html
scalegpt report runs/tiny --live"""

MOST_PORT = 65_535


def make_parser() -> Parser:
    """The parser of ``scalegpt report``."""
    parser = Parser("report", "Write a page with the curves of one run, or of several runs in one chart.", EXAMPLES)
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN", help="a run's folder, for example runs/tiny"
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help="file of the page [report.html in the run's folder, or for several runs beside the first run's folder]",
    )
    parser.add_argument(
        "--live", action="store_true", help="serve the page on 127.0.0.1, and update it while the runs train"
    )
    parser.add_argument("--port", metavar="N", help="port of --live; 0: any free one [0]")
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the page and print where it is; with ``--live``, serve it until interrupted."""
    arguments = make_parser().parse(argv)
    if arguments.port is not None and not arguments.live:
        raise InputError("--port is the port of the page that --live serves; add --live")
    if arguments.live and arguments.out is not None:
        raise InputError("--live serves the page and --out writes it; give one of them")
    port = _port(arguments.port or "0")
    # The readers of runs import torch, which takes seconds: only after all else is checked.
    from scalegpt.training.runs.files import write_whole
    from scalegpt.training.runs.report.live import LiveReport
    from scalegpt.training.runs.report.page import MOST_RUNS, report_page
    from scalegpt.training.runs.report.read import find_run, read_run

    if len(arguments.runs) > MOST_RUNS:
        raise InputError(f"{len(arguments.runs)} runs are too many for one page; give at most {MOST_RUNS}")
    records = [find_run(Path(run)) for run in arguments.runs]
    if arguments.live:
        with LiveReport(records, port) as server:
            print(f"{server.address} shows the report until Ctrl-C", flush=True)
            server.serve_forever()
    page = report_page([read_run(run) for run in records])
    folder = records[0].path if len(records) == 1 else records[0].path.parent
    out = Path(arguments.out) if arguments.out else folder / "report.html"
    with disk_errors(out):
        write_whole(out, page)
    show(out)
    return 0


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MOST_PORT)) and int(text) <= MOST_PORT):
        raise InputError(f"port {brief(text, 40)} is not a port; give a number up to {MOST_PORT}")
    return int(text)
