"""Helpers that benchmarks share, for flags (bad values are refused before anything is measured), commands and results."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def at_least(least: int) -> Callable[[str], int]:
    """A flag's type: a whole number of at least ``least``."""

    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return count


def above_zero(text: str) -> float:
    """A flag's type: a number above zero."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return number


def pattern(text: str) -> re.Pattern[str]:
    """A flag's type: a regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def counts(text: str) -> list[int]:
    """A flag's type: whole numbers above zero, separated by commas."""
    return [at_least(1)(part) for part in text.split(",")]


def names_of(known: Mapping[str, Any], separator: str = ",") -> Callable[[str], list[str]]:
    """A flag's type: some of the known names, separated by ``separator``."""

    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(separator) if name.strip()]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"there is no {name!r}; choose from {f'{separator} '.join(known)}")
        return found

    return names


def new_file(text: str) -> Path:
    """A flag's type: the path of a file to be written after the measurement."""
    path = Path(text)
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: give a file in a folder that exists")
    return path


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Settings as the words of a command line, ``--key value``."""
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def python_words(ranks: int = 1) -> list[str]:
    """The words of a command line that start Python, under torchrun for several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *(launcher if ranks > 1 else [])]


def write_figures(path: Path | None, figures: Any) -> None:
    """Write results as JSON to a file. If the path is None, nothing is written."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
