"""Batches on the device: which windows a step consumes is the sampler's word, where they go is ours."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalegpt.backends import World
from scalegpt.data.sampler import WindowSampler, cut_windows, held_out_starts, rank_share
from scalegpt.data.stored import StoredTokens, Tokens
from scalegpt.model.chunk import IGNORED
from scalegpt.planner.batches import BatchPlan


class TrainingBatches:
    """This rank's micro batches of every step, cut out of the tokens ahead of time by a thread.

    Args:
        tokens: the training tokens.
        plan: how a step is divided.
        world: the ranks.
        seed: decides the order, alone.
    """

    def __init__(self, tokens: StoredTokens | Tokens, plan: BatchPlan, world: World, seed: int) -> None:
        self.tokens, self.plan, self.world = tokens, plan, world
        self.sampler = WindowSampler(len(tokens), plan.block_size, seed)
        self._ahead: ReadAhead | None = None

    def step(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro batches of the step that begins at a window: inputs and targets, int64 [B, T].

        The step that follows is expected to begin where this one ends; another beginning costs the wait for its first batch.
        """
        if self._ahead is None or self._ahead.position != first:
            self.close()
            self._ahead = ReadAhead(self._from(first), first, on_cuda=self.world.device.type == "cuda")
        ahead = self._ahead
        ahead.position = None  # until the step is read to its end
        for _ in range(self.plan.grad_accum):
            inputs, targets = ahead.next()
            yield inputs.to(self.world.device, non_blocking=True), targets.to(self.world.device, non_blocking=True)
        ahead.position = first + self.plan.sequences

    def close(self) -> None:
        """Read no further."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _from(self, first: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The micro batches of one step after another, without end."""
        while True:
            starts = self.sampler.starts(first, self.plan.sequences)
            for micro in range(self.plan.grad_accum):
                share = rank_share(starts, self.world.rank, self.world.size, micro, self.plan.micro_batch)
                yield cut_windows(self.tokens, share, self.plan.block_size)
            first += self.plan.sequences


class ReadAhead:
    """A thread that keeps a few micro batches ready, in pinned memory where they are to go to a GPU.

    The disk is waited for there, and not between two steps.

    Args:
        batches: endless.
        position: the window at which the next step begins; kept by whoever takes the batches; None: within a step.
        on_cuda: pin them, so that they travel without anybody waiting.
        depth: most batches that are ready.
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
            Exception: what the reading raised.
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
                self._ready.get_nowait()  # it may wait for room
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


class HeldOutBatches:
    """The same held-out windows at every evaluation and for any number of ranks.

    Args:
        tokens: the held-out tokens.
        plan: gives the batch per rank.
        world: the ranks.
        limit: evaluate about so many tokens; all, if there are fewer.
    """

    def __init__(self, tokens: StoredTokens | Tokens, plan: BatchPlan, world: World, limit: int) -> None:
        self.tokens, self.plan, self.world = tokens, plan, world
        self.starts = held_out_starts(len(tokens), plan.block_size, limit)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Inputs, targets [B, T] and how many tokens count; every rank yields equally often.

        Where the windows do not fill the last batch of every rank, what is missing is made up with windows whose targets
        do not count, since sharded models need all ranks in every forward pass.
        """
        per_round = self.plan.micro_batch * self.world.size
        for first in range(0, len(self.starts), per_round):
            mine = first + self.world.rank * self.plan.micro_batch
            share = self.starts[mine : mine + self.plan.micro_batch]
            missing = self.plan.micro_batch - len(share)
            padded = np.concatenate([share, np.zeros(missing, dtype=self.starts.dtype)])
            inputs, targets = cut_windows(self.tokens, padded, self.plan.block_size)
            targets[len(share) :] = IGNORED
            yield *on_device(inputs, targets, self.world.device), len(share) * self.plan.block_size


def on_device(inputs: NDArray[np.int64], targets: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Both arrays as tensors on the device; to CUDA they go through pinned memory without blocking."""
    pair = torch.from_numpy(inputs), torch.from_numpy(targets)
    if device.type == "cuda":
        return pair[0].pin_memory().to(device, non_blocking=True), pair[1].pin_memory().to(device, non_blocking=True)
    return pair
