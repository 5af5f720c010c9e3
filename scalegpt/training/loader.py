"""Batches on the device: which windows a step consumes is the sampler's word, where they go is ours."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalegpt.backends import World
from scalegpt.data.sampler import WindowSampler, cut_windows, held_out_starts, rank_share
from scalegpt.model.loss import IGNORED
from scalegpt.planner.batches import BatchPlan

Tokens = NDArray[np.uint16]


class TrainingBatches:
    """This rank's micro batches of every step.

    Args:
        tokens: the training tokens, memory-mapped.
        plan: how a step is divided.
        world: the ranks.
        seed: decides the order, alone.
    """

    def __init__(self, tokens: Tokens, plan: BatchPlan, world: World, seed: int) -> None:
        self.tokens, self.plan, self.world = tokens, plan, world
        self.sampler = WindowSampler(len(tokens), plan.block_size, seed)

    def step(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro batches of the step that begins at a window: inputs and targets, int64 [B, T]."""
        starts = self.sampler.starts(first, self.plan.sequences)
        for micro in range(self.plan.grad_accum):
            share = rank_share(starts, self.world.rank, self.world.size, micro, self.plan.micro_batch)
            yield on_device(*cut_windows(self.tokens, share, self.plan.block_size), self.world.device)


class HeldOutBatches:
    """The same held-out windows at every evaluation and for any number of ranks.

    Args:
        tokens: the held-out tokens, memory-mapped.
        plan: gives the batch per rank.
        world: the ranks.
        limit: evaluate about so many tokens; all, if there are fewer.
    """

    def __init__(self, tokens: Tokens, plan: BatchPlan, world: World, limit: int) -> None:
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
