"""Findings, the registry of checks, and how all checks are run."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scalegpt.text import one_line

OK, WARNING, FAILURE = "ok", "warning", "failure"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        state: ``ok``; ``warning``: a run works, perhaps slower or with a risk; ``failure``: runs fail.
        what: what was found, in one line.
        fix: what to do; empty for ``ok``.
    """

    state: str
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Setting:
    """What the user wants to have checked.

    Attributes:
        runs_dir: the folder of all runs.
        measure: whether to measure the processor's rates even if they are kept.
    """

    runs_dir: Path = Path("runs")
    measure: bool = False


@dataclass(frozen=True)
class Result:
    """A finding with its check.

    Attributes:
        check: the check's name.
        seconds: how long the check took.
    """

    check: str
    finding: Finding
    seconds: float


Check = Callable[[Setting], Iterator[Finding]]

CHECKS: dict[str, Check] = {}
"""Name → the check, in the order in which they run."""


def check(name: str) -> Callable[[Check], Check]:
    """Register a check, a generator of findings. One that does not apply to this machine may yield none."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def run_checks(setting: Setting, names: list[str] | None = None) -> Iterator[Result]:
    """Run checks and yield their findings as they come. If a check raises an exception, it has failed.

    Args:
        setting: what the user wants to have checked.
        names: the checks to run; None: all.
    """
    for name in CHECKS if names is None else names:
        start = time.perf_counter()
        try:
            for finding in CHECKS[name](setting):
                yield Result(name, finding, time.perf_counter() - start)
                start = time.perf_counter()
        except Exception as error:  # any: the cause is reported, and the other checks go on
            cause = one_line(f"{type(error).__name__}: {error}")
            finding = Finding(FAILURE, f"the check itself failed: {cause}", "repair that, or report it as a bug")
            yield Result(name, finding, time.perf_counter() - start)
