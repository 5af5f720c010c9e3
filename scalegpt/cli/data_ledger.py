"""``scalegpt data ledger``: which windows of the data a run's optimizer steps consumed."""

import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from scalegpt.cli.output import show
from scalegpt.cli.parser import Parser, path_argument
from scalegpt.cli.table import aligned
from scalegpt.data.ledger import Ledger, Window
from scalegpt.errors import InputError
from scalegpt.structured import read_lines
from scalegpt.text import shown

LEDGER, METRICS = "data_ledger.jsonl", "metrics.jsonl"

EXAMPLE = """\
scalegpt data ledger runs/tiny --steps 100:102
scalegpt data ledger runs/tiny --steps 250 --json"""


def main(words: Sequence[str]) -> int:
    """Print the windows of the steps asked for."""
    parser = Parser("data ledger", "show which windows of the data each optimizer step of a run consumed", EXAMPLE)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--steps", required=True, metavar="A[:B]", help="steps A to B, both counted, as metrics.jsonl numbers them"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a step")
    arguments = parser.parse(words)
    folder = Path(arguments.run)
    first, last = _range(arguments.steps)
    taken = _steps_taken(folder)
    if last > taken:
        rest = f"{taken:,} steps; ask for at most step {taken}" if taken else "no step yet; train it first"
        raise InputError(f"steps {arguments.steps}: {folder} has taken {rest}")
    steps = Ledger(folder / LEDGER).windows(range(first, last + 1))
    for line in _json_lines(steps) if arguments.json else _table(steps):
        show(line)
    return 0


def _range(text: str) -> tuple[int, int]:
    """The first and the last step that ``A`` or ``A:B`` names.

    Raises:
        InputError: it is neither, or empty.
    """
    found = re.fullmatch("([0-9]{1,15})(?::([0-9]{1,15}))?", text)
    if found is None:
        raise InputError(f"steps must be A or A:B, whole numbers from 1 on, such as 100:120, not {shown(text)}")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last:
        raise InputError(f"steps {text} are none: the first step is 1, and A must not be above B")
    return first, last


def _steps_taken(folder: Path) -> int:
    """The last step in a run's metrics.

    Raises:
        InputError: the folder holds no run, or one whose metrics cannot be read.
    """
    try:
        steps = [values.get("step") for _, values in deque(read_lines(folder / METRICS), maxlen=1)]
    except FileNotFoundError:
        from scalegpt.inference.load import check_run  # torch takes seconds, which only a mistake need pay

        check_run(folder)
        raise InputError(
            f"{folder / METRICS} is missing, which tells how many steps the run has taken; put it back from a copy"
        ) from None
    return next((step for step in steps if isinstance(step, int) and not isinstance(step, bool)), 0)


def _json_lines(steps: Iterator[tuple[int, list[Window]]]) -> Iterator[str]:
    for step, windows in steps:
        yield json.dumps({"step": step, "windows": [asdict(window) for window in windows]})


def _table(steps: Iterator[tuple[int, list[Window]]]) -> Iterator[str]:
    file = None
    for step, windows in steps:
        if windows[0].file != file:
            file = windows[0].file
            yield f"{file}; offsets and lengths in tokens"
        rows = [[str(step), str(each.order), str(each.number), str(each.offset), str(each.length)] for each in windows]
        yield aligned([["step", "order", "window", "offset", "length"], *rows], right=range(5))
