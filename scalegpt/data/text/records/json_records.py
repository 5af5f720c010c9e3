"""Read JSON Lines, and JSON files that are an array of objects."""

import json
from collections.abc import Iterator
from typing import Any

from scalegpt.data.text.decoding import NotInEncodingError
from scalegpt.data.text.packed import InputFile
from scalegpt.data.text.records.base import (
    MOST_CHARACTERS,
    BadBytesError,
    RecordError,
    TextField,
    lines,
    text_of,
    texts,
)
from scalegpt.text import brief

_SPACES = " \t\n\r"


def read_json_lines(file: InputFile, encoding: str, field: TextField) -> Iterator[str]:
    """Yield the text of each line that is not blank; see :data:`~.base.Reader`."""
    for number, line in enumerate(lines(file, encoding), start=1):
        if line and not line.isspace():
            place = f"line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RecordError(place, _broken(error)) from None
            yield text_of(record, field, place)


def read_json_array(file: InputFile, encoding: str, field: TextField) -> Iterator[str]:
    """Yield the text of each object of an array; see :data:`~.base.Reader`."""
    window = _Window(file, encoding)
    window.skip("[")
    more = window.next() != "]"
    while more:
        window.expect("{")
        yield text_of(window.value(), field, window.place)
        window.records += 1
        more = window.next() == ","
        if more:
            window.skip(",")
    window.skip("]")
    if window.next():
        raise RecordError(window.place, "more text follows the end of the array")


class _Window:
    """The part of a JSON text in which the next record is searched.

    Attributes:
        records: the number of records read so far.
    """

    def __init__(self, file: InputFile, encoding: str) -> None:
        self.records = 0
        self._texts, self._encoding = texts(file, encoding), encoding
        self._text, self._start = "", 0
        self._decoder = json.JSONDecoder()

    @property
    def place(self) -> str:
        """The record that comes next, for messages."""
        return f"record {self.records + 1}"

    def next(self) -> str:
        """The next character that is not blank, which stays; empty at the end of the text."""
        while True:
            while self._start < len(self._text) and self._text[self._start] in _SPACES:
                self._start += 1
            if self._start < len(self._text):
                return self._text[self._start]
            if not self._read(1):
                return ""

    def expect(self, sign: str) -> None:
        """Check that a sign comes next, after blanks.

        Raises:
            RecordError: something else comes.
        """
        found = self.next()
        if found != sign:
            what = f"{found!r} stands" if found else "the file ends"
            raise RecordError(self.place, f"broken JSON: {what} where {sign!r} must")

    def skip(self, sign: str) -> None:
        """Go past a sign that must come next; errors as for :meth:`expect`."""
        self.expect(sign)
        self._start += 1

    def value(self) -> Any:
        """The next JSON value.

        Raises:
            RecordError: it is broken, or longer than :data:`~.base.MOST_CHARACTERS`.
        """
        while True:
            try:
                value, self._start = self._decoder.raw_decode(self._text, self._start)
            except (ValueError, RecursionError) as error:
                # The value may only be cut. What is read doubles each time, so that a long value is not parsed too often.
                held = len(self._text) - self._start
                if held > MOST_CHARACTERS:
                    raise RecordError(self.place, f"it has more than {MOST_CHARACTERS:,} characters") from None
                if isinstance(error, RecursionError) or not self._read(held):
                    raise RecordError(self.place, _broken(error, "")) from None
            else:
                return value

    def _read(self, least: int) -> bool:
        """Read at least so many more characters, if there are; whether there were any."""
        parts = [self._text[self._start :]]
        self._start = size = 0
        try:
            while size < least and (text := next(self._texts, None)) is not None:
                parts.append(text)
                size += len(text)
        except NotInEncodingError as error:
            raise BadBytesError(self.place, self._encoding, error.offset) from None
        self._text = "".join(parts)
        return size > 0


def _broken(error: Exception, at: str | None = None) -> str:
    """What is wrong with a JSON text; ``at``: where, instead of the error's own place in its line."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg}{f', at its character {error.colno}' if at is None else at}"
    return "broken JSON: it is nested too deep" if isinstance(error, RecursionError) else f"broken JSON: {brief(error)}"
