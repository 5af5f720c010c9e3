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
from scalegpt.planner.memory.predict import Prediction, kept_bytes, predict_with
from scalegpt.planner.memory.states import rank_states
from scalegpt.planner.time.step_time import Counted, Whole


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
        self._lines: dict[Setting, Line] = {}
        self._fewer_chunks: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}
        self._states: dict[ParallelConfig, int] = {}
        self._kept: dict[tuple[str, str, int], int] = {}

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

    def fewer_chunks(self, sizes: tuple[int, ...], high: int) -> tuple[int, ...]:
        """The micro batches before the one at ``high - 1`` that divide a step's loss into fewer chunks than it does."""
        known = self._fewer_chunks.get((sizes, high))
        if known is None:
            chunks = [self._chunks(size) for size in sizes[:high]]
            known = tuple(size for size, count in zip(sizes, chunks, strict=False) if count < chunks[-1])
            self._fewer_chunks[sizes, high] = known
        return known

    def _chunks(self, micro: int) -> int:
        """Chunks of the loss in a step of each rank."""
        return self.per_rank // micro * -(-micro * self.run.model.block_size // self.run.train.loss_chunk)

    def line(self, setting: Setting) -> "Line":
        """The configurations with these settings; the same object whenever they are asked for."""
        known = self._lines.get(setting)
        if known is None:
            known = self._lines[setting] = Line(self, setting)
        return known

    def state_bytes(self, layout: ParallelConfig) -> int:
        """Bytes of weights and optimizer state that any plan with this layout holds, unless they are offloaded."""
        if layout.offload != "none":
            return 0
        known = self._states.get(layout)
        if known is None:
            states = rank_states(replace(self.run, parallel=layout), self.ranks)
            known = self._states[layout] = int(states["weights"] + states["optimizer"])
        return known

    def kept_bytes(self, setting: Setting, micro: int) -> int:
        """Bytes that a plan with this recompute, loss and micro batch holds beside them at least."""
        key = setting.recompute, setting.loss, micro
        known = self._kept.get(key)
        if known is None:
            known = self._kept[key] = kept_bytes(self.kernel, self.candidate(setting, micro))
        return known


class Line:
    """The configurations of a space that differ in their micro batch alone.

    Attributes:
        setting: what they have in common.
        predictions: micro batch → memory, of those that were asked for.
    """

    def __init__(self, space: Space, setting: Setting) -> None:
        self.space, self.setting = space, setting
        self.predictions: dict[int, Prediction] = {}
        self._steps: dict[int, Whole] = {}

    def step(self, micro: int) -> Whole:
        """What a step has to do with a micro batch."""
        known = self._steps.get(micro)
        if known is None:
            space = self.space
            counted = Counted.of(
                space.candidate(self.setting, micro), ranks=space.ranks, grad_accum=space.per_rank // micro,
                kernel=space.kernel, compiled=space.compiled,
            )  # fmt: skip
            known = self._steps[micro] = counted.whole()
        return known

    def least_bytes(self, micro: int) -> int:
        """Bytes that a step holds at least with a micro batch: sooner told than the prediction, and never more."""
        return self.space.state_bytes(self.setting.layout) + self.space.kept_bytes(self.setting, micro)

    def prediction(self, micro: int) -> Prediction:
        """The memory that a step takes with a micro batch.

        Raises:
            InputError: the run's own DeepSpeed file forbids it.
        """
        known = self.predictions.get(micro)
        if known is None:
            space, run = self.space, self.space.candidate(self.setting, micro)
            known = predict_with(space.kernel, run, ranks=space.ranks, grad_accum=space.per_rank // micro)
            self.predictions[micro] = known
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
