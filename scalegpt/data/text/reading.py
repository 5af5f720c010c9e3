"""Read one file: check that it is text, count its documents and hash it; then read its documents in bounded memory.

A file of plain text is one document. A file of records has one document a record.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scalegpt.data.text.decoding import (
    NotInEncodingError,
    OtherFormError,
    UnusableTextError,
    binary,
    decoded,
    encoding_instead,
    unsure,
)
from scalegpt.data.text.diagnosis import diagnose
from scalegpt.data.text.documents import Document
from scalegpt.data.text.encodings import AUTO, UTF8, byte_order_mark, codec_name, looks_binary
from scalegpt.data.text.formats import ARROW, PARQUET
from scalegpt.data.text.packed import DamagedError, InputFile, damaged
from scalegpt.data.text.records.base import BadBytesError, NoFieldError, RecordError, TextField
from scalegpt.data.text.records.table import READERS
from scalegpt.data.tokenizers import code_points
from scalegpt.data.tokenizers.cutting import cut_place
from scalegpt.errors import InputError
from scalegpt.text import one_line

PIECE_CHARACTERS = 1 << 20
"""When this many characters are in memory (1 to 4 MB of UTF-8), a piece is cut off at :func:`cut_place`."""

_PART_CHARACTERS = 1 << 20
"""The text of a long record is cut in parts of this size before it is cut into pieces, as a file is read in chunks."""

Seen = npt.NDArray[np.bool_]
"""For each character of Unicode whether the text has it."""


@dataclass(frozen=True)
class Source:
    """A file that has been read once and is text.

    Attributes:
        path: path of the file.
        name: path of the file inside the folder that the user named; the file's name if the user named the file.
        encoding: name of the codec that decodes the file.
        bytes: size of the file in bytes.
        sha256: SHA-256 of the file's bytes, in hex.
        form: name of the format of its records, each of which is a document; None: plain text, which is one document.
        packing: how the file is compressed, such as ``gzip``; None: not at all.
        field: the field of the records that holds the text; None for plain text.
        documents: number of documents with text.
        empty: number of records without text, which are not documents.
        text_bytes: size of all documents' text in UTF-8, in bytes.
    """

    path: Path
    name: str
    encoding: str
    bytes: int
    sha256: str
    form: str | None = None
    packing: str | None = None
    field: str | None = None
    documents: int = 1
    empty: int = 0
    text_bytes: int = 0

    @property
    def identity(self) -> tuple[str, ...]:
        """What decides the documents: name, digest, and for records format and field. Part of the cache's keys."""
        how = () if self.form is None else (self.form, str(self.field))
        return (self.name, self.sha256, *how)


class Piece(NamedTuple):
    """A part of a document. The token ids of a document's pieces, joined, are those of its whole text.

    Attributes:
        text: the characters; never empty.
        read: the number of bytes of the file read so far, as the file is: of a compressed file, of compressed bytes.
        ends: whether the piece is the last of its document.
    """

    text: str
    read: int
    ends: bool


@dataclass(frozen=True)
class Opening:
    """What a file's first bytes say about it.

    Attributes:
        form: name of the format of records to read the file by; None: plain text.
        packing: how the file is compressed; None: not at all.
        head: the first bytes of its content, unpacked.
    """

    form: str | None
    packing: str | None
    head: bytes


def examine(document: Document, opening: Opening, encoding: str, field: str | None, seen: Seen | None) -> Source:
    """Read a whole file: check its text, count its documents, hash its bytes.

    With the encoding ``auto`` the file is read in the encoding of its byte order mark, or in UTF-8 without a mark. If it is
    not valid UTF-8 and not compressed, it is read again in the encoding detected from its bytes.

    Args:
        document: the file.
        opening: what its first bytes say.
        encoding: the encoding, or ``auto``.
        field: the field of records that holds the text; None: :data:`~.records.base.FIELDS`.
        seen: is set where a character of Unicode is in the text; None: it is not wanted.

    Raises:
        UnusableTextError: the file holds no text.
        InputError: a record cannot be read.
    """
    path = document.path
    mark = byte_order_mark(opening.head[:4]) if encoding == AUTO else None
    first = (mark or UTF8) if encoding == AUTO else encoding
    try:
        try:
            return _read_to_end(document, opening, first, field, seen)
        except (NotInEncodingError, BadBytesError) as error:
            guess = _encoding_instead(path, opening, encoding, mark, error)
        try:
            return _read_to_end(document, opening, codec_name(guess), field, seen)
        except (NotInEncodingError, BadBytesError) as error:
            raise unsure(path, guess, error.offset) from None
    except RecordError as error:
        raise _bad_record(path, error) from None
    except NoFieldError as error:
        raise _no_field(path, opening, error, field) from None
    except DamagedError as error:
        raise InputError(damaged(path, opening.packing or opening.form, error)) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _encoding_instead(
    path: Path, opening: Opening, asked: str, mark: str | None, error: NotInEncodingError | BadBytesError
) -> str:
    """The encoding of a file that did not decode, detected from its bytes.

    Raises:
        BadBytesError: as given, if the file's encoding may not be detected or is not sure.
        UnusableTextError: the same, for plain text.
    """
    if isinstance(error, BadBytesError):
        found = diagnose(path, error.offset) if asked == AUTO and mark is None and opening.packing is None else None
        if found is None or found.encoding is None or found.is_utf8 or found.is_binary:
            raise error
        return found.encoding
    if opening.packing is None:
        return encoding_instead(path, asked, error.offset, mark)
    name = UTF8 if asked == AUTO else asked
    what = f"the text in {one_line(path)} is not {name}, at its byte offset {error.offset}; give its --encoding"
    raise UnusableTextError(f"not {name}", what)


