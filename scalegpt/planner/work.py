"""What one optimizer step has a card do: operations, memory traffic and kernels, counted from what our trainer does.

Symbols: n tokens of a micro batch, T block size, H width, V vocabulary, P parameters; c bytes of the compute dtype, r of the
residual stream's. Nothing here depends on the card; :mod:`scalegpt.planner.throughput` turns it into seconds.

Operations (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; the backward pass does twice the forward's matmuls):

=====================  ==========================================  ================================================
part                   forward                                     backward
=====================  ==========================================  ================================================
matmuls of a block     24·n·H²                                     48·n·H²
attention, causal      2·n·T·H                                     5·n·T·H: five matmuls for two (FlashAttention-2,
                                                                   arXiv 2307.08691, section 3.1)
attention, math        4·n·T·H: it computes what it masks          8·n·T·H
head                   2·n·V·H                                     4·n·V·H
=====================  ==========================================  ================================================

The formula that MFU is defined by, 6P + 12·L·H·T a token, counts attention as if nothing were masked.

Memory traffic is what kernels that only move data read and write, operation by operation as ``scalegpt.model.gpt.Block`` and
``scalegpt.model.loss`` have them. Recompute "full" computes each block again but for its last matmul, "selective" all but
matmuls and attention (:mod:`scalegpt.model.recompute`).
"""

from dataclasses import dataclass

from scalegpt.architecture.decoder import MATRIX
from scalegpt.config import ModelConfig, RunConfig
from scalegpt.config.train import LOSS_ROWS
from scalegpt.planner.newton_schulz import exchange_of, flops, wire
from scalegpt.planner.parameters import count_parameters
from scalegpt.planner.sizes import BYTES, Sizes
from scalegpt.planner.states import optimizer_row, tensors_of

MATMULS, ATTENTION, ELEMENTWISE, LOSS, RECOMPUTE, WEIGHTS, OPTIMIZER = (
    "matmuls", "attention", "elementwise", "loss", "recompute", "weights and gradients", "optimizer",
)  # fmt: skip

KERNELS_FORWARD, KERNELS_BACKWARD = 11, 23
"""Kernels of a block in eager mode: four matmuls, attention, norms, sums, GELU; their gradients, and autograd's sums."""

KERNELS_FORWARD_COMPILED, KERNELS_BACKWARD_COMPILED = 9, 19
"""The same where inductor has fused a norm with the sum before it."""

KERNELS_OF_WEIGHTS, KERNELS_OF_GROUP = 18, 6
"""Kernels that a block's weights and gradients take: casts, sums and buckets tensor by tensor, or FSDP2's grouped copies."""

KERNELS_OF_FULL_LOSS = 14
KERNELS_OF_CHUNK, KERNELS_OF_ROWS, KERNELS_OF_ROWS_COMPILED = 5, 18, 4
"""Kernels of the loss: over full logits; of a chunk's matmuls; and of each :data:`LOSS_ROWS` rows between them."""

KERNELS_OF_STEP = 60
"""Kernels of the norm, the clipping and the fused update, which take many tensors each."""

KERNELS_OF_ROUND = 22
"""Kernels that orthogonalise the matrices of one shape: three a step of the iteration, the norm, copies."""

ADAMW_BYTES = 28
"""Bytes an element that AdamW reads and writes: weight, gradient and two moments in fp32; all but the gradient back."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a part does: ``flops`` in matmuls, ``attention`` in attention kernels, ``bytes`` moved, ``kernels`` started."""

    flops: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0

    def times(self, count: float) -> "Load":
        """So many of it."""
        return Load(self.flops * count, self.attention * count, self.bytes * count, self.kernels * count)


@dataclass(frozen=True, slots=True)
class Work:
    """One optimizer step of one rank.

    Attributes:
        forward: of each micro step, by part.
        backward: of each micro step, by part.
        update: once a step.
    """

    forward: dict[str, Load]
    backward: dict[str, Load]
    update: dict[str, Load]


