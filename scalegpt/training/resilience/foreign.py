"""Errors of libraries, which may be pages of a compiler's output: one line that names a file with all of it."""

import traceback
from pathlib import Path

from scalegpt.text import visible
from scalegpt.training.runs.files import write_whole

LONGEST = 300
"""Characters of a message that still goes into a line."""

COMPILERS = ("torch._inductor", "torch._dynamo", "triton")
"""Modules whose errors come of compiling the model."""


def in_one_line(error: BaseException, folder: Path, rank: int) -> str | None:
    """What to report of a long error of a library, once all of it is in ``error_rank_N.txt``.

    Args:
        error: what a library has raised.
        folder: the run's.
        rank: that of this process.

    Returns:
        None for an error whose message is short.
    """
    text = str(error).strip()
    from_compiling = type(error).__module__.startswith(COMPILERS)
    if len(text) <= LONGEST and not from_compiling:
        return None
    first = next((line for line in text.splitlines() if line.strip()), "")[:LONGEST]
    said = [visible(f"{type(error).__name__}: {first}".rstrip(": "))]
    path = folder / f"error_rank_{rank}.txt"
    try:
        write_whole(path, visible("".join(traceback.format_exception(error))))
        said.append(f"all of it is in {path}")
    except OSError:  # a disk that fails too; --debug shows the error on the terminal
        said.append("--debug shows all of it")
    if from_compiling:
        said.append("--compile off trains without compiling")
    return "; ".join(said)
