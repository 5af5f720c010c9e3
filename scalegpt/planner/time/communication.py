"""The collectives of one optimizer step: the bytes that ranks send each other, and when.

In a ring of W ranks that exchanges a tensor of S bytes, each rank sends (W - 1)/W·S bytes in an all-gather or a
reduce-scatter, and twice as many in an all-reduce (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). The table shows
when our backends communicate, and which pass hides the communication. If FSDP2's shards have replicas (HSDP), the table holds
for the ranks of one replica. The replicas then also all-reduce the scattered gradients, hidden behind the backward pass of
the last micro step, or of every micro step with offload. If ZeRO-3 keeps second copies of the weights (hpZ), only the first
forward pass after an update gathers weights over all ranks. Later passes gather them among the ranks of a copy. The source is
the code of torch 2.13 (``torch/distributed/fsdp/_fully_shard``) and deepspeed 0.19 (``runtime/zero/stage_1_and_2.py:
average_tensor``, ``stage3.py``, ``bf16_optimizer.py``, ``engine.py``):

================  =========================================  ==============================================  =============
backend, stage    weights are gathered                       gradients, fp32                                 hidden behind
================  =========================================  ==============================================  =============
fsdp 0            never                                      all-reduced after the last micro step           backward
fsdp 2            in a step's first forward pass             reduce-scattered in the last micro step         both passes
fsdp 3            for every forward and backward pass        reduce-scattered in every micro step            both passes
deepspeed 0       never                                      all-reduced after the last micro step           nothing
deepspeed 1       after the update                           all-reduced after the last micro step           nothing [1]_
deepspeed 2       after the update                           all-reduced in every micro step                 backward [2]_
deepspeed 3       for every forward and backward pass [3]_   reduce-scattered in every micro step            both passes
================  =========================================  ==============================================  =============

.. [1] This holds with bf16 and without offload. Otherwise ``overlap_comm`` hides the gradients behind the last backward
   pass.
.. [2] Only the gradients are hidden, not the all-gather of the weights. ZeRO-2 uses all-reduce rather than reduce-scatter
   since its buckets hold the parts of several ranks (``use_multi_rank_bucket_allreduce``).
.. [3] There are two exceptions. The prefetch keeps some weights from the forward pass for the backward pass
   (:mod:`scalegpt.planner.memory.deepspeed.gather`). Small tensors (norms, biases) are whole on every rank: they are
   gathered once, after the update, and this is not hidden.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from scalegpt.architecture.counting import count_parameters
from scalegpt.architecture.decoder import BLOCKS, parameter_shapes
from scalegpt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from scalegpt.config.backends import FSDP, Mesh
from scalegpt.config.optimizers import MATRIX
from scalegpt.planner.memory import fsdp as fsdp_memory
from scalegpt.planner.memory.deepspeed import sharded as deepspeed_step
from scalegpt.planner.memory.deepspeed.gather import Schedule, gathering, schedule
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
from scalegpt.planner.memory.newton_schulz import Exchange, wire
from scalegpt.planner.memory.states import tensors_of
from scalegpt.planner.memory.tensors import numel
from scalegpt.planner.time.links import ALL_REDUCE, EXCHANGE, RING, Way
from scalegpt.units import BYTES

ALL, SHARDS, REPLICAS = "all", "shards", "replicas"
FORWARD, BACKWARD, EXPOSED = "forward", "backward", "exposed"
FIRST, LAST, EVERY, STEP = "first micro step", "last micro step", "every micro step", "step"
LATER = "every micro step but the first"


_WAYS = {"all_reduce": ALL_REDUCE, "all_to_all": EXCHANGE}
"""The kind of a collective → the kind of its way; all others go in a ring."""


class Collective(NamedTuple):
    """Collectives of one kind, for example the all-gathers of all blocks' weights in a forward pass.

    Attributes:
        kind: ``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``all_to_all``.
        ranks: the number of ranks that take part, W.
        size: bytes of the whole tensors that are exchanged each time; over replicas these are the shards of one rank.
        messages: the number of collectives among which these bytes are divided each time.
        when: the micro steps in which they occur: :data:`FIRST`, :data:`LATER` (all but the first), :data:`LAST` or
            :data:`EVERY`; or :data:`STEP`, once a step.
        behind: the pass whose computation hides them, :data:`FORWARD` or :data:`BACKWARD`; or :data:`EXPOSED`, none.
        over: which ranks take part: :data:`ALL`; :data:`SHARDS`, the neighbouring ranks of one replica or of one second copy
            of the weights; or :data:`REPLICAS`, the ranks that hold the same shard.
    """

    kind: str
    ranks: int
    size: int
    messages: int
    when: str
    behind: str
    over: str = ALL

    def way(self, mesh: Mesh) -> Way:
        """How the tensors are exchanged, and among which ranks of the mesh."""
        return Way(_WAYS.get(self.kind, RING), self.ranks, mesh.shards if self.over == REPLICAS else 1)

    def times(self, grad_accum: int) -> int:
        """How often they occur in an optimizer step of this number of micro batches."""
        return {EVERY: grad_accum, LATER: grad_accum - 1}.get(self.when, 1)

    @property
    def sent(self) -> float:
        """Bytes that each rank sends each time that these collectives occur (see ``when``)."""
        factor = {"all_reduce": 2.0, "all_to_all": 1 / self.ranks}.get(self.kind, 1.0)
        return factor * self.size * (self.ranks - 1) / self.ranks


def collectives(run: RunConfig, mesh: Mesh) -> tuple[Collective, ...]:
    """The collectives of a step; none for a single rank.

    Args:
        run: a run whose precision is resolved.
        mesh: how its ranks are laid out.

    Raises:
        InputError: the backend cannot run the mesh.
    """
    run.parallel.spec.check_mesh(mesh)
    if mesh.ranks == 1:
        return ()
    own = _fsdp if run.parallel.spec is FSDP else _deepspeed
    return (*own(run, mesh), *_orthogonalisation(run, mesh))


def sent_bytes(run: RunConfig, *, ranks: int, grad_accum: int) -> float:
    """Bytes that each rank sends in one optimizer step."""
    return sum(each.sent * each.times(grad_accum) for each in collectives(run, run.parallel.mesh(ranks)))


def _fsdp(run: RunConfig, mesh: Mesh) -> Iterator[Collective]:
    """FSDP2's collectives: one message for each block and one for the rest of the model.

    A rank has ⌈rows / S⌉ rows of each tensor, including padding, with S shards.
    """
    stage, width, groups = run.parallel.stage, BYTES[run.train.precision], run.model.n_layer + 1
    shards, over = mesh.shards, _over_shards(mesh)
    if shards == 1:
        yield Collective("all_reduce", mesh.replicas, 4 * count_parameters(run.model).total, groups, LAST, BACKWARD)
        return
    whole, inner = _in_rows(run.model, shards)
    yield Collective("all_gather", shards, width * whole, groups, EVERY if stage == 3 else FIRST, FORWARD, over)
    if stage == 3:
        yield Collective("all_gather", shards, width * inner, groups - 1, EVERY, BACKWARD, over)
    yield Collective("reduce_scatter", shards, 4 * whole, groups, EVERY if stage == 3 else LAST, BACKWARD, over)
    if mesh.replicas > 1:
        when = EVERY if stage == 3 and fsdp_memory.reduces_over_replicas(run.parallel, last=False) else LAST
        yield Collective("all_reduce", mesh.replicas, 4 * whole // shards, groups, when, BACKWARD, REPLICAS)


def _over_shards(mesh: Mesh) -> str:
    return SHARDS if mesh.replicas > 1 else ALL


def _orthogonalisation(run: RunConfig, mesh: Mesh) -> Iterator[Collective]:
    """The collectives of Muon (``scalegpt.optim.muon``), once per step; they are not hidden.

    The matrices are divided among the ranks, each of which orthogonalises its share. If every rank has all matrices,
    the ranks then all-gather the results. Otherwise each rank sends its rows of a matrix to the rank of its replica that
    orthogonalises it, and gets the same rows of the result back. Of a matrix of S bytes each of W shards holds S/W, and
    sends (W - 1)/W of these bytes on average.
    """
    if not run.train.optimizer_spec.orthogonalises:
        return
    precision = run.train.precision
    exchange, width, sent = Exchange(mesh, precision), BYTES[precision], BYTES[wire(precision)]
    ranks = exchange.ranks
    for (kind, shape), count in tensors_of(run.model).items():
        if kind != MATRIX:
            continue
        messages = sum(1 for _ in exchange.rounds(shape, count))
        if exchange.gathers_results:
            size = ranks * exchange.largest_share(shape, count) * shape[0] * shape[1]
            yield Collective("all_gather", ranks, width * size, messages, STEP, EXPOSED)
        else:
            size = count * fsdp_memory.padded(shape, ranks)
            yield Collective(
                "all_to_all", ranks, (sent + width) * size, 2 * messages, STEP, EXPOSED, _over_shards(mesh)
            )


def _deepspeed(run: RunConfig, mesh: Mesh) -> Iterator[Collective]:
    stage, width, layers = run.parallel.stage, BYTES[run.train.precision], run.model.n_layer
    whole, buckets, ranks = count_parameters(run.model).total, layers + 2, mesh.ranks
    if stage == 3:
        first, later, kept_whole = _gathered_by_stage3(run.model, run.parallel, run.train.precision, ranks)
        near = mesh.copy_over
        for gathered, when in ((first, FIRST), (later, LATER)) if near else ((first, EVERY),):
            for far, close, behind in zip(gathered.fetched, gathered.fetched_near, (FORWARD, BACKWARD), strict=True):
                if far:
                    yield Collective("all_gather", ranks, width * far, buckets, when, behind)
                if close:
                    yield Collective("all_gather", near, width * close, buckets, when, behind, SHARDS)
        yield Collective("reduce_scatter", ranks, 4 * _in_parts(run.model, ranks), buckets, EVERY, BACKWARD)
        yield Collective("all_gather", ranks, width * kept_whole, 1, STEP, EXPOSED)
        return
    late = stage == 0 or (stage == 1 and run.train.precision == "bf16" and run.parallel.offload == "none")
    yield Collective(
        "all_reduce",
        ranks,
        4 * whole,
        1 if late else buckets,
        EVERY if stage == 2 else LAST,
        EXPOSED if late else BACKWARD,
    )
    if stage:
        yield Collective("all_gather", ranks, width * whole, buckets, STEP, EXPOSED)


@lru_cache(maxsize=1024)
def _in_rows(model: ModelConfig, ranks: int) -> tuple[int, int]:
    """Elements of all tensors, and of the blocks' tensors, each tensor's rows padded to a multiple of ``ranks``."""
    whole = blocks = 0
    for name, shape in parameter_shapes(model.changed(n_layer=1)).items():
        in_block = name.startswith(BLOCKS)
        size = fsdp_memory.padded(shape, ranks) * (model.n_layer if in_block else 1)
        whole += size
        blocks += size if in_block else 0
    return whole, blocks


@lru_cache(maxsize=1024)
def _gathered_by_stage3(
    model: ModelConfig, parallel: ParallelConfig, precision: str, ranks: int
) -> tuple[Schedule, Schedule, int]:
    """What ZeRO-3 gathers in the first and in every later micro step, and the elements that it gathers after the update.

    The third number counts the tensors that are too small to be sharded, which every rank keeps whole.
    """
    run = RunConfig(name="", model=model, parallel=parallel, train=TrainConfig(precision=precision, micro_batch=1))
    settings = deepspeed_settings(run, grad_accum=1, ranks=ranks, on_cuda=True)
    threshold = int(settings["zero_optimization"]["stage3_param_persistence_threshold"])
    small = (shape for shape in parameter_shapes(model).values() if numel(shape) <= threshold)
    given = gathering(run, ranks, settings)
    first, later = schedule(given), schedule(given, first=False)
    return first, later, ranks * sum(deepspeed_step.part_of_tensor(shape, ranks) for shape in small)


@lru_cache(maxsize=1024)
def _in_parts(model: ModelConfig, ranks: int) -> int:
    """Elements of all tensors, each tensor padded to a multiple of ``ranks``."""
    parts = (deepspeed_step.part_of_tensor(shape, ranks) * count for (_, shape), count in tensors_of(model).items())
    return ranks * sum(parts)
