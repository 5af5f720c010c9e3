"""Recognise what ScaleGPT itself writes, which is never text to train on: runs, checkpoints, pages and logs.

They are among the data if the user names the working folder as data (``--input_file .``).
"""

import os
import re
from collections.abc import Set
from contextlib import suppress
from io import BufferedReader

RUN, PAGE, LOG = "folder of a run", "page of ScaleGPT", "log of ScaleGPT"

_RUN_FILES = frozenset(
    {"config.yaml", "plan.json", "metrics.jsonl", "data_ledger.jsonl", "run_status.json", "checkpoints"}
)
_FEWEST_RUN_FILES = 3
"""A folder with at least this many of a run's files counts as a run.

A copy of a run may lack some of them, and one of them proves nothing: other programs write a ``config.yaml`` too.
"""

_HEAD_BYTES = 16 << 10
_PAGE_MARK = b'<meta name="generator" content="ScaleGPT">'
_PAGE_BEGINS = b"<!doctype html"
_LOG_BEGINS = b"model    "  # found far faster than the pattern
_LOG_LINES = re.compile(
    rb"^model    [\d,]+ parameters: \d+ layers, \d+ wide, .*\ndata     [\d,]+ training and ", re.MULTILINE
)


def folder_of_ours(names: Set[str]) -> str | None:
    """:data:`RUN` for a folder of a run or a checkpoint, recognised by its entries' names; None for any other folder."""
    is_run = ".run_id" in names or len(names & _RUN_FILES) >= _FEWEST_RUN_FILES
    is_checkpoint = "checkpoint.json" in names and any(name.endswith(".weights.safetensors") for name in names)
    return RUN if is_run or is_checkpoint else None


def file_of_ours(file: BufferedReader, *, named: bool) -> str | None:
    """:data:`PAGE` or :data:`LOG` for an open file that ScaleGPT wrote; None for any other.

    Args:
        file: the open file; it is read from its beginning and set back to it.
        named: whether the user named the file. A named file is recognised only as the log that this process's output goes to.

    Raises:
        OSError: the file cannot be read.
    """
    if _is_our_output(file):
        return LOG
    if named:
        return None
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    # A program that writes such pages has the mark too, but it does not begin as a page does.
    if head.lstrip()[: len(_PAGE_BEGINS)].lower() == _PAGE_BEGINS and _PAGE_MARK in head:
        return PAGE
    return LOG if _LOG_BEGINS in head and _LOG_LINES.search(head) else None


def _is_our_output(file: BufferedReader) -> bool:
    """Whether this process's standard output or error goes to the file."""
    found = os.fstat(file.fileno())
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            if os.path.samestat(found, os.fstat(descriptor)):
                return True
    return False
