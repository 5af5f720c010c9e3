"""What every GPU suite needs: exit statuses, a budget of time, the machine's description, and files for the results."""

import argparse
import json
import math
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scalegpt.units import gib

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

DONE, FAILED, BAD_INPUT, NO_GPU, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses; 2 is argparse's too."""


class Budget:
    """Minutes that a suite may take, from when it is made.

    Args:
        minutes: how many.
    """

    def __init__(self, minutes: float) -> None:
        self._start = time.monotonic()
        self._end = self._start + 60 * minutes

    @property
    def used(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left; negative: so many too many."""
        return self._end - time.monotonic()

    def share(self, part: float) -> "Budget":
        """A budget that ends when this part of what is left is used up."""
        return Budget(max(0.0, self.left) * part / 60)


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def regular_expression(text: str) -> re.Pattern[str]:
    """A compiled pattern, for argparse."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def no_gpu(suite: str, torch_version: str) -> int:
    """Say that there is nothing to measure on.

    Returns:
        The exit status.
    """
    print(
        f"gpu_suite {suite}: torch {torch_version} finds no CUDA device here, so nothing was measured; "
        "--dry checks every configuration's set-up on this CPU",
        file=sys.stderr,
    )
    return NO_GPU


def describe_software() -> dict[str, Any]:
    """What ran, and from which sources. Needs no torch: the version that is installed is the one that children import."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "deepspeed": installed("deepspeed"),
        "system": platform.platform(),
    }


def installed(package: str) -> str | None:
    """The installed version of a package; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The sources' git commit, marked where tracked files differ from it; None outside a repository."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_results(
    suite: str, card: str, record: Mapping[str, Any], markdown: str, folder: Path = RESULTS
) -> tuple[Path, Path]:
    """Write a suite's record and its report: ``plan_2026-11-25_NVIDIA-H200.json`` and ``.md``, or the next free ``_2``.

    Args:
        suite: its name.
        card: the driver's name of the card.
        record: goes into the JSON file; its ``software.date`` names both.
        markdown: the report.
        folder: where to.

    Returns:
        The two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = "-".join(re.findall("[A-Za-z0-9.]+", card))
    stem = first = f"{suite}_{record['software']['date'][:10]}_{words}"
    number = 1
    while any((folder / f"{stem}{end}").exists() for end in (".json", ".md")):
        number += 1
        stem = f"{first}_{number}"
    files = folder / f"{stem}.json", folder / f"{stem}.md"
    files[0].write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    files[1].write_text(markdown, encoding="utf-8")
    return files


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are words, the others figures."""
    marks = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *rows))


def machine_table(gpu: Mapping[str, Any], software: Mapping[str, Any]) -> str:
    """What was measured on, and with what: the card as a station greets with it, and :func:`describe_software`."""
    shown = {
        "card": f"{gpu['name']}, {gib(gpu['total_bytes'])}, compute capability {gpu['capability']}",
        "in the catalogue": gpu["catalogue_entry"] or "no: overheads of the most demanding card",
        "driver": gpu["driver"] or "not known: no NVML",
        "CUDA": gpu["cuda"] or f"ROCm {gpu['hip']}",
        "NCCL": gpu["nccl"] or "none in this torch",
        "torch": software["torch"],
        "deepspeed": software["deepspeed"] or "not installed",
        "python": software["python"],
        "system": software["system"],
        "commit": software["commit"] or "not known",
        "allocator settings": gpu["allocator_settings"] or "torch's defaults",
        "context alone": f"{gib(gpu['context_bytes'])} by the driver, {_whose(gpu['driver_bytes_are_ours'])}",
    }
    return table(["", ""], [[key, str(value)] for key, value in shown.items()], left=2)


def _whose(ours: bool) -> str:
    return "this process alone" if ours else "all that is in use on the card"
