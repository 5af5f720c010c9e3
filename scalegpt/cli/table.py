"""Tables in plain text."""

from collections.abc import Collection, Sequence

from scalegpt.text import one_line


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Lay out rows of text in columns, the first row as the heading with a rule under it.

    Args:
        rows: the cells; every row has as many as the first. Their control characters, line ends too, are made visible.
        right: the columns whose cells end, rather than begin, at the same place: those of numbers.

    """
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        places = enumerate(zip(row, widths, strict=True))
        return "  ".join(cell.rjust(w) if column in right else cell.ljust(w) for column, (cell, w) in places).rstrip()

    return "\n".join([line(rows[0]), line(["-" * width for width in widths]), *map(line, rows[1:])])
