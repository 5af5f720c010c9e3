"""Prints continuations in the order of their prompts, although several are drawn together."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from scalegpt.cli.output import json_line
from scalegpt.text import visible

if TYPE_CHECKING:
    from scalegpt.inference.continuations import Continuation, Part

SEPARATOR = "-" * 40

Describe = Callable[[int, "Continuation"], dict[str, Any]]
"""A function from the index of a continuation, and the continuation, to the object to print."""


def in_order(parts: Iterator["Part"]) -> Iterator["Part"]:
    """Yield the parts of one continuation after another.

    Parts of the first unfinished continuation are yielded at once.
    """
    waiting: dict[int, deque[Part]] = {}
    turn = 0
    for part in parts:
        waiting.setdefault(part.index, deque()).append(part)
        while waiting.get(turn):
            first = waiting[turn].popleft()
            yield first
            if first.whole is not None:
                del waiting[turn]
                turn += 1


def print_text(prompts: Sequence[str], parts: Iterator["Part"]) -> None:
    """Print each continuation after its prompt, as its text is drawn; on a terminal, control characters are escaped.

    Args:
        prompts: the prompt of each continuation.
        parts: the parts of all continuations.
    """
    shown = visible if sys.stdout.isatty() else str
    print(shown(prompts[0]), end="", flush=True)
    for part in in_order(parts):
        if part.text:
            print(shown(part.text), end="", flush=True)
        if part.whole is not None:
            print(flush=True)
            if part.index + 1 < len(prompts):
                print(SEPARATOR)
                print(shown(prompts[part.index + 1]), end="", flush=True)


def print_json(parts: Iterator["Part"], describe: Describe) -> None:
    """Print a line with a JSON object for each continuation, once it and all before it are finished."""
    for part in in_order(parts):
        if part.whole is not None:
            print(json_line(describe(part.index, part.whole)), flush=True)
