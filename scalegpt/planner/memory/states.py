"""The model states of training: the bytes of weights, gradients and optimizer, per parameter and per rank.

:data:`scalegpt.config.optimizers.OPTIMIZERS` lists the state and the temporaries of each optimizer. :func:`widths` gives the
bytes of a weight, of its fp32 master and of its gradient.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 5) cuts the optimizer's state over the ranks from stage 1 on,
gradients from stage 2 and weights from stage 3. Let w, g and k be the bytes, per parameter, of the weight, the gradient and
the optimizer's state, which includes the fp32 master weight. With P parameters each of W ranks holds, in bytes::

    stage 0   (w + g + k)·P
    stage 1   (w + g)·P + k·P/W
    stage 2   w·P + (g + k)·P/W
    stage 3   (w + g + k)·P/W

FSDP2's stage 2 cuts weights as well, and gathers them once a step.

:mod:`scalegpt.planner.memory.step` predicts tensor by tensor, with uneven cuts and the allocator's rounding.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache

from scalegpt.architecture.decoder import BLOCKS, kind_of, parameter_shapes
from scalegpt.architecture.parameters import Shape
from scalegpt.config import ModelConfig, RunConfig, TrainConfig
from scalegpt.config.backends import DEEPSPEED, FSDP, GRADIENTS, OPTIMIZER_STATE, PLAIN, WEIGHTS
from scalegpt.config.optimizers import EXP_AVG, EXP_AVG_SQ, FP32, MOMENTUM, OptimizerSpec, UpdateGroup
from scalegpt.errors import InputError
from scalegpt.units import BYTES

STATE_WORDS = {EXP_AVG: "first_moment", EXP_AVG_SQ: "second_moment", MOMENTUM: "momentum"}
"""State of an optimizer → its name in the answer of :func:`training_bytes`."""

TensorCounts = Mapping[tuple[str, Shape], int]
"""(kind, shape) → the number of such tensors in a model."""


@lru_cache(maxsize=256)
def tensors_of(model: ModelConfig) -> TensorCounts:
    """The number of tensors of each kind and shape in a model; all blocks are alike, so one is counted and multiplied.

    Raises:
        InputError: the vocabulary's size is not known yet.
    """
    counts: Counter[tuple[str, Shape]] = Counter()
    for name, shape in parameter_shapes(model.changed(n_layer=1)).items():
        counts[kind_of(name, shape), shape] += model.n_layer if name.startswith(BLOCKS) else 1
    return counts


def parameters_by_kind(model: ModelConfig) -> dict[str, int]:
    """Kind of parameter (vector, matrix or embedding) → the number of a model's parameters of this kind.

    Raises:
        InputError: the vocabulary's size is not known yet.
    """
    counts: Counter[str] = Counter()
    for (kind, shape), count in tensors_of(model).items():
        counts[kind] += count * math.prod(shape)
    return dict(counts)


# --- optimizers ------------------------------------------------------------------------------------------------------

Held = Callable[[Shape], int]
"""Shape of a parameter → bytes that a rank holds of an fp32 tensor of this shape."""


def state_bytes(spec: OptimizerSpec, tensors: TensorCounts, held: Held) -> int:
    """Bytes of the optimizer's state for all tensors on a rank, without the step counters."""
    return sum(
        spec.group_of(kind).state_bytes * held(shape) * count // FP32 for (kind, shape), count in tensors.items()
    )


def counters(spec: OptimizerSpec, tensors: TensorCounts) -> int:
    """How many step counters the optimizer keeps on the device."""
    if not spec.counters_on_device:
        return 0
    return sum(count for (kind, _), count in tensors.items() if spec.group_of(kind).counts_steps)


