"""Check that files are text, and read them piece by piece in bounded memory.

A file that the user named must be text, or the command ends. Inside a folder, what is not text is left out, counted and
reported by reason.
"""

import codecs
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scalegpt.data.documents import Document, find_documents, is_folder, is_run, real_path
from scalegpt.data.encodings import AUTO, UTF8, byte_order_mark, codec_name, guess_encoding, looks_binary
from scalegpt.data.ours import LOG, RUN, file_of_ours, is_our_output
from scalegpt.data.tokenizers import code_points
from scalegpt.errors import InputError

PIECE_CHARACTERS = 1 << 20
"""A piece is cut at the last place that allows it once so many characters are there: 1 to 4 MB of UTF-8."""

HARD_LIMIT_CHARACTERS = 8 << 20
"""Text with no such place for so long is cut anywhere: one or two tokens may differ there, and memory stays bounded."""

_CHUNK_BYTES = 1 << 20
_CUT = re.compile(r"[ \n](?=\S)")
_UNICODE_SIZE = 0x110000


class UnusableTextError(InputError):
    """A file that cannot be trained on.

    Attributes:
        reason: in a few words, to count by: ``binary``, ``empty``, ``not utf-8``, ``unreadable``, what is ours.

    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Source:
    """A document that has been read through once: it is text.

    Attributes:
        path: where it is.
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
        sources: in an order that depends on names and contents alone.
        encoding: as asked for; ``auto`` lets every file have its own.
        skipped: reason → number of files left out.
        examples: reason → one of those files.
        characters: every character that occurs, sorted; None where nobody asked.

    """

    encoding: str
    sources: list[Source] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    characters: str | None = None

    @property
    def bytes(self) -> int:
        """Size of all the text."""
        return sum(source.bytes for source in self.sources)


def survey(
    inputs: Sequence[str | Path],
    encoding: str,
    *,
    want_characters: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Read every document once: check that it is text, and take its size and SHA-256.

    Args:
        inputs: files and folders.
        encoding: of all files, or ``auto``.
        want_characters: gather the characters that occur, for a ``char`` vocabulary.
        progress: told the bytes read so far.

    Raises:
        InputError: a named file is no text in that encoding, or a folder holds none that is.

    """
    corpus = Corpus(codec_name(encoding))
    seen = np.zeros(_UNICODE_SIZE, dtype=bool) if want_characters else None
    documents = find_documents(inputs)
    done = 0
    for document in documents:
        try:
            source = _examine(document, corpus.encoding, seen)
        except UnusableTextError as error:
            if document.folder is None:
                raise
            corpus.skipped[error.reason] += 1
            corpus.examples.setdefault(error.reason, document.name)
            continue
        corpus.sources.append(source)
        done += source.bytes
        if progress is not None:
            progress(done)
    _check_folders(inputs, corpus, documents)
    # Contents decide where names are equal, so that the order of the inputs does not matter.
    corpus.sources.sort(key=lambda source: (source.name, source.sha256))
    if seen is not None:
        corpus.characters = np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    return corpus


def _check_folders(inputs: Sequence[str | Path], corpus: Corpus, documents: Sequence[Document]) -> None:
    usable = {source.path for source in corpus.sources}
    for folder in (Path(given) for given in inputs if is_folder(Path(given))):
        real = real_path(folder)
        inside = [each for each in documents if each.folder == folder or each.real.is_relative_to(real)]
        if not any(document.path in usable for document in inside):
            left_out = f"; left out: {describe_skipped(corpus)}" if corpus.skipped else ""
            raise InputError(
                f"folder {folder} holds no text in {corpus.encoding}{left_out}; name another, or --encoding"
            )


def describe_skipped(corpus: Corpus) -> str:
    """Say what was left out, as in ``3 binary (such as a.png), 1 empty (b.txt)``; empty where nothing was."""
    return ", ".join(
        f"{count} {reason} ({'such as ' if count > 1 else ''}{corpus.examples[reason]})"
        for reason, count in sorted(corpus.skipped.items())
    )


def _examine(document: Document, encoding: str, seen: "np.typing.NDArray[np.bool_] | None") -> Source:
    """Read a document through in the encoding asked for; with ``auto``, in UTF-8 or else in the encoding detected."""
    try:
        _refuse_ours(document)
        if not document.path.is_file():
            raise UnusableTextError(
                "unreadable", f"input {document.path} is not a regular file; copy its text into one"
            )
        if encoding != AUTO:
            return _read_through(document, encoding, seen)
        with document.path.open("rb") as file:
            mark = byte_order_mark(file.read(4))
        try:
            return _read_through(document, mark or UTF8, seen)
        except NotInEncodingError as error:
            guess = guess_encoding(document.path, error.offset)
            if guess is None:
                raise _binary(document.path) from None
            return _read_through(document, codec_name(guess), seen)
    except OSError as error:
        raise UnusableTextError("unreadable", f"input {document.path} cannot be read: {error.strerror}") from None


def _refuse_ours(document: Document) -> None:
    """Refuse what ScaleGPT has written itself. A file that the user names is taken, except this process's own output.

    Raises:
        UnusableTextError: it is ours.
        OSError: it cannot be read.

    """
    path = document.path
    if path.is_dir():
        kind = RUN if is_run(path) else None
    elif document.folder is None:
        kind = LOG if is_our_output(path) else None
    else:
        kind = file_of_ours(path) if path.is_file() else None
    if kind is not None:
        raise UnusableTextError(kind, f"input {path} is a {kind}, not text to train on; name another file")


