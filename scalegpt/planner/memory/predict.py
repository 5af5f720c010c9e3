"""The peak memory of a training step on each rank, predicted without torch.

:func:`predict` simulates one step of the trainer on a :class:`~scalegpt.planner.memory.timeline.Timeline`: the states
that live from step to step, the forward pass, the loss, the backward pass and the optimizer, in the order in which the
trainer allocates and frees. Its figures are those of ``torch.cuda.max_memory_allocated``;
:mod:`scalegpt.planner.memory.overheads` adds the memory outside the allocator.
"""

from scalegpt.config import RunConfig
from scalegpt.config.backends import DEEPSPEED, FSDP
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import Card
from scalegpt.planner.attention import attention_kernel
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
from scalegpt.planner.memory.deepspeed.stages_0_to_2 import make_step
from scalegpt.planner.memory.fsdp import FSDPStep
from scalegpt.planner.memory.programs import kept_by_blocks
from scalegpt.planner.memory.step import Prediction, Step
from scalegpt.units import BYTES


def predict(run: RunConfig, *, ranks: int = 1, grad_accum: int = 1, card: Card | None = None) -> Prediction:
    """Predict the memory of each rank.

    Args:
        run: a run whose precision is resolved, with its vocabulary and micro batch fixed.
        ranks: data-parallel ranks W.
        grad_accum: micro batches per optimizer step.
        card: the GPU, which decides on the attention kernel if the run leaves the choice to torch; None: a recent GPU.

    Raises:
        InputError: the precision or the vocabulary is still ``auto``.
    """
    if run.train.precision not in BYTES:
        raise InputError("precision is auto; set it to bf16, fp16 or fp32")
    return predict_with(attention_kernel(run, card), run, ranks=ranks, grad_accum=grad_accum)


def predict_with(kernel: str, run: RunConfig, *, ranks: int, grad_accum: int) -> Prediction:
    """As :func:`predict`, with the attention kernel in place of the card, which affects memory only through it."""
    return _step(kernel, run, ranks, grad_accum).play()


def host_bytes(kernel: str, run: RunConfig, *, ranks: int, grad_accum: int) -> int:
    """The bytes that a rank offloads to host memory, as in :func:`predict_with`, but faster, since no step is simulated."""
    step = _step(kernel, run, ranks, grad_accum)
    step.hold_states()
    return step.host


def _step(kernel: str, run: RunConfig, ranks: int, grad_accum: int) -> Step:
    mesh = run.parallel.mesh(ranks)
    if run.parallel.spec is FSDP:
        return FSDPStep(run, mesh, grad_accum, kernel)
    if run.parallel.spec is DEEPSPEED:
        settings = deepspeed_settings(run, grad_accum=grad_accum, ranks=ranks, on_cuda=True)
        return make_step(run, mesh=mesh, grad_accum=grad_accum, kernel=kernel, settings=settings)
    return Step(run, mesh, grad_accum, kernel)


def kept_bytes(kernel: str, run: RunConfig) -> int:
    """A lower bound, for any backend, of a step's peak bytes besides the model states; faster than :func:`predict`.

    The bound counts the moment after the loss: all blocks keep the tensors that their backward pass needs, and the full
    loss keeps its fp32 log-softmax. The arguments are those of :func:`predict_with`.
    """
    tokens = run.train.micro_batch * run.model.block_size
    logits = 4 * tokens * run.model.vocab_size if run.train.loss == "full" else 0
    return kept_by_blocks(run, kernel) + logits
