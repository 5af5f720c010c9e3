"""How well a model predicts a text: loss, perplexity and bits per byte.

Every token is predicted once, in a window of the text, from the tokens before it in that window. A window spans up to
``block_size`` + 1 tokens: its inputs, and its targets, which are the inputs shifted by one. The last target of a window
is the first input of the next, so only the first token of a stream is never a target. (If the model was trained on
packed documents, the first token of each document is never a target.) With a stride below ``block_size`` windows
overlap, and each counts only the targets that earlier windows have not counted. This is the sliding window of
transformers' guide to perplexity (https://huggingface.co/docs/transformers/perplexity).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalegpt.errors import InputError
from scalegpt.inference.texts import Ids, Piece, Text
from scalegpt.model.chunk import IGNORED
from scalegpt.model.generation import DivergedError
from scalegpt.model.gpt import GPT

Progress = Callable[[float, int], None]
"""A function that is called with the share of the text that has been read, and the number of tokens scored."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        nats: the negative log-likelihood of all scored tokens together, in nats.
        tokens: number of scored tokens.
        bytes: size of the whole text in UTF-8, in bytes.
        documents: number of documents; None if it is not known.
        split: the split of prepared tokens; None for the text of files, or for a mixture with text of files.
        name: the source, as the user named it.
        weight: the source's part of a mixture, from 0 to 1.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int | None
    split: str | None
    name: str = field(default="", compare=False)
    weight: float = 1.0

    @property
    def sources(self) -> tuple["Evaluation", ...]:
        """The evaluation of each source of a mixture; empty for one text."""
        return ()

    @property
    def loss(self) -> float:
        """The mean negative log-likelihood of a token, in nats: cross entropy, as in training."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite if it exceeds the range of a float. It depends on the tokenizer."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """The negative log-likelihood of all scored tokens in bits, per byte of text.

        It is comparable across tokenizers.
        """
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class MixedEvaluation(Evaluation):
    """The evaluation of a mixture. ``nats``, ``tokens`` and ``bytes`` are sums; the means are over the sources by weight.

    Attributes:
        parts: the evaluation of each source.
    """

    parts: tuple[Evaluation, ...] = ()

    @property
    def sources(self) -> tuple[Evaluation, ...]:
        """The evaluation of each source."""
        return self.parts

    @property
    def loss(self) -> float:
        """The mean of the sources' losses, in nats per token, each with the source's weight: what training minimises."""
        return sum(part.weight * part.loss for part in self.parts)

    @property
    def bits_per_byte(self) -> float:
        """The bits of a token over its bytes, both as a mean over the sources by weight."""
        size = sum(part.weight * part.bytes / part.tokens for part in self.parts)
        return self.loss / math.log(2) / size


def mean_of(parts: Sequence[Evaluation]) -> MixedEvaluation:
    """The evaluation of a mixture from those of its sources."""
    known = [part.documents for part in parts if part.documents is not None]
    splits = {part.split for part in parts}
    return MixedEvaluation(
        nats=sum(part.nats for part in parts),
        tokens=sum(part.tokens for part in parts),
        bytes=sum(part.bytes for part in parts),
        documents=sum(known) if len(known) == len(parts) else None,
        split=parts[0].split if len(splits) == 1 else None,
        parts=tuple(parts),
    )


def part_of(progress: Progress, done: Sequence[Evaluation], texts: int) -> Progress:
    """The progress of a text as that of all ``texts``, after those that are ``done``."""
    before, tokens = len(done), sum(each.tokens for each in done)
    return lambda share, scored: progress((before + share) / texts, tokens + scored)


class Window(NamedTuple):
    """A part of a stream.

    Attributes:
        ids: int64 [t + 1], t at least 1 and at most ``block_size``: inputs, and the last target.
        counted: number of leading targets that an earlier window has counted, less than t.
        share: how much of the whole text has been read, from 0 to 1.
    """

    ids: Ids
    counted: int
    share: float


@torch.no_grad()
def evaluate(
    model: GPT, text: Text, *, stride: int | None = None, micro_batch: int = 8, progress: Progress | None = None
) -> Evaluation:
    """Score every token of a text except the first of each stream, and of each document if the model packs documents.

    Args:
        model: the model, in evaluation mode.
        text: what to score; its streams are consumed.
        stride: tokens between the starts of two windows, from 1 to ``block_size``; None: ``block_size``.
        micro_batch: windows in a forward pass.
        progress: called after each forward pass.

    Raises:
        InputError: the stride is larger than ``block_size``, the text has no token to score, or it cannot be read.
        DivergedError: the loss is not finite.
    """
    block = model.config.block_size
    step = block if stride is None else stride
    if not 1 <= step <= block:
        raise InputError(
            f"stride {step} is not from 1 to the model's block_size {block}: tokens between windows would not be scored"
        )
    size = _Size()
    nats = torch.zeros((), dtype=torch.float64, device=model.wte.weight.device)
    tokens = 0
    windows = (window for stream in text.streams for window in cut_windows(size.counted(stream), block, step))
    for batch in _batches(windows, micro_batch):
        inputs, targets, count = _tensors(batch, model.document_end, model.wte.weight.device)
        nats += model(inputs, targets).double() * count
        tokens += count
        if progress is not None:
            progress(batch[-1].share, tokens)
    if not tokens:
        raise InputError("the text is too short: it has no token after its first; give a longer text")
    if not nats.isfinite():
        raise DivergedError("the loss is not finite: training diverged; use an earlier checkpoint, or train again")
    return Evaluation(nats.item(), tokens, size.bytes, text.documents, text.split, text.name, text.weight)


class _Size:
    """Adds up the bytes of the pieces that are read through :meth:`counted`."""

    def __init__(self) -> None:
        self.bytes = 0

    def counted(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self.bytes += piece.bytes
            yield piece


def cut_windows(pieces: Iterator[Piece], block_size: int, stride: int) -> Iterator[Window]:
    """Cut a stream into windows that together count every token but the first as a target, each exactly once.

    Args:
        pieces: the stream.
        block_size: T; all windows but the last span T + 1 tokens.
        stride: tokens between the starts of two windows, from 1 to T.
    """
    held, counted, share = np.empty(0, dtype=np.int64), 0, 0.0
    for piece in pieces:
        held, share = np.concatenate([held, piece.ids]), piece.share
        while len(held) > block_size:
            yield Window(held[: block_size + 1], counted, share)
            held, counted = held[stride:], block_size - stride
    if len(held) > counted + 1:
        yield Window(held, counted, share)


def _batches(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _tensors(windows: list[Window], document_end: int | None, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Inputs and targets, int64 [B, t] with t of the longest window, and the number of targets that count.

    Shorter windows are padded at their end, which earlier positions do not attend to. With packed documents, the token
    after ``document_end`` is not counted.
    """
    length = max(len(window.ids) for window in windows) - 1
    inputs = np.zeros((len(windows), length), dtype=np.int64)
    targets = np.full_like(inputs, IGNORED)
    for row, (ids, counted, _) in enumerate(windows):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, counted : len(ids) - 1] = ids[1 + counted :]
    if document_end is not None:
        targets[inputs == document_end] = IGNORED
    count = int((targets != IGNORED).sum())
    return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), count
