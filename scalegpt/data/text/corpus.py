"""Check that files are text, and read them piece by piece in bounded memory.

If a file that the user named is not text, an error ends the command. Inside a folder, files that are not text are skipped,
and the number of files skipped is reported for each reason. A folder that is mostly data in other formats is refused.
"""

import hashlib
import os
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
from scalegpt.data.tokenizers.cutting import cut_place
from scalegpt.errors import InputError
from scalegpt.storage import NotPlainError, open_plain
from scalegpt.text import one_line

PIECE_CHARACTERS = 1 << 20
"""When this many characters are in memory (1 to 4 MB of UTF-8), a piece is cut off at :func:`cut_place`."""

_UNICODE_SIZE = 0x110000
_Seen = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Source:
    """A document that has been read once and is text.

    Attributes:
        path: path of the file.
        name: path of the file inside the folder that the user named; the file's name if the user named the file.
        encoding: name of the codec that decodes the file.
        bytes: size of the file in bytes.
        sha256: SHA-256 of the file's bytes, in hex.
    """

    path: Path
    name: str
    encoding: str
    bytes: int
    sha256: str


@dataclass
class Corpus:
    """The documents of a preparation, and tallies of the files that were skipped.

    Attributes:
        encoding: the encoding that the user asked for; with ``auto`` each source has its own.
        sources: the documents, in an order that depends only on names and contents.
        skipped: numbers of files and folders inside the user's folders that are not read, by reason.
        read_as_written: numbers of sources in formats of records (JSON Lines, CSV), by format.
        characters: all distinct characters of the text, sorted; None unless they were asked for.
    """

    encoding: str
    sources: list[Source] = field(default_factory=list)
    skipped: Tally = field(default_factory=Tally)
    read_as_written: Tally = field(default_factory=Tally)
    characters: str | None = None

    @property
    def bytes(self) -> int:
        """Size of all sources together, in bytes."""
        return sum(source.bytes for source in self.sources)


@dataclass
class _Shares:
    """How much of a folder is in each kind of format.

    Attributes:
        files: kind of format, None for plain text → number of files.
        bytes: kind of format, None for plain text → bytes.
        formats: number of files by format, for formats that hold text.
    """

    files: Counter[Kind | None] = field(default_factory=Counter)
    bytes: Counter[Kind | None] = field(default_factory=Counter)
    formats: Tally = field(default_factory=Tally)

    def add(self, document: Document, form: Format | None, size: int) -> None:
        """Count a file that is read, or that is skipped because of its format; ``form`` is None for plain text."""
        kind = None if form is None else form.kind
        self.files[kind] += 1
        self.bytes[kind] += size
        if form is not None and form.kind is not Kind.OTHER:
            self.formats.add(form.name, document.name)

    @property
    def is_mostly_data(self) -> bool:
        """Whether records and containers have more bytes than text. Markup counts as text unless most files are markup."""
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
    """Read every document once: check that it is text, and record its size and SHA-256.

    Args:
        inputs: files and folders that the user named.
        encoding: the encoding of all files, or ``auto`` to detect each file's.
        want_characters: also collect all distinct characters, for the vocabulary of a ``char`` tokenizer.
        as_text: accept named files of records or markup (JSON, CSV, HTML …), and folders that are mostly data; read them
            as they are written.
        follow_links: follow symbolic links to targets outside the user's folders.

    Raises:
        InputError: a named file is not text in that encoding, or a folder has no such text or is mostly other data.
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
    # Sources of equal names are sorted by content, so that the order of the inputs does not matter.
    corpus.sources.sort(key=lambda source: (source.name, source.sha256))
    if seen is not None:
        corpus.characters = np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    return corpus


def _check_data_sets(corpus: Corpus, shares: dict[Path, _Shares]) -> None:
    """Refuse data sets saved by Hugging Face datasets, and folders that are mostly data in other formats."""
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
    """A file is in a format other than plain text.

    Attributes:
        form: the format.
        size: size of the file in bytes.
    """

    def __init__(self, document: Document, form: Format, size: int) -> None:
        what = f"binary ({form.name}), not text" if form.kind is Kind.OTHER else f"{form.name}, not plain text"
        as_text = ", or use --as_text true to train on it as it is" if form.is_readable else ""
        super().__init__(form.name, f"input {one_line(document.path)} is {what}; {form.remedy}{as_text}")
        self.form, self.size = form, size


def _format(document: Document, *, as_text: bool) -> Format | None:
    """Recognise the format of a document that may be read as text; None for plain text.

    Raises:
        UnusableTextError: the format is not read as text, ScaleGPT wrote the file, or the file cannot be read.
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
    """Read a whole document in ``encoding``.

    With ``auto`` the document is read in the encoding of its byte order mark, or in UTF-8 without a mark. If it is not valid
    UTF-8, it is read again in the encoding detected from its bytes.
    """
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
    """Read a document's text in pieces whose token ids, joined, are those of the whole text.

    Yields:
        Each piece, and the number of bytes of the file read so far.

    Raises:
        InputError: the file has changed since the survey, or cannot be read.
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
