"""The specification of each optimizer: its state tensors, an update's memory, and the parallel layouts where it works.

Checkpoints, the planner and messages read the specifications; :mod:`scalegpt.optim` makes the optimizers. To add an
optimizer: an :class:`OptimizerSpec` in :data:`OPTIMIZERS`, its settings in
:class:`~scalegpt.config.train.TrainConfig`, and its maker in :mod:`scalegpt.optim.factory`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from scalegpt.config.backends import BackendSpec

MATRIX, EMBEDDING, VECTOR = "matrix", "embedding", "vector"
"""The kinds of tensors that optimizers distinguish: a block's matrices; embeddings and the head; norms and biases."""

FP32 = 4
"""Bytes of an element of a state tensor; states are fp32 in every precision."""

EXP_AVG, EXP_AVG_SQ, MOMENTUM = "exp_avg", "exp_avg_sq", "momentum_buffer"
"""The names of state tensors, the same in torch's optimizers and in canonical checkpoints."""


@dataclass(frozen=True, kw_only=True)
class UpdateGroup:
    """Tensors that an optimizer updates together, in the same way.

    Attributes:
        kinds: the kinds of tensors in the group, for example :data:`MATRIX`.
        states: the names of a parameter's state tensors, all fp32 and of the parameter's shape.
        moved: bytes per parameter that an update reads and writes in memory.
        together: temporary bytes per parameter that an update allocates for all tensors of the group at once.
        one_by_one: temporary bytes per parameter that an update allocates for one tensor at a time; freed before the next.
        kernels: kernels that an update starts for each tensor; 0: one kernel updates many tensors.
        counts_steps: whether the optimizer keeps a step counter for each tensor.
        orthogonalises: whether an update includes Muon's orthogonalisation, whose work and memory are not in the figures
            above but in :mod:`scalegpt.planner.memory.newton_schulz`.
    """

    kinds: frozenset[str]
    states: tuple[str, ...]
    moved: int
    together: int = 0
    one_by_one: int = 0
    kernels: int = 0
    counts_steps: bool = True
    orthogonalises: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of all state tensors per parameter."""
        return FP32 * len(self.states)


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """One optimizer, in its fused or in its foreach form.

    Attributes:
        name: the value of ``--optimizer`` that selects it.
        help: a description for ``--help``.
        groups: the groups in the order in which they are updated; each kind of tensor belongs to one group.
        settings: the names of the settings in :class:`~scalegpt.config.train.TrainConfig` that no other optimizer uses.
        counters_on_device: whether the step counter of a tensor is an fp32 scalar on the device; otherwise it is in
            host memory.
        unfit: (backend, ZeRO stage, offload) → why the optimizer does not work there, and what to use instead; None if
            it works.
    """

    name: str
    help: str
    groups: tuple[UpdateGroup, ...]
    settings: frozenset[str] = frozenset()
    counters_on_device: bool
    unfit: Callable[[BackendSpec, int, str], str | None] = lambda _backend, _stage, _offload: None

    def group_of(self, kind: str) -> UpdateGroup:
        """The group to which tensors of a kind, for example :data:`MATRIX`, belong."""
        return next(group for group in self.groups if kind in group.kinds)

    @property
    def orthogonalises(self) -> bool:
        """Whether the optimizer orthogonalises the tensors of any group."""
        return any(group.orthogonalises for group in self.groups)

    @property
    def is_uniform(self) -> bool:
        """Whether all parameters have the same state tensors, which ZeRO's flat partitions need."""
        return all(group.states == self.groups[0].states for group in self.groups)


def _adamw(*, fused: bool) -> OptimizerSpec:
    """AdamW: two moments for every tensor, in two groups, with and without weight decay.

    All figures are bytes per parameter. The fused form reads weight, gradient and moments (16), and writes weight and
    moments (12). The foreach form, ``_multi_tensor_adam`` in ``torch/optim/adam.py``, reads and writes memory in each
    operation: decay the weight (8); update the first moment (12); decay the second moment (8); add the squared gradient
    to it (12); take its root into new memory (8); divide the root (8); add epsilon to the root (8); update the weight
    with first moment and root (16). The roots of all tensors in a group are in memory at the same time.
    """
    moments = UpdateGroup(
        kinds=frozenset({MATRIX, EMBEDDING}),
        states=(EXP_AVG, EXP_AVG_SQ),
        moved=28 if fused else 80,
        together=0 if fused else FP32,
    )
    vectors = replace(moments, kinds=frozenset({VECTOR}), moved=28 if fused else 72)  # no weight decay
    return OptimizerSpec(name="adamw", help="AdamW", groups=(moments, vectors), counters_on_device=fused)


