"""Counts the work of one optimizer step of our trainer on a card: FLOPs, memory traffic and kernels.

Symbols: n is the number of tokens of a micro batch, T block size, H width, L layers, a heads of width D, V vocabulary,
P parameters, c bytes per element of the compute dtype. Nothing here depends on the card;
:mod:`scalegpt.planner.time.step_time` turns the work into seconds.

FLOPs (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; the backward pass has twice the matmuls of the forward pass):

=====================  ==========================================  ================================================
part                   forward                                     backward
=====================  ==========================================  ================================================
matmuls of a block     2·n·M, M elements of its matrices           4·n·M
attention, causal      2·n·T·a·D: two matmuls                      5·n·T·a·D: five matmuls (FlashAttention-2,
                                                                   arXiv 2307.08691, section 3.1)
attention, math        4·n·T·a·D: masked positions are computed    8·n·T·a·D
head                   2·n·V·H                                     4·n·V·H
=====================  ==========================================  ================================================

MFU uses another count: 6P + 12·L·a·D·T FLOPs per token, as if attention masked no position.

Memory traffic is the number of bytes that are read and written by kernels which only move data. Each operation of
:mod:`scalegpt.architecture` states its own traffic; the operations describe ``scalegpt.model.gpt.Block`` and
``scalegpt.model.loss``.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

from scalegpt.architecture.counting import count_parameters
from scalegpt.architecture.layers import Numerics
from scalegpt.architecture.loss import LossPart
from scalegpt.architecture.operations import ATTENTION, ELEMENTWISE, MATMULS, Cost
from scalegpt.config import ModelConfig, RunConfig
from scalegpt.config.backends import FSDP, Mesh
from scalegpt.config.backends import WEIGHTS as STATE_WEIGHTS
from scalegpt.config.optimizers import MATRIX
from scalegpt.planner.memory.newton_schulz import Exchange, flops, outputs, wire
from scalegpt.planner.memory.programs import block_program, numerics_of
from scalegpt.planner.memory.states import casts_weights, parameters_by_kind, tensors_of
from scalegpt.units import BYTES

LOSS, RECOMPUTE, WEIGHTS, OPTIMIZER = "loss", "recompute", "weights and gradients", "optimizer"

KERNELS_OF_WEIGHTS, KERNELS_OF_GROUP = 18, 6
"""Kernels per block and micro step that handle weights and gradients. The first number is for kernels that cast, sum or copy
one tensor each; the second for FSDP2, whose kernels handle all tensors of a block as a group."""

KERNELS_OF_STEP = 60
"""Kernels per step for the gradient norm, clipping and the fused update; each kernel handles many tensors."""

KERNELS_OF_ROUND = 22
"""Kernels to orthogonalise one batch of matrices of one shape: three per Newton-Schulz iteration, the norm, and copies."""


class Load(NamedTuple):
    """The work of one part of a step.

    Attributes:
        flops: FLOPs in matmuls.
        attention: FLOPs in attention kernels.
        bytes: memory traffic: the bytes read and written, without those of the loss.
        kernels: number of kernels.
        outputs: elements that matmuls write.
        loss: memory traffic of the loss.
    """

    flops: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    outputs: float = 0.0
    loss: float = 0.0

    def times(self, count: float) -> "Load":
        """This load multiplied by ``count``."""
        return Load(*(each * count for each in self))


class Work(NamedTuple):
    """The work of one optimizer step on one rank.

    Attributes:
        forward: part → load of the forward pass of each micro step.
        backward: part → load of the backward pass of each micro step.
        update: part → load of the optimizer update, once per step.
    """

    forward: dict[str, Load]
    backward: dict[str, Load]
    update: dict[str, Load]


def count_work(run: RunConfig, mesh: Mesh, *, kernel: str, compiled: bool) -> Work:
    """Count the work of a step.

    Args:
        run: a run whose precision is resolved and whose micro batch is fixed.
        mesh: how the ranks are laid out.
        kernel: the attention kernel, for example ``flash``.
        compiled: whether the blocks are compiled.
    """
    layers, sequences, numerics = run.model.n_layer, run.train.micro_batch, numerics_of(run, kernel)
    forward, backward, again = (
        {part: _of_all_blocks(load, layers, sequences) for part, load in loads.items()}
        for loads in _block_loads(run.model, numerics, run.train.recompute, compiled)
    )
    loss = LossPart.of(run.model, run.train).cost(sequences * run.model.block_size, numerics, compiled=compiled)
    return Work(
        forward={**forward, LOSS: Load(loss.flops, loss.attention, 0.0, loss.kernels, loss.outputs, loss.moved)},
        backward={**backward, RECOMPUTE: _recompute(again, forward), WEIGHTS: _weights(run, mesh.shards)},
        update={OPTIMIZER: _update(run, mesh)},
    )


@lru_cache(maxsize=1024)
def _block_loads(model: ModelConfig, numerics: Numerics, recompute: str, compiled: bool) -> tuple[dict[str, Load], ...]:
    """The loads of one block for one sequence, by part: of the forward pass, of the backward pass, and of recompute."""
    program = block_program(model, numerics, recompute)
    passes = (
        [(op.part, op.forward) for op in program.operations],
        [(op.part, op.backward) for op in program.operations],
        [(op.part, op.forward) for op in program.again if op not in program.kept],
    )
    return tuple(_by_part(costs, compiled) for costs in passes)


def _by_part(costs: list[tuple[str, Cost]], compiled: bool) -> dict[str, Load]:
    """Costs added up by part; empty without costs.

    The part ELEMENTWISE gets the kernels of all parts, since Python takes equally long to launch each of them.
    """
    loads = {}
    for part in (MATMULS, ATTENTION, ELEMENTWISE) if costs else ():
        own = [cost for name, cost in costs if name == part]
        moved = sum(cost.fused if compiled else cost.moved for cost in own)
        started = [cost.fused_kernels if compiled else cost.kernels for _, cost in costs] if part == ELEMENTWISE else ()
        loads[part] = Load(
            sum(cost.flops for cost in own),
            sum(cost.attention for cost in own),
            moved,
            sum(started),
            sum(cost.outputs for cost in own),
        )
    return loads


def _of_all_blocks(load: Load, layers: int, sequences: int) -> Load:
    """The load of all blocks for a micro batch, from the load of one block for one sequence.

    The number of kernels does not grow with the sequences, since each kernel handles the whole micro batch.
    """
    return load.times(layers * sequences)._replace(kernels=load.kernels * layers)


def _recompute(again: Mapping[str, Load], forward: Mapping[str, Load]) -> Load:
    """The load of recompute in the backward pass; ``again`` are the loads of the operations that run again.

    FLOPs count only for these operations. Kernels count for the block's whole forward pass, since selective recompute
    dispatches every operation, even one whose result was kept. Memory traffic counts for all elementwise operations, even
    the last residual sum, which is not recomputed.
    """
    if not again:
        return Load()
    attention, elementwise = again[ATTENTION], forward[ELEMENTWISE]
    moved, flops = attention.bytes + elementwise.bytes, again[MATMULS].flops + attention.flops
    return Load(flops, attention.attention, moved, elementwise.kernels, again[MATMULS].outputs)


def _weights(run: RunConfig, shards: int) -> Load:
    """The load per micro step of casting and gathering weights and of accumulating gradients.

    It does not depend on the tokens.

    Matmuls write the gradients of the blocks' matrices; their FLOPs are counted with the blocks.
    Bytes per parameter: fp32 weights are read and cast (4 + c), once more if the block is recomputed. Gathered weights are
    copied into and out of a buffer (4c), once more for the backward pass if they were freed after the forward pass. Gradients
    are cast to fp32 (c + 4) and accumulated (12). FSDP2 in stage 3, ZeRO-2 and ZeRO-3 accumulate only the rank's shard; the
    latter two first copy whole gradients into a bucket (2c). Each of FSDP2's kernels handles all tensors of a block, but
    with offload tensors are copied to and from the host one by one.
    """
    backend, stage, c = run.parallel.spec, run.parallel.stage, BYTES[run.train.precision]
    parameters, written = count_parameters(run.model).total, float(parameters_by_kind(run.model)[MATRIX])
    cast = c + 4 if c != 4 else 0
    if casts_weights(run):
        passes = 2 if run.train.recompute == "full" else 1
        kernels = KERNELS_OF_WEIGHTS * run.model.n_layer
        return Load(bytes=parameters * (cast * passes + cast + 12), kernels=kernels, outputs=written)
    gathers = (2 if stage == 3 else 1) if shards > 1 and backend.cuts(STATE_WEIGHTS, stage) else 0
    each = float(4 * c * gathers + cast)
    if backend is FSDP:
        each += 12 if stage != 3 else 12 / shards
        kernels = KERNELS_OF_GROUP if run.parallel.offload == "none" else KERNELS_OF_WEIGHTS
        return Load(bytes=parameters * each, kernels=kernels * run.model.n_layer, outputs=written)
    each += 12 if stage == 1 else 2 * c + 12 / shards
    return Load(bytes=parameters * each, kernels=KERNELS_OF_WEIGHTS * run.model.n_layer, outputs=written)


def _update(run: RunConfig, mesh: Mesh) -> Load:
    """The load of updating one rank's shard: gradient norm and clipping (12 bytes per element), and the optimizer itself.

    With offload the update runs in host memory and its bytes are counted by :func:`host_traffic`.
    """
    if run.parallel.offload != "none":
        return Load(kernels=KERNELS_OF_STEP)
    spec, moved, kernels = run.train.optimizer_spec, 0.0, KERNELS_OF_STEP
    for (kind, shape), count in tensors_of(run.model).items():
        group = spec.group_of(kind)
        moved += count * prod(shape) / mesh.shards * (12 + group.moved)
        kernels += count * group.kernels
    extra = _orthogonalising(run, mesh) if spec.orthogonalises else Load()
    return extra._replace(bytes=moved + extra.bytes, kernels=extra.kernels + kernels)


def _orthogonalising(run: RunConfig, mesh: Mesh) -> Load:
    """The load that Muon's orthogonalisation adds, on the rank that orthogonalises the most elements.

    Per element of the rank's shard, adding the result to the weights reads 4 + c bytes and writes 4. Per element that
    the rank orthogonalises, gathering reads 4 bytes and writes w, the bytes per element of the dtype in which matrices
    are sent, and dividing by the norm moves 3w. For FLOPs see :mod:`scalegpt.planner.memory.newton_schulz`.
    """
    precision = run.train.precision
    width, sent, exchange = BYTES[precision], BYTES[wire(precision)], Exchange(mesh, precision)
    operations = moved = kernels = matrices = written = 0
    for (kind, shape), count in tensors_of(run.model).items():
        if kind != MATRIX:
            continue
        size, share = shape[0] * shape[1], exchange.largest_share(shape, count)
        matrices += count * size
        operations += share * flops(shape, width)
        written += share * outputs(shape, width)
        moved += share * size * (4 + 4 * sent)
        kernels += KERNELS_OF_ROUND * sum(1 for _ in exchange.rounds(shape, count)) + count
    return Load(operations, bytes=moved + matrices / mesh.shards * (8 + width), kernels=kernels, outputs=written)


class HostTraffic(NamedTuple):
    """Bytes that offload moves in one step.

    Attributes:
        copied: bytes copied between card and host.
        updated: bytes that the optimizer reads and writes in host memory.
    """

    copied: float = 0.0
    updated: float = 0.0


def host_traffic(run: RunConfig, mesh: Mesh, grad_accum: int) -> HostTraffic:
    """The bytes that offload moves in one step on one rank.

    DeepSpeed copies the rank's shard of the fp32 gradients to the host once per step, and the updated weights back. If
    parameters are offloaded too, it copies weights to the card for every pass. FSDP2 copies fp32 weights to the card for
    every pass, and fp32 gradients to the host after every backward pass.
    """
    parallel = run.parallel
    if parallel.offload == "none":
        return HostTraffic()
    mine, width = count_parameters(run.model).total / mesh.shards, BYTES[run.train.precision]
    if parallel.spec is FSDP:
        copied = 12 * mine * grad_accum
    else:
        copied = (4 + width) * mine + (2 * width * mine * grad_accum if parallel.offload == "all" else 0)
    counts = parameters_by_kind(run.model)
    moved = sum(run.train.optimizer_spec.group_of(kind).moved * count for kind, count in counts.items())
    return HostTraffic(copied, moved / mesh.shards)


def flops_per_token(model: ModelConfig) -> int:
    """FLOPs of one token's forward and backward pass as MFU counts them: 6P + 12·L·a·D·T.

    6P is for the matmuls with weights (2P forward, 4P backward), 12·L·a·D·T for the two matmuls of attention over T positions
    (PaLM, arXiv 2204.02311, appendix B). Recompute is left out, since MFU counts only the work that the model needs.
    """
    return 6 * count_parameters(model).total + 12 * model.n_layer * model.n_head * model.head_width * model.block_size
