"""Survey the files that the user gives: check that they are text, and choose what is read of folders.

If a file that the user named is not text, an error ends the command. Inside a folder, files that are not text are skipped,
and the number of files skipped is reported for each reason. A folder that is mostly data in other formats is refused. A
record that cannot be read is an error in a folder too, so that no part of a data set goes missing.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scalegpt.data.text.decoding import OtherFormError, UnusableTextError
from scalegpt.data.text.documents import OUTSIDE_LINK, Document, Tally, find_documents, is_folder, real_path
from scalegpt.data.text.encodings import codec_name
from scalegpt.data.text.formats import HEAD_BYTES, PACKED, PACKED_SUFFIXES, Format, Kind, recognise
from scalegpt.data.text.ignoring import EXCLUDED, IGNORED, NOT_INCLUDED, Selection
from scalegpt.data.text.ours import file_of_ours
from scalegpt.data.text.packed import INSTALL, MissingPackageError, unpacked_head
from scalegpt.data.text.reading import Opening, Source, examine, unreadable
from scalegpt.data.text.records.table import READERS, lacks_package
from scalegpt.errors import InputError
from scalegpt.storage import NotPlainError, open_plain
from scalegpt.text import one_line

_UNICODE_SIZE = 0x110000

_ALL = Selection()

WITHOUT_TEXT = "record without text"
"""The reason under which records with an empty text are counted."""


@dataclass
class Corpus:
    """The documents of a preparation, and tallies of the files that were skipped.

    Attributes:
        encoding: the encoding that the user asked for; with ``auto`` each source has its own.
        sources: the documents, in an order that depends only on names and contents.
        skipped: numbers of files and folders inside the user's folders, and of records without text, that are not read, by
            reason.
        read_as_written: numbers of sources in formats of records (JSON Lines, CSV) that are read as plain text, by format.
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

    @property
    def documents(self) -> int:
        """Number of documents in all sources together."""
        return sum(source.documents for source in self.sources)

    @property
    def text_bytes(self) -> int:
        """Size of the text of all documents together, in bytes of UTF-8."""
        return sum(source.text_bytes for source in self.sources)


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

    def add(self, document: Document, form: Format | None, size: int, reason: str | None = None) -> None:
        """Count a file that is read, or that is skipped because of its format.

        Args:
            document: the file.
            form: its format; None for plain text, and for records whose field is read.
            size: its size in bytes.
            reason: why it is skipped, in a few words; None: it is read.
        """
        kind = None if form is None else form.kind
        self.files[kind] += 1
        self.bytes[kind] += size
        if form is not None and form.kind is not Kind.OTHER:
            self.formats.add(reason or form.name, document.name)

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
    text_field: str | None = None,
    want_characters: bool = False,
    as_text: bool = False,
    selection: Selection = _ALL,
) -> Corpus:
    """Read every file once: check that it is text, count its documents, and record its size and SHA-256.

    Args:
        inputs: files and folders that the user named.
        encoding: the encoding of all files, or ``auto`` to detect each file's.
        text_field: the field of records (JSON Lines, CSV …) that holds the text; None: ``text``, else ``content``.
        want_characters: also collect all distinct characters, for the vocabulary of a ``char`` tokenizer.
        as_text: accept named files of markup (HTML, XML …), and folders that are mostly data; read them, and records, as they
            are written.
        selection: which files of folders are read.

    Raises:
        InputError: a named file is not text in that encoding, a folder has no such text or is mostly other data, or a record
            of any file cannot be read.
    """
    documents, skipped = find_documents(inputs, selection)
    corpus = Corpus(codec_name(encoding), skipped=skipped)
    seen = np.zeros(_UNICODE_SIZE, dtype=bool) if want_characters else None
    shares: dict[Path, _Shares] = {}
    for document in documents:
        share = shares.setdefault(document.folder, _Shares()) if document.folder is not None else None
        look: _Look | None = None
        try:
            look = _look(document)
            opening = _opening(document, look, as_text=as_text)
            source = examine(document, opening, corpus.encoding, text_field, seen)
        except UnusableTextError as error:
            if share is None:
                raise
            corpus.skipped.add(error.reason, document.name)
            if look is not None and isinstance(error, OtherFormError):
                share.add(document, look.form, look.size, error.reason)
            continue
        corpus.sources.append(source)
        corpus.skipped.add(WITHOUT_TEXT, document.name, source.empty)
        if share is not None:
            share.add(document, None if source.form is not None else look.form, source.bytes)
            if source.form is None and look.form is not None and look.form.kind is Kind.RECORDS:
                corpus.read_as_written.add(look.form.name, document.name)
    if not as_text:
        _check_data_sets(shares)
    _check_folders(inputs, corpus, documents)
    # Sources of equal names are sorted by content, so that the order of the inputs does not matter.
    corpus.sources.sort(key=lambda source: (source.name, source.sha256))
    if seen is not None:
        corpus.characters = np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    return corpus


