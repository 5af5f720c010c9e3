"""What ScaleGPT itself writes, which is never text to train on: folders of runs and checkpoints, its pages, its logs.

A user who names the working folder as data (``--input_file .``) has them inside it.
"""

import os
import re
import stat
from collections.abc import Set
from pathlib import Path

RUN, PAGE, LOG = "folder of a run", "page of ScaleGPT", "log of ScaleGPT"

_RUN_FILES = frozenset(
    {"config.yaml", "plan.json", "metrics.jsonl", "data_ledger.jsonl", "run_status.json", "checkpoints"}
)
_ENOUGH = 3
"""So many of a run's files make a folder a run: a copy may lack some, and other programs have a ``config.yaml``."""

_HEAD_BYTES = 16 << 10
_PAGE_MARK = b'<meta name="generator" content="ScaleGPT">'
_LOG_LINES = re.compile(
    rb"^model    [\d,]+ parameters: \d+ layers, \d+ wide, .*\ndata     [\d,]+ training and ", re.MULTILINE
)


def folder_of_ours(names: Set[str]) -> str | None:
    """Name what a folder of ours is, from the names in it; None for any other folder."""
    is_run = ".run_id" in names or len(names & _RUN_FILES) >= _ENOUGH
    is_checkpoint = "checkpoint.json" in names and any(name.endswith(".weights.safetensors") for name in names)
    return RUN if is_run or is_checkpoint else None


def file_of_ours(path: Path) -> str | None:
    """Name what a file of ours is; None for any other file.

    Raises:
        OSError: it cannot be read.
    """
    if is_our_output(path):
        return LOG
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if _PAGE_MARK in head:
        return PAGE
    return LOG if _LOG_LINES.search(head) else None


def is_our_output(path: Path) -> bool:
    """Whether this process's standard output or error goes to the file.

    Raises:
        OSError: it cannot be looked at.
    """
    found = path.stat()
    for descriptor in (1, 2):
        try:
            ours = os.fstat(descriptor)
        except OSError:  # closed
            continue
        if stat.S_ISREG(ours.st_mode) and os.path.samestat(found, ours):
            return True
    return False