def _read_through(document: Document, encoding: str, seen: "np.typing.NDArray[np.bool_] | None") -> Source:
    digest = hashlib.sha256()
    size = characters = 0
    # A file with a character that does not count must not add to the vocabulary of the others.
    here = None if seen is None else np.zeros_like(seen)
    for chunk, text in _decoded(document.path, encoding):
        digest.update(chunk)
        if "\0" in text or (not characters and looks_binary(text[:65536].encode("utf-8", "replace"))):
            raise _binary(document.path)
        size, characters = size + len(chunk), characters + len(text)
        if here is not None:
            here[code_points(text)] = True
    if not characters:
        raise UnusableTextError("empty", f"input {document.path} is empty; name a file with text in it")
    if seen is not None and here is not None:
        seen |= here
    return Source(document.path, document.name, encoding, size, digest.hexdigest())


def _binary(path: Path) -> UnusableTextError:
    return UnusableTextError(
        "binary", f"input {path} is binary, not text; name a text file, or --encoding if it is one"
    )


class NotInEncodingError(UnusableTextError):
    """Bytes that the encoding does not have.

    Attributes:
        offset: of the first such byte in the file.

    """

    def __init__(self, path: Path, encoding: str, offset: int, advice: str) -> None:
        shown = encoding.upper() if encoding == UTF8 else encoding
        super().__init__(f"not {encoding}", f"input {path} is not {shown}: {_byte_at(path, offset)}; {advice}")
        self.offset = offset


def _byte_at(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        byte = file.read(1)
    return f"byte 0x{byte[0]:02x} at byte offset {offset}" if byte else f"it breaks off at byte offset {offset}"


def _refuse_bytes(path: Path, encoding: str, offset: int) -> UnusableTextError:
    """Say what is wrong with the bytes and, for a file that should be UTF-8, what it probably is."""
    if encoding != UTF8:
        return NotInEncodingError(path, encoding, offset, "give its own --encoding, or --encoding auto to detect it")
    guess = guess_encoding(path, offset)
    if guess is None:
        with path.open("rb") as file:
            head = file.read(65536)
        if looks_binary(head):
            return _binary(path)
        advice = "mend the file, or give its --encoding"
    else:
        known = "ISO-8859-1 (latin-1)" if guess == "latin-1" else guess
        advice = f"it is probably {known}: use --encoding {guess}, or --encoding auto"
    return NotInEncodingError(path, encoding, offset, advice)


def _decoded(path: Path, encoding: str) -> Iterator[tuple[bytes, str]]:
    """Yield a file's chunks, each with the text that it completes; line ends are left as they are.

    Raises:
        UnusableTextError: bytes that are not of the encoding.
        OSError: the file cannot be read.

    """
    decoder = codecs.getincrementaldecoder(encoding)(errors="strict")
    offset = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK_BYTES)
            # UTF-8's mark is dropped here: its own codec for that counts offsets from behind it.
            skipped = 3 if offset == 0 and encoding == UTF8 and chunk.startswith(codecs.BOM_UTF8) else 0
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk[skipped:], final=not chunk)
                if encoding != UTF8 and not text.isascii():
                    text.encode()  # some codecs make lone surrogates, which no tokenizer can take
            except UnicodeDecodeError as error:
                raise _refuse_bytes(path, encoding, offset + skipped - pending + error.start) from None
            except UnicodeError:
                raise _refuse_bytes(path, encoding, offset) from None
            yield chunk, text
            if not chunk:
                return
            offset += len(chunk)


def read_pieces(source: Source) -> Iterator[tuple[str, int]]:
    """Yield a document's text in pieces whose ids, joined, are those of the whole text.

    Yields:
        The piece, and how many bytes of the file have been read by then.

    Raises:
        InputError: the file is no longer what the survey saw.

    """
    digest, size, kept = hashlib.sha256(), 0, ""
    try:
        for chunk, text in _decoded(source.path, source.encoding):
            digest.update(chunk)
            size += len(chunk)
            kept += text
            while len(kept) >= PIECE_CHARACTERS and (place := cut_place(kept)):
                yield kept[:place], size
                kept = kept[place:]
        if digest.hexdigest() != source.sha256:
            raise InputError(f"input {source.path} changed while it was read; prepare it again")
    except OSError as error:
        raise InputError(f"input {source.path} cannot be read any more: {error.strerror}") from None
    if kept:
        yield kept, size


def cut_place(text: str) -> int:
    r"""Find the last place where text may be cut without changing its GPT-2 ids, or 0 where there is none yet.

    That is before a space or newline that a non-space follows. GPT-2's pattern matches words, numbers and signs, each
    with at most one space in front, and runs of white space without their last one (``\s+(?!\S)``), which stands alone
    or belongs to the word behind it. So no match crosses such a place. None looks across it either, except a run of
    white space that ends there: ``\s++$`` takes at the piece's end what ``\s+(?!\S)`` took before. And none looks back.
    A newline between two full lines is the usual case; ``\r\n`` and text without lines are served too. Python's
    ``\S`` excludes a few control characters that tiktoken's engine does not call spaces: it is only more careful.
    """
    for window in (4096, len(text)):
        places = [match.start() for match in _CUT.finditer(text, max(1, len(text) - window))]
        if places:
            return places[-1]
    return len(text) if len(text) >= HARD_LIMIT_CHARACTERS else 0
