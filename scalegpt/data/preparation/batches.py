"""Read a corpus in batches of text, each large enough for a worker, from any position on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from scalegpt.data.preparation.documents import digest_of, documents_in, encoded_text, text_digest
from scalegpt.data.preparation.split import Split
from scalegpt.data.text.reading import Piece, Source, read_documents

BATCH_CHARACTERS = 1 << 20
"""A batch is given to a worker when its text has so many characters, or is one piece of a document."""

KEPT_DIGEST_BYTES = 16
"""The bytes of a document's SHA-256 that are kept to find its copies.

Two different documents of 10⁹ agree in 128 bits with a probability of 10⁻²¹.
"""


@dataclass(frozen=True)
class Position:
    """How far a preparation has come: all text before it is done.

    Attributes:
        source: index of the source that is read on.
        pieces: number of pieces of it that are done.
        read: bytes of all sources that are done.
        documents: number of documents that are done, without those that were dropped.
        held_out: number of them that are held out whole.
        duplicates: number of documents that were dropped as copies of an earlier one.
    """

    source: int = 0
    pieces: int = 0
    read: int = 0
    documents: int = 0
    held_out: int = 0
    duplicates: int = 0


@dataclass(frozen=True)
class Segment:
    """A part of a document in a batch.

    Attributes:
        text: the characters.
        before: the text before it in its document, of the piece before; empty at the document's beginning.
        ends: whether it is the document's last part.
        is_held_out: whether its document is held out whole.
    """

    text: str
    before: str
    ends: bool
    is_held_out: bool


@dataclass(frozen=True)
class Batch:
    """Parts of documents that a worker encodes together, in order.

    Attributes:
        segments: the parts; empty if only copies of earlier documents were read.
        position: the position after the batch.
    """

    segments: list[Segment]
    position: Position


class SeenDocuments:
    """The documents so far, of whose digests :data:`KEPT_DIGEST_BYTES` are kept: about 100 MB of memory for a million.

    Args:
        known: the kept digests of the documents before the position at which reading begins.

    Attributes:
        fresh: the kept digests of the documents since, in order, as far as :class:`~.writer.TokenWriter` has not stored them.
    """

    def __init__(self, known: Iterable[bytes] = ()) -> None:
        self._known = set(known)
        self.fresh: list[bytes] = []

    def __contains__(self, digest: bytes) -> bool:
        return digest[:KEPT_DIGEST_BYTES] in self._known

    def add(self, digest: bytes) -> None:
        """Remember a document."""
        kept = digest[:KEPT_DIGEST_BYTES]
        self._known.add(kept)
        self.fresh.append(kept)


class BatchReader:
    """Reads documents in order and divides them into batches; iterate over it.

    With ``tails`` a batch holds text of one document, since the end of each document is cut off when it has been encoded.

    Args:
        sources: the surveyed files.
        split: which documents are held out whole.
        seen: the documents so far, if copies of them are dropped; else None.
        begin: the position to begin at.

    Raises:
        InputError: while it is iterated over: a file has changed since the survey, or cannot be read.
    """

    def __init__(self, sources: Sequence[Source], split: Split, seen: SeenDocuments | None, begin: Position) -> None:
        self._sources, self._split, self._seen = sources, split, seen
        self._source, self._pieces, self._done = begin.source, begin.pieces, begin.read
        self._documents, self._held_out, self._duplicates = begin.documents, begin.held_out, begin.duplicates
        self._segments: list[Segment] = []
        self._characters = 0
        self._needs_digests = seen is not None or split.method == "documents"

    def __iter__(self) -> Iterator[Batch]:
        before = sum(source.bytes for source in self._sources[: self._source])
        for source in self._sources[self._source :]:
            is_file = source.form is None  # one document, whose pieces come one by one
            digest = text_digest(source) if is_file and self._needs_digests else b""
            if is_file and not self._pieces and self._is_copy(digest):
                self._duplicates += 1
            else:
                yield from self._read(source, digest, before)
            before += source.bytes
            self._source, self._pieces, self._done = self._source + 1, 0, before
        yield self._batch()

    def _is_copy(self, digest: bytes) -> bool:
        return self._seen is not None and digest in self._seen

    def _read(self, source: Source, digest: bytes, before: int) -> Iterator[Batch]:
        for text_before, pieces in self._parts(source):
            if source.form is not None and self._needs_digests:
                digest = digest_of(encoded_text(piece.text) for piece in pieces)
            if source.form is not None and self._is_copy(digest):
                self._duplicates += 1
            else:
                self._add(pieces, text_before, digest)
            self._pieces, self._done = self._pieces + len(pieces), before + pieces[-1].read
            ends_tail = self._split.method == "tails" and pieces[-1].ends
            if self._characters >= BATCH_CHARACTERS or (ends_tail and self._segments):
                yield self._batch()

    def _parts(self, source: Source) -> Iterator[tuple[str, list[Piece]]]:
        """The pieces from the position on, with the text before them in their document.

        Pieces of a record come together, those of a file that is one document one by one.
        """
        skipped, text_before = self._pieces, ""
        parts = documents_in(source) if source.form is not None else ([piece] for piece in read_documents(source))
        for pieces in parts:
            if skipped:
                skipped -= len(pieces)
            else:
                yield text_before, pieces
            text_before = "" if pieces[-1].ends else pieces[-1].text

    def _add(self, pieces: list[Piece], text_before: str, digest: bytes) -> None:
        """Add a part of a document to the batch."""
        is_held_out = self._split.method == "documents" and self._split.holds_out(digest)
        for piece in pieces:
            self._segments.append(Segment(piece.text, text_before, piece.ends, is_held_out))
            self._characters += len(piece.text)
            text_before = piece.text
        if pieces[-1].ends:
            self._documents += 1
            self._held_out += is_held_out
            if self._seen is not None:
                self._seen.add(digest)

    def _batch(self) -> Batch:
        position = Position(self._source, self._pieces, self._done, self._documents, self._held_out, self._duplicates)
        batch = Batch(self._segments, position)
        self._segments, self._characters = [], 0
        return batch
