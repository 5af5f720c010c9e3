"""The configurations that a run may have over so many ranks: what each has to do and what it holds.

Neither depends on the card but for its attention kernel. Both are found out once, however many cards are asked about.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from scalegpt.config import RunConfig
from scalegpt.config.run import ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.planner.attention import counted_as
from scalegpt.planner.batches import BatchPlan, sequences_per_rank
from scalegpt.planner.memory import Prediction, predict_with
from scalegpt.planner.throughput import Counted


class Setting(NamedTuple):
    """A configuration but for its micro batch."""

    layout: ParallelConfig
    recompute: str
    loss: str


class Space:
    """All configurations of a run over so many ranks.

    Args:
        run: the run, with its tokens per step and its precision.
        ranks: data-parallel ranks W.
        kernel: the attention kernel.
        compiled: whether the blocks are compiled.

    Raises:
        InputError: the step cannot be divided among the ranks.
    """

    def __init__(self, run: RunConfig, ranks: int, kernel: str, compiled: bool) -> None:
        self.run, self.ranks, self.kernel, self.compiled = run, ranks, kernel, compiled
        self.per_rank = sequences_per_rank(run, ranks)
        self._steps: dict[tuple[Setting, int], Counted] = {}
        self._predictions: dict[tuple[Setting, int], Prediction] = {}

    @classmethod
    def of(cls, run: RunConfig, ranks: int, kernel: str, compiled: bool) -> "Space":
        """The space of a run; the same one whatever setting it has now, and for a kernel that is counted alike."""
        batch = BatchPlan(1, sequences_per_rank(run, ranks), ranks, run.model.block_size)
        return _space(candidate(run, _PLAIN, batch), ranks, counted_as(kernel), compiled)

    def batch(self, micro: int) -> BatchPlan:
        """How the step is divided with a micro batch that divides it."""
        return BatchPlan(micro, self.per_rank // micro, self.ranks, self.run.model.block_size)

    def candidate(self, setting: Setting, micro: int) -> RunConfig:
        """The run with these settings."""
        return candidate(self.run, setting, self.batch(micro))

    def step(self, setting: Setting, micro: int) -> Counted:
        """What a step of it has to do; of each pass only the whole."""
        known = self._steps.get((setting, micro))
        if known is None:
            run = self.candidate(setting, micro)
            known = Counted.of(
                run, ranks=self.ranks, grad_accum=self.per_rank // micro, kernel=self.kernel, compiled=self.compiled
            ).merged()
            self._steps[setting, micro] = known
        return known

    def prediction(self, setting: Setting, micro: int) -> Prediction:
        """The memory that it takes.

        Raises:
            InputError: the run's own DeepSpeed file forbids it.
        """
        known = self._predictions.get((setting, micro))
        if known is None:
            run = self.candidate(setting, micro)
            known = predict_with(self.kernel, run, ranks=self.ranks, grad_accum=self.per_rank // micro)
            self._predictions[setting, micro] = known
        return known


_PLAIN = Setting(ParallelConfig(), RECOMPUTE[0], LOSSES[0])


@lru_cache(maxsize=1024)
def _space(run: RunConfig, ranks: int, kernel: str, compiled: bool) -> Space:
    return Space(run, ranks, kernel, compiled)


def candidate(run: RunConfig, setting: Setting, batch: BatchPlan) -> RunConfig:
    """A run with other settings and its step divided so."""
    train = run.train.changed(
        recompute=setting.recompute, loss=setting.loss, micro_batch=batch.micro_batch, tokens_per_step=batch.tokens
    )
    return replace(run, train=train, parallel=setting.layout)
