"""Which part of the text is held out for validation: decided by contents alone, neither by names nor by chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from scalegpt.data.text.corpus import Source

DEFAULT_VAL_FRACTION = 0.1
DEFAULT_VAL_BYTES = 8_000_000
WHOLE_DOCUMENTS_FROM = 20
"""From this number of documents on, whole ones are held out; of fewer, the end of each."""


@dataclass(frozen=True)
class Split:
    """What is held out.

    Attributes:
        method: ``documents``: whole ones; ``tails``: the end of each document.
        fraction: the share of bytes aimed at.
        held_out: indices of the documents that are held out whole.
    """

    method: str
    fraction: float
    held_out: frozenset[int] = frozenset()


def choose_split(sources: Sequence[Source], val_fraction: float | None) -> Split:
    """Choose what to hold out of the documents; ``val_fraction`` None: a tenth of the bytes, at most about 8 MB.

    Whole documents are taken in the order of their SHA-256, copies of one together, until the share is reached. A document
    that would overshoot it by half is passed over: among many small files a giant must not become the validation set. Where
    that leaves less than half of the share, the end of each document is held out instead.
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