def count_work(run: RunConfig, *, shards: int, kernel: str, compiled: bool, ranks: int | None = None) -> Work:
    """Count the work of a step.

    Args:
        run: a run whose precision is resolved and whose micro batch is fixed.
        shards: over how many ranks the optimizer's state is cut.
        ranks: that hold the model, if they are more than it is cut over.
        kernel: the attention kernel, such as ``flash``.
        compiled: whether the blocks are compiled.
    """
    s, layers = Sizes.of(run), run.model.n_layer
    parameters = count_parameters(run.model).total
    forward, backward = _block_matmuls(s, layers)
    attend, attend_back = _attention(s, kernel, layers)
    move, move_back = _elementwise(s, run.model.dropout > 0, compiled)
    kernels, kernels_back = (
        (KERNELS_FORWARD_COMPILED, KERNELS_BACKWARD_COMPILED) if compiled else (KERNELS_FORWARD, KERNELS_BACKWARD)
    )
    return Work(
        forward={
            MATMULS: forward,
            ATTENTION: attend,
            ELEMENTWISE: Load(bytes=move * layers, kernels=kernels * layers),
            LOSS: _loss(run, s, compiled),
        },
        backward={
            MATMULS: backward,
            ATTENTION: attend_back,
            ELEMENTWISE: Load(bytes=move_back * layers, kernels=kernels_back * layers),
            RECOMPUTE: _recompute(run, kernel, forward, attend, Load(bytes=move * layers, kernels=kernels * layers)),
            WEIGHTS: _weights(run, parameters, shards),
        },
        update={OPTIMIZER: _update(run, parameters, shards, ranks or shards)},
    )


def _block_matmuls(s: Sizes, layers: int) -> tuple[Load, Load]:
    once = 24.0 * s.n * s.hidden**2 * layers
    return Load(flops=once), Load(flops=2 * once)


def _attention(s: Sizes, kernel: str, layers: int) -> tuple[Load, Load]:
    """Attention's own operations; the math kernel also writes and reads its T by T matrices."""
    pairs = float(s.n) * s.block * s.hidden * layers
    inputs = 4.0 * s.compute * s.n * s.hidden * layers
    if kernel != "math":
        return Load(attention=2 * pairs, bytes=inputs), Load(attention=5 * pairs, bytes=2 * inputs)
    scores = float(s.n) * s.block * s.heads * layers
    # Scores, mask, softmax and their gradients: some six passes forward and eight back over the matrix.
    return (
        Load(flops=4 * pairs, bytes=inputs + 6 * s.compute * scores),
        Load(flops=8 * pairs, bytes=2 * inputs + 8 * s.compute * scores),
    )


def _elementwise(s: Sizes, dropout: bool, compiled: bool) -> tuple[float, float]:
    """Bytes that one block moves outside matmuls and attention, forward and backward.

    Eager, each of c and r: a norm reads r and writes c, a residual sum reads r and c and writes r, GELU reads and writes 4c.
    Backward: GELU 12c; a norm's gradient reads r and c and writes r, and reads both again for its weights'; autograd adds
    to the stream's gradient, 3r; the three gradients of QKV are joined, 6c. Compiled, a norm finds its input on the chip,
    and its gradient joins the stream's in one pass.
    """
    c, r = s.compute, s.residual
    norm, total, gelu = r + c, 2 * r + c, 8 * c
    if c != r and not compiled:
        norm += 2 * r  # an fp32 result that is then cast
    forward = 2 * norm + 2 * total + gelu - (r if compiled else 0)
    back = 12 * c + 6 * c
    back += 2 * (3 * r + c) if compiled else 2 * ((2 * r + c) + (r + c) + 3 * r)
    if dropout:
        forward += 2 * (1 if compiled else 2 * c + 1)
        back += 2 * (1 if compiled else 2 * c + 1)
    return float(forward) * s.n * s.hidden, float(back) * s.n * s.hidden