def unreadable(path: Path, error: OSError) -> UnusableTextError:
    """The error for a file that cannot be read."""
    advice = "; make it readable" if isinstance(error, PermissionError) else ""
    return UnusableTextError("unreadable", f"input {one_line(path)} cannot be read: {error.strerror}{advice}")


def _bad_record(path: Path, error: RecordError) -> InputError:
    return InputError(
        f"input {one_line(path)}, {error.place}: {error}; repair it there, or leave the file out (in a folder: --exclude)"
    )


def _no_field(path: Path, opening: Opening, error: NoFieldError, asked: str | None) -> OtherFormError:
    advice = "name the field that holds the text" if asked is None else "name another field"
    found = f", which has {error.found}" if error.found else ""
    what = (
        f"input {one_line(path)} is {opening.form} without a field {error} in its first record{found}; "
        f"{advice} (--text_field)"
    )
    is_written = opening.packing is None and opening.form not in {PARQUET.name, ARROW.name}
    as_text = ", or use --as_text true to train on it as it is written" if is_written else ""
    return OtherFormError(f"{opening.form} without a field {error}", what + as_text)


def _read_to_end(document: Document, opening: Opening, encoding: str, field: str | None, seen: Seen | None) -> Source:
    wanted = TextField(field)
    number = empty = size = 0
    # The characters of a file that turns out unusable must not join the vocabulary.
    here = None if seen is None else np.zeros_like(seen)
    with InputFile(document.path, opening.packing) as file:
        for text in _texts(document.path, file, opening.form, encoding, wanted):
            number, empty = number + bool(text), empty + (not text)
            size += len(text) if text.isascii() else len(text.encode())
            if here is not None and text:
                here[code_points(text)] = True
        bytes_read, digest = file.finish()
    if not number:
        what = "is empty" if opening.form is None or not empty else f"has {empty:,} records, all without text"
        raise UnusableTextError("empty", f"input {one_line(document.path)} {what}; name a file with text in it")
    if seen is not None and here is not None:
        seen |= here
    documents = 1 if opening.form is None else number
    return Source(
        document.path, document.name, encoding, bytes_read, digest, opening.form, opening.packing, wanted.name,
        documents, 0 if opening.form is None else empty, size,
    )  # fmt: skip


def _texts(path: Path, file: InputFile, form: str | None, encoding: str, field: TextField) -> Iterator[str]:
    """The texts of a file's records; for plain text its chunks.

    Raises:
        UnusableTextError: the file is binary.
    """
    if form is not None:
        yield from READERS[form](file, encoding, field)
        return
    is_first = True
    for text in decoded(file.chunks(), encoding):
        if "\0" in text or (is_first and looks_binary(text[:65536].encode("utf-8", "replace"))):
            raise binary(path)
        is_first = is_first and not text
        yield text


def read_documents(source: Source) -> Iterator[Piece]:
    """Read the documents of a file in order, each in one piece or several.

    Raises:
        InputError: the file has changed since the survey, or cannot be read.
    """
    changed = InputError(f"input {one_line(source.path)} changed while it was read; prepare it again")
    number = 0
    try:
        with InputFile(source.path, source.packing) as file:
            for piece in _pieces(source, file):
                number += piece.ends
                yield piece
            found = file.finish()
        if found != (source.bytes, source.sha256) or number != source.documents:
            raise changed
    except (NotInEncodingError, RecordError, NoFieldError, DamagedError):
        raise changed from None
    except OSError as error:
        raise InputError(f"input {one_line(source.path)} cannot be read any more: {error.strerror}") from None


def _pieces(source: Source, file: InputFile) -> Iterator[Piece]:
    if source.form is None:
        yield from _cut((text, file.position) for text in decoded(file.chunks(), source.encoding))
        return
    for text in READERS[source.form](file, source.encoding, TextField(source.field)):
        if len(text) > _PART_CHARACTERS:
            parts = range(0, len(text), _PART_CHARACTERS)
            yield from _cut((text[first : first + _PART_CHARACTERS], file.position) for first in parts)
        elif text:
            yield Piece(text, file.position, ends=True)


def _cut(parts: Iterable[tuple[str, int]]) -> Iterator[Piece]:
    """Cut one document into pieces; a part is some of its text, and the number of bytes of the file read so far."""
    kept, read, searched = "", 0, 0
    held: Piece | None = None  # the last piece is known when the text has ended
    for text, read in parts:
        kept += text
        while len(kept) >= PIECE_CHARACTERS and (place := cut_place(kept, searched)):
            if held is not None:
                yield held
            held = Piece(kept[:place], read, ends=False)
            kept, searched = kept[place:], 0
        searched = len(kept) if len(kept) >= PIECE_CHARACTERS else 0
    if held is not None and kept:
        yield held
    if kept:
        yield Piece(kept, read, ends=True)
    elif held is not None:
        yield held._replace(ends=True, read=read)
