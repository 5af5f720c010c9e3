"""Check that files are text, and read them piece by piece in bounded memory.

A file that the user named must be text, or the command ends. Inside a folder, what is not text is skipped, counted and
reported by reason; a folder that is mostly data in another format is refused.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scalegpt.data.text.decoding import (
    NotInEncodingError,
    UnusableTextError,
    binary,
    decoded,
    encoding_instead,
    unsure,
)
from scalegpt.data.text.diagnosis import read_at
from scalegpt.data.text.documents import SAVED, Document, Tally, find_documents, is_folder, real_path
from scalegpt.data.text.encodings import AUTO, UTF8, byte_order_mark, codec_name, looks_binary
from scalegpt.data.text.formats import HEAD_BYTES, Format, Kind, recognise
from scalegpt.data.text.ours import file_of_ours
from scalegpt.data.tokenizers import code_points
from scalegpt.errors import InputError
from scalegpt.storage import NotPlainError, open_plain
from scalegpt.text import one_line

PIECE_CHARACTERS = 1 << 20
"""A piece of this many characters (1 to 4 MB of UTF-8) is cut at the last place that allows it."""

HARD_LIMIT_CHARACTERS = 8 << 20
"""Text without such a place is cut anywhere at this length: one or two tokens may differ, and memory stays bounded."""

_CUT = re.compile(r"[ \n](?=\S)")
_UNICODE_SIZE = 0x110000
_Seen = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Source:
    """A document that has been read once and is text.

    Attributes:
        path: its path.
        name: its path inside the folder that the user named.
        encoding: the codec that reads it.
        bytes: its size.
        sha256: of its bytes, in hex.
    """

    path: Path
    name: str
    encoding: str
    bytes: int
    sha256: str


@dataclass
class Corpus:
    """All the text of a preparation.

    Attributes:
        encoding: as asked for; with ``auto`` every file has its own.
        sources: in an order that depends on names and contents alone.
        skipped: what is not read of the folders.
        read_as_written: files of records (JSON Lines, CSV) among the sources.
        characters: every character that occurs, sorted; None where nobody asked.
    """

    encoding: str
    sources: list[Source] = field(default_factory=list)
    skipped: Tally = field(default_factory=Tally)
    read_as_written: Tally = field(default_factory=Tally)
    characters: str | None = None

    @property
    def bytes(self) -> int:
        """Size of all the text."""
        return sum(source.bytes for source in self.sources)


@dataclass
class _Shares:
    """Files and bytes of a folder by kind of format, None for plain text; and the formats whose text is not read as such."""

    files: Counter[Kind | None] = field(default_factory=Counter)
    bytes: Counter[Kind | None] = field(default_factory=Counter)
    formats: Tally = field(default_factory=Tally)

    def add(self, document: Document, form: Format | None, size: int) -> None:
        """Count a file that is read, or skipped for its format."""
        kind = None if form is None else form.kind
        self.files[kind] += 1
        self.bytes[kind] += size
        if form is not None and form.kind is not Kind.OTHER:
            self.formats.add(form.name, document.name)

    @property
    def is_mostly_data(self) -> bool:
        """Whether more than half is records or containers. Markup counts only where most files are markup."""
        text = self.bytes[None] + self.bytes[Kind.MARKUP]
        data = self.bytes[Kind.RECORDS] + self.bytes[Kind.CONTAINER]
        if 2 * self.files[Kind.MARKUP] > sum(self.files.values()) - self.files[Kind.OTHER]:
            text, data = self.bytes[None], data + self.bytes[Kind.MARKUP]
        return data > text


def survey(
    inputs: Sequence[str | Path],
    encoding: str,
    *,
    want_characters: bool = False,
    as_text: bool = False,
    follow_links: bool = False,
) -> Corpus:
    """Read every document once: check that it is text, and take its size and SHA-256.

    Args:
        inputs: files and folders.
        encoding: of all files, or ``auto``.
        want_characters: gather the characters that occur, for a ``char`` vocabulary.
        as_text: read records and markup (JSON, CSV, HTML …) as they are written, and folders that are mostly such data.
        follow_links: follow links that leave a folder.

    Raises:
        InputError: a named file is not text in that encoding, or a folder holds none that is, or is mostly other data.
    """
    documents, skipped = find_documents(inputs, follow_links=follow_links)
    corpus = Corpus(codec_name(encoding), skipped=skipped)
    seen = np.zeros(_UNICODE_SIZE, dtype=bool) if want_characters else None
    shares: dict[Path, _Shares] = {}
    for document in documents:
        share = shares.setdefault(document.folder, _Shares()) if document.folder is not None else None
        try:
            form = _format(document, as_text=as_text)
            source = _examine(document, corpus.encoding, seen)
        except UnusableTextError as error:
            if share is None:
                raise
            corpus.skipped.add(error.reason, document.name)
            if isinstance(error, OtherFormatError):
                share.add(document, error.form, error.size)
            continue
        corpus.sources.append(source)
        if share is not None:
            share.add(document, form, source.bytes)
            if form is not None and form.kind is Kind.RECORDS:
                corpus.read_as_written.add(form.name, document.name)
    if not as_text:
        _check_data_sets(corpus, shares)
    _check_folders(inputs, corpus, documents)
    # Contents decide where names are equal, so that the order of the inputs does not matter.
    corpus.sources.sort(key=lambda source: (source.name, source.sha256))
    if seen is not None:
        corpus.characters = np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    return corpus


def _check_data_sets(corpus: Corpus, shares: dict[Path, _Shares]) -> None:
    """Refuse folders whose text is, wholly or mostly, in formats that are not read."""
    way_out = (
        "write its text to .txt files, one a document, or use --as_text true to train on its text files as they are"
    )
    if SAVED in corpus.skipped.counts:
        example = one_line(corpus.skipped.examples[SAVED])
        raise InputError(
            f"folder {example} is a data set saved by Hugging Face datasets: its text lies in Arrow files; {way_out}"
        )
    for folder, share in shares.items():
        if share.is_mostly_data:
            raise InputError(f"most of folder {one_line(folder)} is not plain text: {share.formats}; {way_out}")


def _check_folders(inputs: Sequence[str | Path], corpus: Corpus, documents: Sequence[Document]) -> None:
    """Refuse folders without any text."""
    usable = {source.path for source in corpus.sources}
    for folder in (Path(given) for given in inputs if is_folder(Path(given))):
        real = real_path(folder)
        inside = [each for each in documents if each.folder == folder or each.real.is_relative_to(real)]
        if not any(document.path in usable for document in inside):
            skipped = f"; skipped: {corpus.skipped}" if corpus.skipped.counts else ""
            raise InputError(
                f"folder {one_line(folder)} holds no text in {corpus.encoding}{skipped}; "
                "name another folder, or give --encoding"
            )


class OtherFormatError(UnusableTextError):
    """A file in a format that is not plain text: its format, and its size in bytes."""

    def __init__(self, document: Document, form: Format, size: int) -> None:
        what = f"binary ({form.name}), not text" if form.kind is Kind.OTHER else f"{form.name}, not plain text"
        as_text = ", or use --as_text true to train on it as it is" if form.is_readable else ""
        super().__init__(form.name, f"input {one_line(document.path)} is {what}; {form.remedy}{as_text}")
        self.form, self.size = form, size


def _format(document: Document, *, as_text: bool) -> Format | None:
    """The format of a document that may be read as text; None for plain text.

    Raises:
        UnusableTextError: it must not be read as text, or cannot be read.
    """
    path = document.path
    try:
        with open_plain(path) as file:
            ours = file_of_ours(file, named=document.folder is None)
            form = recognise(path.name, file.read(HEAD_BYTES))
            size = os.fstat(file.fileno()).st_size
    except NotPlainError:
        message = f"input {one_line(path)} is not a regular file; copy its text into one"
        raise UnusableTextError("unreadable", message) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if ours is not None:
        raise UnusableTextError(ours, f"input {one_line(path)} is a {ours}, not text to train on; name another file")
    if form is None or (form.is_readable and (as_text or document.folder is not None)):
        return form
    raise OtherFormatError(document, form, size)


def _unreadable(path: Path, error: OSError) -> UnusableTextError:
    return UnusableTextError("unreadable", f"input {one_line(path)} cannot be read: {error.strerror}")


def _examine(document: Document, encoding: str, seen: _Seen | None) -> Source:
    """Read a document to its end in the encoding asked for; with ``auto``, in UTF-8 or else in the encoding that it is in."""
    path = document.path
    try:
        mark = byte_order_mark(read_at(path, 0, 4)) if encoding == AUTO else None
        try:
            return _read_to_end(document, (mark or UTF8) if encoding == AUTO else encoding, seen)
        except NotInEncodingError as error:
            guess = encoding_instead(path, encoding, error.offset, mark)
        try:
            return _read_to_end(document, codec_name(guess), seen)
        except NotInEncodingError as error:
            raise unsure(path, guess, error.offset) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_to_end(document: Document, encoding: str, seen: _Seen | None) -> Source:
    digest = hashlib.sha256()
    size = characters = 0
    # The characters of a file that turns out unusable must not join the vocabulary.
    here = None if seen is None else np.zeros_like(seen)
    for chunk, text in decoded(document.path, encoding):
        digest.update(chunk)
        if "\0" in text or (not characters and looks_binary(text[:65536].encode("utf-8", "replace"))):
            raise binary(document.path)
        size, characters = size + len(chunk), characters + len(text)
        if here is not None:
            here[code_points(text)] = True
    if not characters:
        raise UnusableTextError("empty", f"input {one_line(document.path)} is empty; name a file with text in it")
    if seen is not None and here is not None:
        seen |= here
    return Source(document.path, document.name, encoding, size, digest.hexdigest())


def read_pieces(source: Source) -> Iterator[tuple[str, int]]:
    """A document's text in pieces whose ids, joined, are those of the whole text.

    Yields:
        The piece, and the bytes of the file that have been read by then.

    Raises:
        InputError: the file has changed since the survey.
    """
    digest, size, kept = hashlib.sha256(), 0, ""
    changed = InputError(f"input {one_line(source.path)} changed while it was read; prepare it again")
    try:
        for chunk, text in decoded(source.path, source.encoding):
            digest.update(chunk)
            size += len(chunk)
            kept += text
            while len(kept) >= PIECE_CHARACTERS and (place := cut_place(kept)):
                yield kept[:place], size
                kept = kept[place:]
        if digest.hexdigest() != source.sha256:
            raise changed
    except NotInEncodingError:
        raise changed from None
    except OSError as error:
        raise InputError(f"input {one_line(source.path)} cannot be read any more: {error.strerror}") from None
    if kept:
        yield kept, size


def cut_place(text: str) -> int:
    r"""The last place where text may be cut without changing its GPT-2 ids; 0 where there is none yet.

    That is before a space or newline that a non-space follows. GPT-2's pattern matches words, numbers and signs, each
    with at most one space in front, and runs of white space without their last one (``\s+(?!\S)``), which is matched alone
    or with the word after it. So no match crosses such a place. No lookahead crosses it either, except in a run of
    white space that ends there: at the piece's end ``\s++$`` matches what ``\s+(?!\S)`` matched before. There is no
    lookbehind. A newline between two full lines is the usual case; ``\r\n`` and text without lines work too. Python's
    ``\S`` excludes a few control characters that tiktoken's engine does not call spaces, so cuts are only rarer.
    """
    for window in (4096, len(text)):
        places = [match.start() for match in _CUT.finditer(text, max(1, len(text) - window))]
        if places:
            return places[-1]
    return len(text) if len(text) >= HARD_LIMIT_CHARACTERS else 0