def _loss(run: RunConfig, s: Sizes, compiled: bool) -> Load:
    """Head and cross entropy with their gradients, which the chunked loss computes at once.

    Bytes a logit: the matmul writes c; chunked, it is read for its maximum (c) and cast to fp32 (c + 4), becomes the softmax
    in place (8), whose maximum is sought (4), is cast back (4 + c) and read by two matmuls (2c). Compiled, what is between
    the matmuls reads it twice and writes it once (3c). Full: cast to fp32 (c + 4), the log-softmax (8), its gradient (4 and
    12), and back (4 + c, 2c). Each chunk adds V·H numbers to the head's fp32 gradient.
    """
    c, logits, head = s.compute, float(s.n) * s.vocab, float(s.vocab) * s.hidden
    flops = 6.0 * logits * s.hidden
    if run.train.loss == "full":
        return Load(
            flops=flops, bytes=(5 * c + (32 if c != 4 else 24)) * logits + 2 * c * head, kernels=KERNELS_OF_FULL_LOSS
        )
    chunks = -(-s.n // run.train.loss_chunk)
    once = 2 * c + 8 if c != 4 else 8
    between = 3 * c if compiled else 3 * c + 20 if c != 4 else 24
    # Those of a whole chunk for the last one too, which may be smaller: then they only depend on how many there are.
    kernels = KERNELS_OF_ROWS_COMPILED if compiled else KERNELS_OF_ROWS
    kernels = KERNELS_OF_CHUNK + kernels * -(-run.train.loss_chunk // LOSS_ROWS)
    return Load(flops=flops, bytes=(3 * c + between) * logits + once * head * chunks, kernels=float(kernels * chunks))


def _recompute(run: RunConfig, kernel: str, matmuls: Load, attention: Load, moved: Load) -> Load:
    """What the backward pass computes again; "selective" attention too, with dropout or where many kernels compute it."""
    if run.train.recompute == "none":
        return Load()
    if run.train.recompute == "selective":
        again = attention if run.model.dropout or kernel == "math" else Load()
        scores = again.bytes if kernel == "math" else 0.0
        return Load(flops=again.flops, attention=again.attention, bytes=moved.bytes + scores, kernels=moved.kernels)
    return Load(
        flops=matmuls.flops * 2 / 3 + attention.flops,
        attention=attention.attention,
        bytes=moved.bytes + attention.bytes,
        kernels=moved.kernels,
    )


def _weights(run: RunConfig, parameters: float, shards: int) -> Load:
    """What a micro step does to weights and gradients themselves, whatever the number of tokens.

    Bytes a parameter: weights that are fp32 are read and cast (4 + c), again where a block is recomputed. Gathered weights
    are copied into and out of a buffer (4c), again in the backward pass where they were given back. Gradients are cast
    to fp32 (c + 4) and added up (12); ZeRO-2 and 3 add up a rank's part alone, after copying the whole into a bucket (2c).
    """
    backend, stage, c = run.parallel.backend, run.parallel.stage, Sizes.of(run).compute
    cast = c + 4 if c != 4 else 0
    if casts_weights(run):
        passes = 2 if run.train.recompute == "full" else 1
        return Load(bytes=parameters * (cast * passes + cast + 12), kernels=KERNELS_OF_WEIGHTS * run.model.n_layer)
    gathers = (2 if stage == 3 else 1) if shards > 1 and (backend == "fsdp" or stage == 3) else 0
    each = float(4 * c * gathers + cast)
    if backend == "fsdp":
        each += 12 if stage != 3 else 12 / shards
        return Load(bytes=parameters * each, kernels=KERNELS_OF_GROUP * run.model.n_layer)
    each += 12 if stage == 1 else 2 * c + 12 / shards
    return Load(bytes=parameters * each, kernels=KERNELS_OF_WEIGHTS * run.model.n_layer)


def casts_weights(run: RunConfig) -> bool:
    """Whether weights are fp32 and cast where they are used: under ``plain``, and DeepSpeed's stage 0 but for fp16."""
    parallel = run.parallel
    if parallel.backend == "deepspeed":
        return parallel.stage == 0 and run.train.precision != "fp16"
    return parallel.backend == "plain"


def _update(run: RunConfig, parameters: float, shards: int, ranks: int) -> Load:
    """The update of this rank's part: norm and clipping (4 + 8), and AdamW, which reads 16 and writes 12 bytes an element.

    Muon takes the blocks' matrices from it.

    The foreach form goes through memory for each of its operations: about two and a half times as much. What is offloaded
    is updated in host memory, see :func:`host_traffic`.
    """
    if run.parallel.offload != "none":
        return Load(kernels=KERNELS_OF_STEP)
    adamw = ADAMW_BYTES if run.train.fused else 2.5 * ADAMW_BYTES
    if optimizer_row(run.train).orthogonalises:
        muon, matrices = _muon(run, shards, ranks)
        rest = (parameters - matrices) / shards * (12 + adamw)
        return Load(muon.flops, bytes=muon.bytes + rest, kernels=muon.kernels + KERNELS_OF_STEP)
    return Load(bytes=parameters / shards * (12 + adamw), kernels=KERNELS_OF_STEP)


def _muon(run: RunConfig, shards: int, ranks: int) -> tuple[Load, int]:
    """Muon's part of the update on the rank that orthogonalises most, and how many parameters it updates.

    Bytes an element of this rank's part: norm and clipping 12; the momentum reads 8 and writes 4, and so does Nesterov's sum;
    decay 8; adding the result reads 4 + c and writes 4. Bytes an element that it orthogonalises: gathering reads 4 and writes
    w, the dtype that is gathered in; dividing by the norm 3w. Operations: see :mod:`scalegpt.planner.newton_schulz`.
    """
    width, sent, exchange = BYTES[run.train.precision], BYTES[wire(run.train.precision)], exchange_of(run, ranks)
    operations = moved = kernels = matrices = 0
    for (kind, shape), count in tensors_of(run.model).items():
        if kind != MATRIX:
            continue
        size, share = shape[0] * shape[1], exchange.largest_share(shape, count)
        matrices += count * size
        operations += share * flops(shape, width)
        moved += share * size * (4 + 4 * sent)
        kernels += KERNELS_OF_ROUND * sum(1 for _ in exchange.rounds(shape, count)) + count
    return Load(operations, bytes=moved + matrices / shards * (12 + 24 + 8 + 8 + width), kernels=kernels), matrices


@dataclass(frozen=True, slots=True)
class HostTraffic:
    """Bytes that offload moves in one step: ``copied`` between card and host, ``updated`` in host memory."""

    copied: float = 0.0
    updated: float = 0.0


def host_traffic(run: RunConfig, ranks: int, grad_accum: int) -> HostTraffic:
    """What offload moves in a step of one rank.

    DeepSpeed sends its part of the fp32 gradient once a step and gets weights back; with parameters offloaded too, weights
    come for each pass. FSDP2 gets fp32 weights for each pass and sends fp32 gradients after each backward pass.
    """
    parallel = run.parallel
    if parallel.offload == "none":
        return HostTraffic()
    mine, width = count_parameters(run.model).total / ranks, BYTES[run.train.precision]
    if parallel.backend == "fsdp":
        copied = 12 * mine * grad_accum
    else:
        copied = (4 + width) * mine + (2 * width * mine * grad_accum if parallel.offload == "all" else 0)
    return HostTraffic(copied, ADAMW_BYTES * mine)


def flops_per_token(model: ModelConfig) -> int:
    """FLOPs of one token's forward and backward pass as MFU counts them: 6P + 12·L·H·T.

    6P for the weights' matmuls (2 forward, 4 backward), 12·L·H·T for attention's two products over T positions (PaLM,
    arXiv 2204.02311, appendix B). Recompute is not counted: MFU counts the work that the model needs.
    """
    return 6 * count_parameters(model).total + 12 * model.n_layer * model.n_embd * model.block_size
