"""The costs of a run's configurations: the work of a step (FLOPs, bytes, kernels, communication) and its memory.

The costs depend on the card only through its attention kernel, so they are computed once for all cards with the same
kernel.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from scalegpt.config import RunConfig
from scalegpt.config.run import ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.planner.attention import counted_as
from scalegpt.planner.batches import BatchPlan, sequences_per_rank
from scalegpt.planner.memory.predict import host_bytes, kept_bytes, predict_with
from scalegpt.planner.memory.states import rank_states
from scalegpt.planner.memory.step import Prediction
from scalegpt.planner.search.question import Scheme
from scalegpt.planner.time.step_time import StepTotals, StepWork

K = TypeVar("K")
V = TypeVar("V")


class Memo(dict[K, V]):
    """A dictionary that computes a missing value when it is first read."""

    def __init__(self, compute: Callable[[K], V]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, key: K) -> V:
        value = self[key] = self._compute(key)
        return value


class RunCosts:
    """The costs (work and memory) of a run over ``ranks`` ranks, for any scheme (layout, recompute, loss) and micro batch.

    Attributes:
        per_rank: sequences of an optimizer step on each rank.
        schemes: scheme → the costs of the run with this scheme.
        fewer_chunks: (micro batches, ``high``) → those of the first ``high`` micro batches that need fewer loss chunks
            per step than the last of these.
        state_bytes: layout → bytes of weights and optimizer state on a rank; 0 with offload, which is still a lower bound.

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
        self.schemes: Memo[Scheme, SchemeCosts] = Memo(lambda scheme: SchemeCosts(self, scheme))
        self.state_bytes = Memo(self._state_bytes)
        self.fewer_chunks = Memo(self._fewer_chunks)
        self._kept = Memo(self._kept_bytes)

    @classmethod
    def of(cls, run: RunConfig, ranks: int, kernel: str, compiled: bool) -> "RunCosts":
        """The costs of a run, cached; the scheme and the micro batch of ``run`` itself do not matter."""
        batch = BatchPlan(1, sequences_per_rank(run, ranks), ranks, run.model.block_size)
        return _costs(_PLAIN.applied(run, batch), ranks, counted_as(kernel), compiled)

    def batch(self, micro: int) -> BatchPlan:
        """The step divided into micro batches of ``micro`` sequences; ``micro`` must divide the sequences per rank."""
        return BatchPlan(micro, self.per_rank // micro, self.ranks, self.run.model.block_size)

    def least_bytes(self, scheme: Scheme, micro: int) -> int:
        """A lower bound on the predicted peak bytes of a step; it is faster to compute than the prediction."""
        return self.state_bytes[scheme.layout] + self._kept[scheme.recompute, scheme.loss, micro]

    def _fewer_chunks(self, key: tuple[tuple[int, ...], int]) -> tuple[int, ...]:
        sizes, high = key
        block, chunk = self.run.model.block_size, self.run.train.loss_chunk
        chunks = [self.per_rank // size * -(-size * block // chunk) for size in sizes[:high]]
        return tuple(size for size, count in zip(sizes, chunks, strict=False) if count < chunks[-1])

    def _state_bytes(self, layout: ParallelConfig) -> int:
        if layout.offload != "none":
            return 0
        states = rank_states(_PLAIN._replace(layout=layout).applied(self.run, self.batch(1)), self.ranks)
        return int(states["weights"] + states["optimizer"])

    def _kept_bytes(self, key: tuple[str, str, int]) -> int:
        """A lower bound on a step's bytes without weights and optimizer state; ``key`` is (recompute, loss, micro batch)."""
        recompute, loss, micro = key
        return kept_bytes(self.kernel, Scheme(_PLAIN.layout, recompute, loss).applied(self.run, self.batch(micro)))


class SchemeCosts:
    """The costs (work and memory) of a run with one scheme (layout, recompute, kind of loss), by micro batch.

    Attributes:
        runs: micro batch → the run with the scheme and this micro batch.
        work: micro batch → the work of a step, by part.
        totals: micro batch → the work of a step, summed over its parts.
        host_bytes: micro batch → the bytes that a rank offloads to host memory, without a full prediction.
        predictions: micro batch → the memory of a step; raises InputError if the run's own DeepSpeed file forbids the
            micro batch.
    """

    __slots__ = ("host_bytes", "predictions", "run_costs", "runs", "scheme", "totals", "work")

    def __init__(self, run_costs: RunCosts, scheme: Scheme) -> None:
        self.run_costs, self.scheme = run_costs, scheme
        self.runs: Memo[int, RunConfig] = Memo(lambda micro: scheme.applied(run_costs.run, run_costs.batch(micro)))
        self.work = Memo(self._count)
        self.totals: Memo[int, StepTotals] = Memo(lambda micro: self.work[micro].totals())
        self.host_bytes = Memo(self._on_host)
        self.predictions = Memo(self._predict)

    def contenders(self, sizes: tuple[int, ...], high: int) -> tuple[int, ...]:
        """The micro batches among ``sizes[:high]`` that may be the fastest; the sizes ascend.

        They are the largest, and smaller ones that may be faster. A smaller micro batch can be faster only with the chunked
        loss, if the loss then runs in fewer chunks per step.
        """
        smaller = self.run_costs.fewer_chunks[sizes, high] if self.scheme.loss == "chunked" else ()
        return (sizes[high - 1], *smaller)

    def _on_host(self, micro: int) -> int:
        if micro in self.predictions:
            return self.predictions[micro].host_bytes
        whole = self.run_costs
        return host_bytes(whole.kernel, self.runs[micro], ranks=whole.ranks, grad_accum=whole.per_rank // micro)

    def _count(self, micro: int) -> StepWork:
        whole = self.run_costs
        return StepWork.of(
            self.runs[micro], ranks=whole.ranks, grad_accum=whole.per_rank // micro, kernel=whole.kernel,
            compiled=whole.compiled,
        )  # fmt: skip

    def _predict(self, micro: int) -> Prediction:
        whole = self.run_costs
        return predict_with(whole.kernel, self.runs[micro], ranks=whole.ranks, grad_accum=whole.per_rank // micro)


_PLAIN = Scheme(ParallelConfig(), RECOMPUTE[0], LOSSES[0])


@lru_cache(maxsize=1024)
def _costs(run: RunConfig, ranks: int, kernel: str, compiled: bool) -> RunCosts:
    return RunCosts(run, ranks, kernel, compiled)
