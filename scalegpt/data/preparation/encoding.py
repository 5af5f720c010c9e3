"""Encode batches of text on all cores, in order."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from scalegpt.data.preparation.batches import Batch, Position
from scalegpt.data.tokenizers import TokenIds, Tokenizer


@dataclass(frozen=True)
class Encoded:
    """The tokens of a batch.

    Attributes:
        train: token ids of the training text [N]; with ``tails`` of all text, without the tokens around documents.
        val: token ids of the held-out text [M].
        is_empty: whether the batch has no text.
        ends: whether the batch's last document ends with it.
        position: the position after the batch.
    """

    train: TokenIds
    val: TokenIds
    is_empty: bool
    ends: bool
    position: Position


class BatchEncoder:
    """Encodes one batch after another.

    Args:
        tokenizer: the tokenizer.
        marks: whether the tokens that begin and end documents are put around them.
    """

    def __init__(self, tokenizer: Tokenizer, *, marks: bool) -> None:
        self._tokenizer = tokenizer
        self._begin, self._end = (
            np.array([token] if token is not None and marks else [], dtype=tokenizer.dtype)
            for token in (tokenizer.document_start, tokenizer.end_of_text)
        )

    def encode(self, batch: Batch) -> Encoded:
        """Encode a batch.

        Raises:
            InputError: the tokenizer cannot encode the text.
        """
        whole = iter(self._tokenizer.encode_batch([each.text for each in batch.segments if not each.before]))
        train, val = [self._begin[:0]], [self._begin[:0]]
        for segment in batch.segments:
            part = val if segment.is_held_out else train
            if segment.before:
                part.append(self._tokenizer.encode_after(segment.before, segment.text))
            else:
                part += (self._begin, next(whole))
            if segment.ends:
                part.append(self._end)
        ends = bool(batch.segments) and batch.segments[-1].ends
        return Encoded(np.concatenate(train), np.concatenate(val), not batch.segments, ends, batch.position)


def encoded(batches: Iterable[Batch], encoder: BatchEncoder, workers: int) -> Generator[Encoded, None, None]:
    """Encode batches on ``workers`` threads, and yield them in order; a few batches more than threads are in memory.

    Threads suffice: tiktoken and tokenizers release Python's global lock while they encode, and a batch takes them far longer
    than Python takes to read it.
    """
    waiting: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(encoder.encode, batch))
                if len(waiting) > workers + 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
