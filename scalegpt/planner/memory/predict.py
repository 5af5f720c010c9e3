"""How many bytes a training step holds at its fullest moment, on each rank, without torch.

:func:`predict` plays one step of the trainer on a :class:`~scalegpt.planner.memory.timeline.Timeline`: the states that
live from step to step, the forward pass, the loss, the backward pass and the optimizer, in the order in which the
trainer allocates and frees. Its figures are those of ``torch.cuda.max_memory_allocated``; what lies outside the
allocator's view is added elsewhere.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scalegpt.config import RunConfig
from scalegpt.config.backends import DEEPSPEED, FSDP, Mesh
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import Card
from scalegpt.planner.attention import attention_kernel
from scalegpt.planner.memory.programs import kept_by_blocks
from scalegpt.planner.memory.timeline import Timeline
from scalegpt.units import BYTES

if TYPE_CHECKING:
    from scalegpt.planner.memory.step import Step

PHASES = ("forward", "loss", "loss_backward", "block_backward", "backward_tail", "optimizer_step")
"""The phases of a step, in order; with accumulation a phase's figure is the largest over all micro steps."""


@dataclass(frozen=True)
class Prediction:
    """What a configuration holds at the worst moment of a step, in bytes per rank.

    Attributes:
        peak_bytes: the allocator's peak.
        phase: the phase that binds.
        phases: phase → its own peak.
        breakdown: what the peak is made of, by kind; adds up to ``peak_bytes``.
        steady_bytes: what lives between steps.
        host_bytes: what offload keeps in host memory.
    """

    peak_bytes: int
    phase: str
    phases: dict[str, int]
    breakdown: dict[str, int]
    steady_bytes: int
    host_bytes: int = 0

    @classmethod
    def of(cls, timeline: Timeline, steady: int, host: int = 0) -> "Prediction":
        """What a played timeline shows."""
        phase, moment = timeline.peak()
        peaks = timeline.peaks
        phases = {name: peaks[name].total for name in PHASES if name in peaks}
        return cls(moment.total, phase, phases, moment.kinds, steady, host)


def predict(run: RunConfig, *, ranks: int = 1, grad_accum: int = 1, card: Card | None = None) -> Prediction:
    """Predict the memory of each rank.

    Args:
        run: a run whose precision is resolved, with its vocabulary and micro batch fixed.
        ranks: data-parallel ranks W.
        grad_accum: micro batches per optimizer step.
        card: what it runs on, which decides on the attention kernel where the run leaves that to torch; None: a recent one.

    Raises:
        InputError: the precision is still ``auto``, or the vocabulary is.
    """
    if run.train.precision not in BYTES:
        raise InputError("precision auto: say which, bf16, fp16 or fp32")
    return predict_with(attention_kernel(run, card), run, ranks=ranks, grad_accum=grad_accum)


def predict_with(kernel: str, run: RunConfig, *, ranks: int, grad_accum: int) -> Prediction:
    """The same with the attention kernel named, which is all that a card decides."""
    return _step(run, run.parallel.mesh(ranks), grad_accum).attending_with(kernel).play()


def kept_bytes(kernel: str, run: RunConfig) -> int:
    """What a step holds at least when its loss has been computed, besides the states: whatever backend trains it.

    All blocks then keep what their backward pass needs, and the full loss keeps its log-softmax in fp32. Far sooner told
    than the peak; arguments as for :func:`predict_with`.
    """
    tokens = run.train.micro_batch * run.model.block_size
    logits = 4 * tokens * run.model.vocab_size if run.train.loss == "full" else 0
    return kept_by_blocks(run, kernel) + logits


def _step(run: RunConfig, mesh: Mesh, grad_accum: int) -> "Step":
    if run.parallel.spec is FSDP:
        from scalegpt.planner.memory.fsdp import FSDPStep

        return FSDPStep(run, mesh, grad_accum)
    if run.parallel.spec is DEEPSPEED:
        from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
        from scalegpt.planner.memory.deepspeed.stages_0_to_2 import make_step

        settings = deepspeed_settings(run, grad_accum=grad_accum, ranks=mesh.ranks, on_cuda=True)
        return make_step(run, mesh=mesh, grad_accum=grad_accum, settings=settings)
    from scalegpt.planner.memory.step import Step

    return Step(run, mesh, grad_accum)
