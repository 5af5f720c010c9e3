"""Read CSV and TSV: the header names the columns, and a row may span several lines."""

import csv
from collections.abc import Iterator

from scalegpt.data.text.packed import InputFile
from scalegpt.data.text.records.base import MOST_CHARACTERS, RecordError, TextField, lines
from scalegpt.text import one_line


def read_csv(file: InputFile, encoding: str, field: TextField) -> Iterator[str]:
    """Yield the text of each row; see :data:`~.base.Reader`.

    The delimiter is the first of comma, semicolon, tab and bar by which the header has the field.
    """
    return _read(file, encoding, field, ",;\t|")


def read_tsv(file: InputFile, encoding: str, field: TextField) -> Iterator[str]:
    """Yield the text of each row; see :data:`~.base.Reader`."""
    return _read(file, encoding, field, "\t")


def _read(file: InputFile, encoding: str, field: TextField, delimiters: str) -> Iterator[str]:
    feed = _Feed(lines(file, encoding))
    first = next((line for line in feed if line.strip()), "")
    headers = {delimiter: _header(first, delimiter) for delimiter in delimiters}
    name = field.choose(lambda name: any(name in header for header in headers.values()))
    delimiter = next(delimiter for delimiter, header in headers.items() if name in header)
    csv.field_size_limit(MOST_CHARACTERS)  # of this process; the default is 131,072 characters
    feed.repeat(first)
    rows = csv.reader(feed, delimiter=delimiter, strict=True)
    column, width = -1, 0
    while True:
        feed.begin()
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise RecordError(feed.place, f"broken CSV: {one_line(error)}") from None
        if row is None:
            return
        if column < 0:
            column, width = _column(row, name, feed.place), len(row)
        elif row:
            if len(row) != width:
                raise RecordError(feed.place, f"the row has {len(row):,} fields, and the header has {width:,}")
            if "\0" in row[column]:
                raise RecordError(feed.place, f"field {one_line(name)} has a NUL character")
            yield row[column]


def _header(line: str, delimiter: str) -> list[str]:
    """The column names in the header's first line; names that go on in the next line are incomplete."""
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:
        return []


def _column(header: list[str], name: str, place: str) -> int:
    if header.count(name) != 1:
        raise RecordError(place, f"the header has {header.count(name)} columns {one_line(name)}")
    return header.index(name)


class _Feed:
    """Lines with their ends for :func:`csv.reader`, which counts them and bounds a row's length."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source = source
        self._again: str | None = None
        self._number = self._first = 0
        self._size = 0

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        if self._again is not None:
            line, self._again = self._again, None
            return line
        line = next(self._source) + "\n"
        self._number += 1
        self._size += len(line)
        if self._size > MOST_CHARACTERS:
            raise RecordError(self.place, f"the row has more than {MOST_CHARACTERS:,} characters")
        return line

    def repeat(self, line: str) -> None:
        """Give the line last given again."""
        self._again = line or None

    def begin(self) -> None:
        """Begin the next row."""
        self._first, self._size = self._number + (self._again is None), 0

    @property
    def place(self) -> str:
        """The row's first line, for messages."""
        return f"line {max(1, self._first)}"
