"""Training and held-out batches on the device. A thread reads the training batches ahead of time."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalegpt.backends import World
from scalegpt.data.windows.mixture import MixedTokens
from scalegpt.data.windows.sampler import Batch, MixtureSampler, Windows, held_out_starts, rank_share
from scalegpt.inputs import share_of
from scalegpt.model.chunk import IGNORED
from scalegpt.planner.batches import BatchPlan


class TrainingBatches:
    """The micro batches of this rank, step by step.

    Args:
        tokens: the training tokens of each source.
        plan: gives the micro batch, the accumulation and the block size.
        world: the ranks.
        seed: decides the order of the windows.
        document_end: the token that ends a document, if documents are packed: the target after it is ignored. None: no
            target is ignored.
    """

    def __init__(
        self,
        tokens: MixedTokens,
        plan: BatchPlan,
        world: World,
        seed: int,
        document_end: int | None = None,
    ) -> None:
        self.tokens, self.plan, self.world, self.document_end = tokens, plan, world, document_end
        self.sampler = MixtureSampler(tokens.sizes, tokens.shares, plan.block_size, seed)
        self._ahead: ReadAhead | None = None

    def step(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one step's micro batches as inputs and targets on the device, int64 [B, T].

        The thread reads ahead on the assumption that the next step's windows follow this step's. After a rollback they do
        not, and the caller waits for the first batch.

        Args:
            first: number of the step's first window (training sequence) in the sampler's order.
        """
        if self._ahead is None or self._ahead.position != first:
            self.close()
            self._ahead = ReadAhead(self._from(first), first, on_cuda=self.world.device.type == "cuda")
        ahead = self._ahead
        ahead.position = None  # within the step; set again when its last batch is consumed
        for _ in range(self.plan.grad_accum):
            inputs, targets = ahead.next()
            yield inputs.to(self.world.device, non_blocking=True), targets.to(self.world.device, non_blocking=True)
        ahead.position = first + self.plan.sequences

    def close(self) -> None:
        """End the reading thread, if one runs."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _from(self, first: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the micro batches of all steps from window ``first`` on, without end."""
        while True:
            windows = self.sampler.windows(first, self.plan.sequences)
            for micro in range(self.plan.grad_accum):
                world = self.world
                mine = (rank_share(each, world.rank, world.size, micro, self.plan.micro_batch) for each in windows)
                yield _within_documents(*self.tokens.cut(Windows(*mine), self.plan.block_size), self.document_end)
            first += self.plan.sequences


def _within_documents(inputs: Batch, targets: Batch, end: int | None) -> tuple[Batch, Batch]:
    """Inputs and targets. If documents are packed and end with ``end``, targets that begin a document are ignored."""
    if end is not None:
        targets[inputs == end] = IGNORED
    return inputs, targets


class ReadAhead:
    """A thread that keeps a few micro batches ready, so that no step waits for the disk.

    Args:
        batches: an endless iterator of micro batches, as (inputs, targets).
        position: number of the window (training sequence) at which the next step begins; None while a step is being
            read. The caller updates it.
        on_cuda: whether to pin the batches, so that the copy to the device does not block.
        depth: largest number of micro batches that are kept ready.
    """

    def __init__(
        self,
        batches: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]],
        position: int,
        *,
        on_cuda: bool,
        depth: int = 4,
    ) -> None:
        self.batches, self.on_cuda = batches, on_cuda
        self.position: int | None = position
        self._ready: queue.Queue[tuple[Tensor, Tensor] | Exception] = queue.Queue(depth)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def next(self) -> tuple[Tensor, Tensor]:
        """The next micro batch, in host memory.

        Raises:
            Exception: the error that ended the reading thread.
        """
        batch = self._ready.get()
        if isinstance(batch, Exception):
            raise batch
        return batch

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._ready.get_nowait()  # makes room: the thread may be blocked on a full queue
            self._thread.join(0.01)

    def _run(self) -> None:
        try:
            for inputs, targets in self.batches:
                pair = torch.from_numpy(inputs), torch.from_numpy(targets)
                self._ready.put((pair[0].pin_memory(), pair[1].pin_memory()) if self.on_cuda else pair)
                if self._over.is_set():
                    return
        except Exception as error:
            self._ready.put(error)


class HeldOutBatch(NamedTuple):
    """A micro batch of an evaluation.

    Attributes:
        inputs: int64 [B, T], on the device.
        targets: int64 [B, T], on the device.
        counted: number of targets that count in the loss.
        source: number of the source that all its windows are from.
    """

    inputs: Tensor
    targets: Tensor
    counted: int
    source: int


class HeldOutBatches:
    """The batches of an evaluation. Every evaluation, on any number of ranks, uses the same held-out sequences.

    Each source gives its part of ``limit`` tokens by its weight, rounded up to whole sequences; all its tokens, if it has
    fewer.

    Args:
        tokens: the held-out tokens of each source.
        plan: gives the micro batch and the block size.
        world: the ranks.
        limit: number of tokens to evaluate.
        document_end: as for :class:`TrainingBatches`.
    """

    def __init__(
        self,
        tokens: MixedTokens,
        plan: BatchPlan,
        world: World,
        limit: int,
        document_end: int | None = None,
    ) -> None:
        self.tokens, self.plan, self.world, self.document_end = tokens, plan, world, document_end
        self.starts = [
            held_out_starts(size, plan.block_size, share_of(limit, share))
            for size, share in zip(tokens.sizes, tokens.shares, strict=True)
        ]

    def __iter__(self) -> Iterator[HeldOutBatch]:
        """Yield the batches of one source after the other.

        Every rank yields the same number of batches, since a sharded model needs all ranks in every forward pass. The last
        batch of a source is padded with windows whose targets are ignored.
        """
        per_round = self.plan.micro_batch * self.world.size
        for source, starts in enumerate(self.starts):
            for first in range(0, len(starts), per_round):
                mine = first + self.world.rank * self.plan.micro_batch
                share = starts[mine : mine + self.plan.micro_batch]
                padded = np.concatenate([share, np.zeros(self.plan.micro_batch - len(share), dtype=starts.dtype)])
                windows = Windows(np.full_like(padded, source), padded)
                inputs, targets = self.tokens.cut(windows, self.plan.block_size)
                inputs, targets = _within_documents(inputs, targets, self.document_end)
                targets[len(share) :] = IGNORED
                count = int((targets != IGNORED).sum())
                yield HeldOutBatch(*on_device(inputs, targets, self.world.device), count, source)


def on_device(inputs: NDArray[np.int64], targets: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and targets as tensors on the device. The copy to CUDA is from pinned memory and does not block."""
    pair = torch.from_numpy(inputs), torch.from_numpy(targets)
    if device.type == "cuda":
        return pair[0].pin_memory().to(device, non_blocking=True), pair[1].pin_memory().to(device, non_blocking=True)
    return pair