def _check_data_sets(shares: dict[Path, _Shares]) -> None:
    """Refuse folders that are mostly data in forms that are not read."""
    for folder, share in shares.items():
        if share.is_mostly_data:
            raise InputError(
                f"most of folder {one_line(folder)} is not plain text and is not read: {share.formats}; name the field of "
                "records with --text_field, leave files out with --exclude, or use --as_text true to train on its text files "
                "as they are"
            )


def _check_folders(inputs: Sequence[str | Path], corpus: Corpus, documents: Sequence[Document]) -> None:
    """Refuse folders without any text."""
    usable = {source.path for source in corpus.sources}
    for folder in (Path(given) for given in inputs if is_folder(Path(given))):
        real = real_path(folder)
        inside = [each for each in documents if each.folder == folder or each.real.is_relative_to(real)]
        if not any(document.path in usable for document in inside):
            skipped = f"; skipped: {corpus.skipped}" if corpus.skipped.counts else ""
            raise InputError(
                f"folder {one_line(folder)} holds no text in {corpus.encoding}{skipped}; {_remedies(corpus)}"
            )


def _remedies(corpus: Corpus) -> str:
    """What to do about a folder without text: what the reasons for skipping its files suggest."""
    remedies = {
        f"not {corpus.encoding}": "give its --encoding, or --encoding auto",
        NOT_INCLUDED: "change --include",
        EXCLUDED: "change --exclude",
        OUTSIDE_LINK: "use --follow_links true",
        IGNORED: "use --gitignore false",
    }
    return ", or ".join(["name another folder", *(remedies[key] for key in remedies if key in corpus.skipped.counts)])


@dataclass(frozen=True)
class _Look:
    """What a file is, by its first bytes and its name.

    Attributes:
        form: its format, or that of its unpacked content; None for plain text.
        packing: how it is compressed; None: not at all.
        head: the first bytes of its content, unpacked.
        size: size of the file in bytes.
    """

    form: Format | None
    packing: str | None
    head: bytes
    size: int


def _look(document: Document) -> _Look:
    """Recognise what a file is.

    Raises:
        UnusableTextError: ScaleGPT wrote the file, or it cannot be read or unpacked.
    """
    path = document.path
    try:
        with open_plain(path) as file:
            ours = file_of_ours(file, named=document.folder is None)
            head = file.read(HEAD_BYTES)
            size = os.fstat(file.fileno()).st_size
        if ours is not None:
            raise UnusableTextError(
                ours, f"input {one_line(path)} is a {ours}, not text to train on; name another file"
            )
        name = path.stem if path.suffix.lower() in PACKED_SUFFIXES else path.name
        form = recognise(name, head)
        if form is None or form not in PACKED:
            return _Look(form, None, head, size)
        packing = form.name
        head = unpacked_head(path, packing, HEAD_BYTES)
    except MissingPackageError:
        return _Look(Format(packing, Kind.CONTAINER, INSTALL), packing, b"", size)
    except NotPlainError:
        message = f"input {one_line(path)} is not a regular file; copy its text into one"
        raise UnusableTextError("unreadable", message) from None
    except OSError as error:
        raise unreadable(path, error) from None
    form = recognise(name, head)
    if form is not None and not form.is_readable:
        form = Format(f"{form.name} in {packing}", form.kind, "unpack it first")
    return _Look(form, packing, head, size)


def _opening(document: Document, look: _Look, *, as_text: bool) -> Opening:
    """Decide how a file is read.

    Raises:
        OtherFormError: it is not read.
    """
    form = look.form
    if form is not None and form.name in READERS and not (as_text and form.is_readable):
        if lacks_package(form.name):
            raise OtherFormError(form.name, f"input {one_line(document.path)}: {MissingPackageError(form.name)}")
        return Opening(form.name, look.packing, look.head)
    if form is None or (form.is_readable and (as_text or document.folder is not None)):
        return Opening(None, look.packing, look.head)
    what = f"binary ({form.name}), not text" if form.kind is Kind.OTHER else f"{form.name}, not plain text"
    hint = ", or use --as_text true to train on it as it is" if form.is_readable else ""
    raise OtherFormError(form.name, f"input {one_line(document.path)} is {what}; {form.remedy}{hint}")
