"""What each optimizer is: its state tensors, their bytes, what an update allocates, and where it works.

Checkpoints, the planner and messages read it here; :mod:`scalegpt.optim` makes the optimizers. To add one: an
:class:`OptimizerSpec` in :data:`OPTIMIZERS`, its settings in :class:`~scalegpt.config.train.TrainConfig`, and its maker in
:mod:`scalegpt.optim.factory`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from scalegpt.config.backends import BackendSpec

MATRIX, EMBEDDING, VECTOR = "matrix", "embedding", "vector"
"""The kinds of tensors that optimizers distinguish: a block's matrices; embeddings and the head; norms and biases."""

FP32 = 4
"""Bytes of an element of every state: fp32 in every precision."""

EXP_AVG, EXP_AVG_SQ, MOMENTUM = "exp_avg", "exp_avg_sq", "momentum_buffer"
"""State tensors by torch's own names, which are canonical in checkpoints too."""


@dataclass(frozen=True, kw_only=True)
class UpdateGroup:
    """Tensors that an optimizer updates together, in the same way.

    Attributes:
        kinds: which tensors.
        states: the names of the state tensors that each parameter has, all fp32 and of its shape.
        moved: bytes per parameter that an update reads and writes.
        together: bytes per parameter of what the update allocates for all tensors of the group at once.
        one_by_one: bytes per parameter of what it allocates for one tensor after another; the largest counts.
        kernels: that it starts for each tensor; 0 where one kernel takes many tensors.
        counts_steps: whether it keeps the number of steps of each tensor.
        orthogonalises: whether it also allocates and computes what :mod:`scalegpt.planner.memory.newton_schulz` says.
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
        """Bytes of state per parameter."""
        return FP32 * len(self.states)


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """One optimizer in one form.

    Attributes:
        name: its word for ``--optimizer``.
        help: what it is, for ``--help``.
        groups: in the order in which they are updated; each kind of tensor belongs to one.
        settings: those of :class:`~scalegpt.config.train.TrainConfig` that no other optimizer uses.
        counters_on_device: whether each tensor's number of steps is an fp32 scalar on the device, or else in host memory.
        unfit: (backend, ZeRO stage, offload) → why they do not work together, and what to use instead; None where they do.
    """

    name: str
    help: str
    groups: tuple[UpdateGroup, ...]
    settings: frozenset[str] = frozenset()
    counters_on_device: bool
    unfit: Callable[[BackendSpec, int, str], str | None] = lambda _backend, _stage, _offload: None

    def group_of(self, kind: str) -> UpdateGroup:
        """The group that tensors of this kind belong to."""
        return next(group for group in self.groups if kind in group.kinds)

    @property
    def orthogonalises(self) -> bool:
        """Whether any group does."""
        return any(group.orthogonalises for group in self.groups)

    @property
    def is_uniform(self) -> bool:
        """Whether all parameters have the same state tensors, which ZeRO's flat partitions need."""
        return all(group.states == self.groups[0].states for group in self.groups)


def _adamw(*, fused: bool) -> OptimizerSpec:
    """AdamW's two moments for every tensor, in two groups: with weight decay, and without.

    The fused form reads weight, gradient and moments (16 bytes) and writes all except the gradient (12). The foreach form
    reads and writes in each operation of ``torch/optim/adam.py: _multi_tensor_adam``: it decays the weight (8), updates the
    first moment (12), decays the second (8) and adds the gradient's square to it (12), takes its root into new memory (8),
    divides that (8) and adds epsilon (8), and updates the weight with both (16). The roots of a whole group live at once.
    """
    moments = UpdateGroup(
        kinds=frozenset({MATRIX, EMBEDDING}),
        states=(EXP_AVG, EXP_AVG_SQ),
        moved=28 if fused else 80,
        together=0 if fused else FP32,
    )
    vectors = replace(moments, kinds=frozenset({VECTOR}), moved=28 if fused else 72)  # nothing decays
    return OptimizerSpec(name="adamw", help="AdamW", groups=(moments, vectors), counters_on_device=fused)


def _muon(*, fused: bool) -> OptimizerSpec:
    """Muon's one momentum for the blocks' matrices, whose gradient serves as its workspace; AdamW for the rest.

    An update of a matrix updates the momentum (12 bytes), makes Nesterov's sum in the gradient's place (12), and decays the
    weight (8). :mod:`scalegpt.planner.time.work` adds what orthogonalising moves.
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
    """What DeepSpeed's stages do was observed in real steps of version 0.19.8 (docs/MEMORY.md)."""
    if offload != "none":
        return f"optimizer muon cannot be offloaded (offload {offload}); use --offload none or --optimizer adamw"
    if not backend.updates_flat_parts(stage):
        return None
    also = ", and the planner does not model its step in bf16" if stage == 1 else ""
    return (
        f"optimizer muon: DeepSpeed's stage {stage} clips the orthogonalised update instead of the gradient, which is "
        f"another optimizer{also}; use --backend fsdp, or --zero_stage 0"
    )


def _lion(*, fused: bool) -> OptimizerSpec:
    """Lion's one momentum for every tensor, in two groups as AdamW's.

    An update makes the interpolated momentum in new memory (12 bytes), takes its sign (8), decays the weight (8), adds to
    it (12), and updates the momentum (12). The fused form does so tensor by tensor, with five kernels each.
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
"""Name → the fused form (True) and the foreach form (False) of each optimizer that the trainer offers."""

STATE_NAMES = tuple(
    dict.fromkeys(name for forms in OPTIMIZERS.values() for group in forms[True].groups for name in group.states)
)
"""The names of all state tensors."""

OWN_SETTINGS = {name: forms[True].settings for name, forms in OPTIMIZERS.items()}
"""Name → the settings that only this optimizer uses."""


def optimizer_help() -> str:
    """The help of ``--optimizer``."""
    return "the optimizer; " + "; ".join(f"{name}: {forms[True].help}" for name, forms in OPTIMIZERS.items())
