"""Hold out the end of each document."""

import numpy as np

from scalegpt.data.preparation.batches import SeenDocuments
from scalegpt.data.preparation.encoding import Encoded
from scalegpt.data.preparation.writer import TokenWriter
from scalegpt.data.tokenizers import Tokenizer


class TailWriter:
    """Writes documents one after another; where the whole of a document is known, its end is held out.

    Args:
        writer: what the tokens are written with.
        tokenizer: whose tokens begin and end documents.
        fraction: share of each document that is held out.
    """

    def __init__(self, writer: TokenWriter, tokenizer: Tokenizer, fraction: float) -> None:
        self._writer, self._fraction = writer, fraction
        self._begin, self._end = (
            np.array([] if token is None else [token], dtype=tokenizer.dtype)
            for token in (tokenizer.document_start, tokenizer.end_of_text)
        )

    def write(self, part: Encoded, seen: SeenDocuments | None) -> None:
        """Write a part of a document, or nothing if the part is empty; ``seen`` as for :meth:`TokenWriter.record_if_due`."""
        writer = self._writer
        if part.is_empty:
            return
        if writer.begun is None:
            writer.append("train", self._begin)
            writer.begun = writer.counts()["train"]
        writer.append("train", part.train)
        if not part.ends:
            return
        first = writer.begun
        count = writer.counts()["train"] - first
        # nanoGPT cuts at int(n * 0.9): the same formula gives the same split.
        kept = max(1, int(count * (1 - self._fraction)))
        if kept < count:  # both parts of a divided document end with end-of-text
            writer.hold_out_tail(first + kept, self._end, part.position, seen)
        else:
            writer.begun = None
            writer.append("train", self._end)