def _muon(*, fused: bool) -> OptimizerSpec:
    """Muon for the blocks' matrices, with one momentum each; AdamW for all other tensors.

    Muon's update overwrites the gradient.

    For a matrix, in bytes per parameter: update the momentum (12); overwrite the gradient with Nesterov's sum (12); decay
    the weight (8). :mod:`scalegpt.planner.time.work` adds the bytes that the orthogonalisation moves.
    """
    adamw = _adamw(fused=fused)
    momentum = UpdateGroup(
        kinds=frozenset({MATRIX}), states=(MOMENTUM,), moved=32, counts_steps=False, orthogonalises=True
    )
    others = (replace(group, kinds=group.kinds - momentum.kinds) for group in adamw.groups)
    return replace(
        adamw,
        name="muon",
        help="Muon for the blocks' matrices, AdamW for embeddings, head, norms and biases",
        groups=(momentum, *others),
        settings=frozenset({"muon_lr", "muon_momentum"}),
        unfit=_unfit_for_muon,
    )


def _unfit_for_muon(backend: BackendSpec, stage: int, offload: str) -> str | None:
    """Why Muon does not work with a layout, and what to use instead; None if it works.

    What DeepSpeed does at each stage was observed in real steps of version 0.19.8 (docs/MEMORY.md).
    """
    if offload != "none":
        return f"optimizer muon cannot be offloaded (offload {offload}); use --offload none or --optimizer adamw"
    if not backend.updates_flat_parts(stage):
        return None
    also = ", and the planner does not model its step in bf16" if stage == 1 else ""
    return (
        f"optimizer muon: DeepSpeed's stage {stage} clips the orthogonalised update instead of the gradient, so it is "
        f"another optimizer{also}; use --backend fsdp, or --zero_stage 0"
    )


def _lion(*, fused: bool) -> OptimizerSpec:
    """Lion: one momentum for every tensor, in two groups, with and without weight decay.

    An update, in bytes per parameter: interpolate momentum and gradient into new memory (12); take the sign (8); decay
    the weight (8); add the signs to the weight (12); update the momentum (12). The fused form updates one tensor at a
    time, with five kernels each.
    """
    momentum = UpdateGroup(
        kinds=frozenset({MATRIX, EMBEDDING}),
        states=(EXP_AVG,),
        moved=52,
        together=0 if fused else FP32,
        one_by_one=FP32 if fused else 0,
        kernels=5 if fused else 0,
        counts_steps=False,
    )
    return OptimizerSpec(
        name="lion",
        help="Lion, with half of AdamW's state; needs a third to a tenth of its learning rate",
        groups=(momentum, replace(momentum, kinds=frozenset({VECTOR}))),
        counters_on_device=False,
    )


_MAKERS: tuple[Callable[..., OptimizerSpec], ...] = (_adamw, _muon, _lion)

OPTIMIZERS: dict[str, dict[bool, OptimizerSpec]] = {
    maker(fused=True).name: {fused: maker(fused=fused) for fused in (True, False)} for maker in _MAKERS
}
"""Name → the fused form (True) and the foreach form (False), for each optimizer that the trainer offers."""

STATE_NAMES = tuple(
    dict.fromkeys(name for forms in OPTIMIZERS.values() for group in forms[True].groups for name in group.states)
)
"""The names of the state tensors of all optimizers."""

OWN_SETTINGS = {name: forms[True].settings for name, forms in OPTIMIZERS.items()}
"""Name → the settings that only this optimizer uses."""


def optimizer_help() -> str:
    """The help text of ``--optimizer``."""
    return "the optimizer; " + "; ".join(f"{name}: {forms[True].help}" for name, forms in OPTIMIZERS.items())
