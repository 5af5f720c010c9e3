"""Divides the tokens of one optimizer step among ranks, micro batches and gradient accumulation steps."""

import math
from dataclasses import dataclass
from functools import lru_cache

from scalegpt.config import RunConfig
from scalegpt.errors import InputError

LARGEST_MICRO_BATCH = 65_536
"""The largest micro batch that is considered. It bounds the search if the tokens per step are mistyped."""


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: ``ranks × micro_batch × grad_accum`` sequences of ``block_size`` tokens."""

    micro_batch: int
    grad_accum: int
    ranks: int
    block_size: int

    @property
    def sequences(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self.micro_batch * self.grad_accum * self.ranks

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.sequences * self.block_size


def sequences_per_rank(run: RunConfig, ranks: int) -> int:
    """Sequences of one optimizer step on each rank: micro batch × gradient accumulation steps.

    Raises:
        InputError: the tokens per step cannot be divided among the ranks; the message names values that can.
    """
    train, block = run.train, run.model.block_size
    if train.tokens_per_step is None:
        return train.micro_batch
    per_rank, rest = divmod(train.tokens_per_step, ranks * block)
    if rest or per_rank == 0:
        unit = ranks * block
        below = train.tokens_per_step // unit * unit
        near = f"{below} or {below + unit}" if below else str(unit)
        raise InputError(
            f"tokens_per_step {train.tokens_per_step} is not a multiple of ranks {ranks} × block_size {block} = {unit}; "
            f"{near} would work"
        )
    return per_rank


@lru_cache(maxsize=1024)
def divisors(count: int) -> tuple[int, ...]:
    """The divisors of ``count`` that are at most :data:`LARGEST_MICRO_BATCH`, in rising order."""
    small = [size for size in range(1, math.isqrt(count) + 1) if count % size == 0]
    return tuple(sorted({size for low in small for size in (low, count // low) if size <= LARGEST_MICRO_BATCH}))


def plan_batches(run: RunConfig, ranks: int, *, micro_fixed: bool) -> BatchPlan:
    """Divide the run's tokens per step into micro batches and gradient accumulation steps.

    Args:
        run: the run; without ``tokens_per_step`` a step is one micro batch on every rank.
        ranks: data-parallel ranks W.
        micro_fixed: whether the user gave the micro batch. If not, a micro batch that does not divide the step is lowered
            to the next one that does; the caller should tell the user.

    Raises:
        InputError: the tokens per step do not divide among ranks and micro batches; the message names values that work.
    """
    train, block = run.train, run.model.block_size
    per_rank = sequences_per_rank(run, ranks)
    micro = train.micro_batch
    if per_rank % micro:
        micro = max(size for size in divisors(per_rank) if size <= micro)
    if micro_fixed and micro != train.micro_batch:
        nearest_tokens = max(1, round(per_rank / train.micro_batch)) * train.micro_batch * ranks * block
        raise InputError(
            f"micro_batch {train.micro_batch} does not divide the {per_rank} sequences per rank of tokens_per_step "
            f"{train.tokens_per_step}; use --micro_batch {micro}, or --tokens_per_step {nearest_tokens}"
        )
    return BatchPlan(micro, per_rank // micro, ranks, block)
