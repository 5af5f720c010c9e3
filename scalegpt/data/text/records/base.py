"""What the readers of records share: the field that holds the text, lines of bounded length, errors that name a record."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from scalegpt.data.text.decoding import NotInEncodingError, decoded
from scalegpt.data.text.packed import InputFile
from scalegpt.text import brief, one_line, shown

MOST_CHARACTERS = 256 << 20
"""The most characters of a record, to bound memory."""

_NAMED = 10
"""The most fields that a message names."""

FIELDS = ("text", "content")
"""The fields that are looked for if the user names none; the first one that a file's first record has is read."""


class RecordError(Exception):
    """A record cannot be read. The text of the error says what is wrong.

    Attributes:
        place: the record, such as ``line 7``.
    """

    def __init__(self, place: str, what: str) -> None:
        super().__init__(what)
        self.place = place


class BadBytesError(RecordError):
    """A line has bytes that are invalid in the file's encoding.

    Attributes:
        offset: byte offset of the first invalid byte, in the unpacked file.
    """

    def __init__(self, place: str, encoding: str, offset: int) -> None:
        super().__init__(place, f"it is not {encoding}, at byte offset {offset} of the file")
        self.offset = offset


class NoFieldError(Exception):
    """The records of a file have no field that may hold the text; the error's text names the fields that were looked for.

    Attributes:
        found: the fields that the first record has, in words; empty if it has none.
    """

    def __init__(self, asked: Iterable[str], found: Iterable[str]) -> None:
        super().__init__(" or ".join(map(one_line, asked)))
        names = list(dict.fromkeys(name for name in map(str, found) if name))
        shown = ", ".join(brief(name, 40) for name in names[:_NAMED])
        self.found = f"{shown} and {len(names) - _NAMED:,} more" if len(names) > _NAMED else shown


class TextField:
    """The field of a file's records that holds the text.

    Attributes:
        name: the field: what the user asked for, or what :meth:`choose` found; None before :meth:`choose`.
    """

    def __init__(self, asked: str | None) -> None:
        self.name: str | None = None
        self._asked = (asked,) if asked is not None else FIELDS

    def choose(self, has: Callable[[str], bool], found: Iterable[str]) -> str:
        """Choose the field by the file's first record or its header.

        Args:
            has: whether the record has a field.
            found: the names of the record's fields, for the error.

        Raises:
            NoFieldError: it has none of the fields.
        """
        self.name = next((name for name in self._asked if has(name)), None)
        if self.name is None:
            raise NoFieldError(self._asked, found)
        return self.name


def has_field(record: Any, field: str) -> bool:
    """Whether a JSON value is an object with this field; see :func:`value_of`."""
    try:
        value_of(record, field)
    except KeyError:
        return False
    return True


def value_of(record: Any, field: str) -> Any:
    """The value of a field of a JSON object: of the key ``field``, else of a path of keys with dots between them.

    Raises:
        KeyError: the value is no object, or it lacks the field.
    """
    if isinstance(record, dict) and field in record:
        return record[field]
    for key in field.split("."):
        if not isinstance(record, dict):
            raise KeyError(key)
        record = record[key]
    return record


def text_of(record: Any, field: TextField, place: str) -> str:
    """The text of a record that is a JSON value; empty where the field is null.

    Raises:
        NoFieldError: this is the file's first record, and it has no field for the text.
        RecordError: the record is no object, it lacks the field, or the field's value is no text.
    """
    name = field.name or field.choose(lambda name: has_field(record, name), record if isinstance(record, dict) else ())
    try:
        value = value_of(record, name)
    except KeyError:
        kind = "" if isinstance(record, dict) else f": it is {shown(record)}, not an object"
        raise RecordError(place, f"the record has no field {one_line(name)}{kind}") from None
    return checked_text(value, name, place)


def checked_text(value: Any, name: str, place: str) -> str:
    """The value of a field if it is text; empty for null.

    Raises:
        RecordError: the value is no text, or holds half of a surrogate pair, which no encoding can write.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError(place, f"field {one_line(name)} is {shown(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            message = (
                f"field {one_line(name)} has half of a surrogate pair ({half}), at its character {error.start + 1}"
            )
            raise RecordError(place, message) from None
    return value


def texts(file: InputFile, encoding: str) -> Iterator[str]:
    """Decode a file chunk by chunk. Before an error, what precedes the invalid byte is yielded, so that its line is known.

    Raises:
        NotInEncodingError: the file has bytes that are invalid in the encoding.
    """
    try:
        yield from decoded(file.chunks(), encoding)
    except NotInEncodingError as error:
        yield error.before
        raise


def lines(file: InputFile, encoding: str) -> Iterator[str]:
    r"""The lines of a file, without the ``\n`` that ends them; only ``\n`` ends a line, as JSON and CSV need it.

    Raises:
        BadBytesError: a line has bytes that are invalid in the encoding.
        RecordError: a line is longer than :data:`MOST_CHARACTERS`.
    """
    number, size = 1, 0
    parts: list[str] = []  # of the line that has not ended yet
    try:
        for text in texts(file, encoding):
            *ended, rest = text.split("\n")
            if ended:
                yield "".join([*parts, ended[0]])
                yield from ended[1:]
                number, size, parts = number + len(ended), 0, []
            parts.append(rest)
            size += len(rest)
            if size > MOST_CHARACTERS:
                raise RecordError(f"line {number}", f"it has more than {MOST_CHARACTERS:,} characters")
        if size:
            yield "".join(parts)
    except NotInEncodingError as error:
        raise BadBytesError(f"line {number}", encoding, error.offset) from None


Reader = Callable[[InputFile, str, TextField], Iterator[str]]
"""Reads a file's records in order. Called with the file, its encoding, and the field; yields each record's text.

The text is empty where the record has none. Raises :class:`RecordError`, :class:`NoFieldError`,
:class:`~scalegpt.data.text.packed.DamagedError` and ``OSError``.
"""
