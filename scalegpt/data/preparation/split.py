"""Choose the text that is held out for validation, by the documents' contents alone: not by names, nor at random."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from scalegpt.data.preparation.documents import digest_of, documents_in, encoded_text, text_digest
from scalegpt.data.text.reading import Source

DEFAULT_VAL_FRACTION = 0.1
DEFAULT_VAL_BYTES = 8_000_000
WHOLE_DOCUMENTS_FROM = 20
"""Of at least this many documents, some are held out whole; of fewer, the end of each document is held out."""

ENOUGH_HELD_OUT = 100
"""Records are not read for their hashes where so many are expected to be held out: the share is then about as asked.

That fewer than half of 100 expected documents are held out has a probability below 10⁻⁷.
"""

LEAST, MOST = 0.5, 2.0
"""Whole documents are held out if their share of the text is between these multiples of the share that is asked for."""


@dataclass(frozen=True)
class Split:
    """The rule that says which text is held out.

    Attributes:
        method: ``documents`` if whole documents are held out, ``tails`` if the end of each document is.
        fraction: target share of the text that is held out, from 0 to 1.
    """

    method: str
    fraction: float

    def holds_out(self, digest: bytes) -> bool:
        """Whether a document is held out whole by the method ``documents``: by the SHA-256 of its text.

        The answer depends on the document alone, so it stays the same as data grow. With a smaller fraction, a part of the
        same documents is held out.
        """
        return int.from_bytes(digest[:8], "big") < self.fraction * 2**64


def choose_split(sources: Sequence[Source], val_fraction: float | None) -> Split:
    """Choose how a share ``val_fraction`` of the text is held out.

    None: of fewer than :data:`WHOLE_DOCUMENTS_FROM` documents a tenth, at most about 8 MB; of more, the largest of 0.1, 0.01,
    0.001, … that is at most about 8 MB, so that the rule does not change with each document that is added.

    The ends of documents are held out in place of whole ones where the hashes of the documents would hold out less than half
    or more than twice the share, because documents are few or one of them is huge.
    """
    total = sum(source.bytes for source in sources)
    documents = sum(source.documents for source in sources)
    tails = Split(
        "tails", min(DEFAULT_VAL_FRACTION, DEFAULT_VAL_BYTES / total) if val_fraction is None else val_fraction
    )
    if documents < WHOLE_DOCUMENTS_FROM:
        return tails
    whole = Split("documents", _power_of_ten(total) if val_fraction is None else val_fraction)
    are_records = any(source.form is not None for source in sources)
    if are_records and documents * whole.fraction >= ENOUGH_HELD_OUT:
        return whole
    return whole if LEAST <= _held_out_share(sources, whole) / whole.fraction <= MOST else tails


def _power_of_ten(total: int) -> float:
    power = 1
    while total > DEFAULT_VAL_BYTES * 10**power:
        power += 1
    return float(f"1e-{power}")


def _held_out_share(sources: Iterable[Source], split: Split) -> float:
    """The share of the text, in bytes of UTF-8, whose documents are held out. Records are read once."""
    held = total = 0
    for digest, size in _documents(sources):
        total += size
        held += size if split.holds_out(digest) else 0
    return held / total


def _documents(sources: Iterable[Source]) -> Iterator[tuple[bytes, int]]:
    """The digest of each document, and the size of its text in UTF-8."""
    for source in sources:
        if source.form is None:
            yield text_digest(source), source.text_bytes
        else:
            for pieces in documents_in(source):
                texts = [encoded_text(piece.text) for piece in pieces]
                yield digest_of(texts), sum(map(len, texts))
