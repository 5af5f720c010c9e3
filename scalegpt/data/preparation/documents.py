"""The documents of a corpus one by one, and the digests by which they are held out and compared."""

import hashlib
from collections.abc import Iterable, Iterator

from scalegpt.data.text.encodings import UTF8
from scalegpt.data.text.reading import Piece, Source, read_documents


def documents_in(source: Source) -> Iterator[list[Piece]]:
    """The pieces of each document of a file of records; a record is in memory as a whole anyway."""
    pieces: list[Piece] = []
    for piece in read_documents(source):
        pieces.append(piece)
        if piece.ends:
            yield pieces
            pieces = []


def text_digest(source: Source) -> bytes:
    """The SHA-256 of the text of a file that is one document.

    The survey has it if the text is the file's bytes; else the file is read.
    """
    if source.packing is None and source.encoding == UTF8 and source.text_bytes == source.bytes:
        return bytes.fromhex(source.sha256)
    return digest_of(encoded_text(piece.text) for piece in read_documents(source))


def digest_of(texts: Iterable[bytes]) -> bytes:
    """The SHA-256 of a document's text in UTF-8, which is given in parts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text)
    return digest.digest()


def encoded_text(text: str) -> bytes:
    """Text in UTF-8; a lone surrogate, which a record of JSON may have, is encoded like a character."""
    return text.encode("utf-8", "surrogatepass")
