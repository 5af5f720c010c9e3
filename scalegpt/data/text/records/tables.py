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
    headers = {delimiter: _header(feed.first, delimiter) for delimiter in delimiters}
    likely = max(headers.values(), key=len)
    name = field.choose(lambda name: any(name in header for header in headers.values()), likely)
    delimiter = next(delimiter for delimiter, header in headers.items() if name in header)
    csv.field_size_limit(MOST_CHARACTERS)  # of this process; the default is 131,072 characters
    rows = csv.reader(feed.lines(), delimiter=delimiter, strict=True)
    column, width = -1, 0
    try:
        for row in rows:
            if column < 0:
                column, width = _column(row, name, feed.place), len(row)
            elif row:
                if len(row) != width:
                    raise RecordError(feed.place, f"the row has {len(row):,} fields, and the header has {width:,}")
                if "\0" in row[column]:
                    raise RecordError(feed.place, f"field {one_line(name)} has a NUL character")
                yield row[column]
            feed.begin()
    except csv.Error as error:
        raise RecordError(feed.place, f"broken CSV: {one_line(error)}") from None


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
    """Lines with their ends for :func:`csv.reader`, which counts them and bounds a row's length.

    Attributes:
        first: the first line, which names the columns; empty if there is none.
    """

    def __init__(self, source: Iterator[str]) -> None:
        self.first = ""
        self._number = self._begun = 0
        self._size = 0
        self._source = source
        for line in source:
            self._number += 1
            if line.strip():
                self.first = f"{line}\n"
                break

    def lines(self) -> Iterator[str]:
        """Yield the lines from :attr:`first` on."""
        if self.first:
            yield self.first
        for line in self._source:
            self._number += 1
            self._size += len(line) + 1
            if self._size > MOST_CHARACTERS:
                raise RecordError(self.place, f"the row has more than {MOST_CHARACTERS:,} characters")
            yield f"{line}\n"

    def begin(self) -> None:
        """Begin the next row; the header is the first one."""
        self._begun, self._size = self._number + 1, 0

    @property
    def place(self) -> str:
        """The row's first line, for messages."""
        return f"line {self._begun or self._number}"
