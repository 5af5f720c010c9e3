"""Helpers to write Markdown: tables, blocks of code, sizes and names."""

from collections.abc import Collection, Iterable, Sequence

from scalegpt.hardware.gpus import GIB


def table(head: str | Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table in Markdown.

    Args:
        head: the headings, as a sequence or as one text in which `` | `` separates them.
        rows: the cells of each row, as many as there are headings.
        right: the indices of the columns that are aligned right, for example columns of numbers.
    """
    head = head.split(" | ") if isinstance(head, str) else head
    rule = "|" + "|".join("--:" if column in right else "---" for column in range(len(head))) + "|"
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def fenced(text: str) -> str:
    """Text as a fenced block of code."""
    return f"```\n{text.strip()}\n```"


def gib(size: float) -> str:
    """A size in bytes, written in GiB.

    >>> gib(2**30)
    '1.00 GiB'
    """
    return f"{size / GIB:.2f} GiB"


def code(name: str) -> str:
    """A name as inline code."""
    return f"`{name}`"