def temporary_bytes(
    spec: OptimizerSpec, tensors: TensorCounts, held: Held, orthogonalising: Callable[[Shape, int], int]
) -> int:
    """The most bytes that an update allocates at once besides the states; parameter groups are updated in turn.

    Args:
        spec: the optimizer.
        tensors: the number of parameter tensors of each kind and shape.
        held: shape → the bytes that a rank holds of an fp32 tensor of this shape.
        orthogonalising: (shape, number of matrices) → the bytes that it takes to orthogonalise that number of matrices.
    """
    fullest = 0
    for group in spec.groups:
        mine = [(shape, held(shape), count) for (kind, shape), count in tensors.items() if kind in group.kinds]
        at_once = group.together * sum(size * count for _, size, count in mine)
        largest = group.one_by_one * max((size for _, size, _ in mine), default=0)
        fullest = max(fullest, (at_once + largest) // FP32)
        if group.orthogonalises:
            fullest = max(fullest, *(orthogonalising(shape, count) for shape, _, count in mine))
    return fullest


def uniform_group(spec: OptimizerSpec) -> UpdateGroup:
    """The optimizer's first update group, which stands for all groups.

    ZeRO's flat parts need the same state per parameter.

    Raises:
        InputError: the optimizer's update groups keep different state.
    """
    if not spec.is_uniform:
        raise InputError(
            f"optimizer {spec.name} keeps different state for matrices than for other parameters, "
            "which ZeRO's flat partitions cannot hold; use --backend plain or fsdp"
        )
    return spec.groups[0]


# --- weights and gradients -------------------------------------------------------------------------------------------


def casts_weights(run: RunConfig) -> bool:
    """Whether weights are fp32 and cast where they are used: under ``plain``, and DeepSpeed's stage 0 except in fp16."""
    parallel = run.parallel
    if parallel.spec is DEEPSPEED:
        return parallel.stage == 0 and run.train.precision != "fp16"
    return parallel.spec is PLAIN


def widths(run: RunConfig) -> tuple[int, int, int]:
    """The bytes per parameter of the weight between steps, of its fp32 master (0: none), and of its accumulated gradient.

    ``plain`` and FSDP2 hold fp32 weights, and cast or gather them in the compute dtype while they are used. So does
    DeepSpeed's engine at stage 0, except in fp16, where it holds fp16 weights and gradients (``fp16/unfused_optimizer.py``).
    From stage 1 on DeepSpeed holds weights in the compute dtype, and fp32 masters besides, even if the compute dtype is fp32.
    It adds gradients up in fp32, as our settings ask (``grad_accum_dtype``).

    Raises:
        InputError: the precision is still ``auto``.
    """
    backend, stage, precision = run.parallel.spec, run.parallel.stage, run.train.precision
    if precision not in BYTES:
        raise InputError("precision is auto; set it to bf16, fp16 or fp32")
    if backend is FSDP or casts_weights(run):
        return FP32, 0, FP32
    compute = BYTES[precision]
    return compute, FP32, FP32 if stage > 0 else compute


def rank_states(run: RunConfig, ranks: int) -> dict[str, float]:
    """Model state → its bytes on each rank; the optimizer state includes the fp32 masters.

    This is the closed form, without padding or rounding. Gradients are counted at the end of the last backward pass.
    Offloaded states count as if they were on the device.

    Raises:
        InputError: the precision or the vocabulary is still ``auto``.
    """
    (weight, master, gradient), spec = widths(run), run.train.optimizer_spec
    counts = parameters_by_kind(run.model)
    total = sum(counts.values())
    state = sum(spec.group_of(kind).state_bytes * count for kind, count in counts.items())
    whole = {
        WEIGHTS: weight * total,
        GRADIENTS: gradient * total,
        OPTIMIZER_STATE: master * total + state,
    }
    parallel = run.parallel
    return cut_over(whole, parallel.mesh(ranks).shards, parallel.stage, parallel.spec.cut_from)


def training_bytes(model: ModelConfig, train: TrainConfig | None = None) -> dict[str, int]:
    """Model state (weights, gradients, each moment) → its bytes in fp32, unsharded; 16 bytes per parameter with AdamW.

    Activations, the loss, communication buffers and the device's own context are not included.

    Raises:
        InputError: the vocabulary's size is not known yet.
    """
    spec, counts = (train or TrainConfig()).optimizer_spec, parameters_by_kind(model)
    total = sum(counts.values())
    parts: Counter[str] = Counter({"master_weights": FP32 * total, "gradients": FP32 * total})
    for kind, count in counts.items():
        for state in spec.group_of(kind).states:
            parts[STATE_WORDS.get(state, state)] += FP32 * count
    return dict(parts)


def cut_over(whole: Mapping[str, int], shards: int, stage: int, cut_from: Mapping[str, int]) -> dict[str, float]:
    """State → a rank's bytes of it.

    They are 1/``shards`` of the whole if ``stage`` is at least ``cut_from[state]``, else all.
    """
    return {state: size / shards if stage >= cut_from[state] else size for state, size in whole.items()}
