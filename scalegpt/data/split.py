"""Choose the text that is held out for validation, by the documents' contents alone: not by names, nor at random."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from scalegpt.data.text.reading import Source

DEFAULT_VAL_FRACTION = 0.1
DEFAULT_VAL_BYTES = 8_000_000
WHOLE_DOCUMENTS_FROM = 20
"""Of at least this many documents, some are held out whole; of fewer, the end of each document is held out."""


@dataclass(frozen=True)
class Split:
    """The choice of the held-out text.

    Attributes:
        method: ``documents`` if whole documents are held out, ``tails`` if the end of each document is.
        fraction: target share of the text that is held out, from 0 to 1.
        held_out: indices of the documents that are held out whole; empty for ``tails``.
    """

    method: str
    fraction: float
    held_out: frozenset[int] = frozenset()


def choose_split(sources: Sequence[Source], val_fraction: float | None) -> Split:
    """Choose the held-out text: a share ``val_fraction`` of all bytes; None: a tenth, but at most about 8 MB.

    Whole documents are taken in the order of their SHA-256, identical documents together, until the share is reached. A
    document that would raise the sum above 1.5 times the share is skipped: one large file among many small ones must not
    become the validation set. If less than half of the share is reached, or documents are few, the end of each document is
    held out instead.
    """
    total = sum(source.bytes for source in sources)
    fraction = min(DEFAULT_VAL_FRACTION, DEFAULT_VAL_BYTES / total) if val_fraction is None else val_fraction
    if len(sources) < WHOLE_DOCUMENTS_FROM:
        return Split("tails", fraction)
    target, held, size = fraction * total, set[int](), 0
    order = sorted(range(len(sources)), key=lambda index: sources[index].sha256)
    for _, group in groupby(order, key=lambda index: sources[index].sha256):
        copies = list(group)
        more = sum(sources[index].bytes for index in copies)
        if size + more <= 1.5 * target:
            held.update(copies)
            size += more
        if size >= target:
            break
    return Split("tails", fraction) if size < 0.5 * target else Split("documents", fraction, frozenset(held))
