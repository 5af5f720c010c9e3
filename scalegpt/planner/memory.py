"""How many bytes a training step holds at its fullest moment, on one device, without torch.

:func:`predict` plays one step of the trainer on a :class:`~scalegpt.planner.timeline.Timeline`: the states that live from step
to step, the forward pass, the loss, the backward pass and the optimizer, in the order in which the trainer allocates and frees.
Its figures are those of ``torch.cuda.max_memory_allocated``; what lies outside the allocator's view is added elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

from scalegpt.config import RunConfig
from scalegpt.errors import InputError
from scalegpt.planner.block import ACTIVATIONS, BYTES, COPIES, TEMPORARIES, BlockLedger, Sizes
from scalegpt.planner.parameters import parameter_shapes
from scalegpt.planner.timeline import Moment, Timeline, rounded

WEIGHTS, GRADIENTS, OPTIMIZER, INPUTS, LOSS = "weights", "gradients", "optimizer state", "inputs", "loss"

PHASES = ("forward", "loss", "loss_backward", "block_backward", "backward_tail", "optimizer_step")

MOMENT_COUNT = 2
"""AdamW's moments, fp32 each."""


@dataclass(frozen=True)
class Prediction:
    """What a configuration holds at the worst moment of a step.

    Attributes:
        peak_bytes: the allocator's peak.
        phase: the phase that binds.
        phases: phase → its own peak.
        breakdown: what the peak is made of, by kind; adds up to ``peak_bytes``.
        steady_bytes: what lives between steps.
    """

    peak_bytes: int
    phase: str
    phases: dict[str, int]
    breakdown: dict[str, int]
    steady_bytes: int


def predict(run: RunConfig, *, ranks: int = 1, grad_accum: int = 1) -> Prediction:
    """Predict the memory of each rank.

    Args:
        run: a run whose precision is resolved, with its vocabulary and micro batch fixed.
        ranks: data-parallel ranks W.
        grad_accum: micro batches per optimizer step.

    Raises:
        InputError: the precision is still ``auto``.
    """
    if run.train.precision not in BYTES:
        raise InputError("precision auto: say which, bf16, fp16 or fp32")
    step = _PlainStep(run, grad_accum)
    step.play()
    phase, moment = step.t.peak()
    phases = {name: peak.total for name, peak in step.t.peaks.items() if name in PHASES}
    return Prediction(moment.total, phase, phases, dict(moment.kinds), step.steady)


class _PlainStep:
    """One optimizer step in one process: fp32 weights, cast where they are used."""

    def __init__(self, run: RunConfig, grad_accum: int) -> None:
        self.run, self.grad_accum = run, grad_accum
        self.t, self.s = Timeline(), Sizes.of(run)
        self.shapes = parameter_shapes(run.model)
        self.copies = self.s.compute != 4
        self.has_gradients = False
        self.block = BlockLedger(run, self.t, copies_weights=True, accumulate=self._accumulate)
        self.numel = {name: _numel(shape) for name, shape in self.shapes.items()}
        self.head = self.numel["wte.weight"]

    def play(self) -> None:
        """The states, the micro steps, the optimizer."""
        t = self.t
        t.hold(WEIGHTS, sum(rounded(4 * numel) for numel in self.numel.values()))
        t.hold(OPTIMIZER, MOMENT_COUNT * sum(rounded(4 * numel) for numel in self.numel.values()))
        if self.run.train.fused:
            t.hold(OPTIMIZER, rounded(4) * len(self.numel))  # the step counters, on the device
        self.steady = t.total
        # The second micro step meets gradients; those after it are like it.
        for _ in range(min(self.grad_accum, 2)):
            self._micro_step()
            self.has_gradients = True
        t.enter("optimizer_step")
        self._optimizer_step()

    def _accumulate(self, numel: int) -> None:
        """A gradient in the compute dtype becomes fp32, and the parameter's or part of it."""
        t = self.t
        if self.copies:
            t.take(GRADIENTS, 4 * numel)
            t.give(TEMPORARIES, self.s.compute * numel)
        else:
            t.take(GRADIENTS, 4 * numel)
            t.give(TEMPORARIES, 4 * numel)
        if self.has_gradients:
            t.give(GRADIENTS, 4 * numel)

    def _micro_step(self) -> None:
        t, s = self.t, self.s
        t.enter("forward")
        t.take(INPUTS, 8 * s.n, 8 * s.n)
        self._embed()
        self._blocks(self.block.forward)
        self._final_norm()
        t.enter("loss")
        self._loss()
        t.enter("loss_backward")
        self._loss_backward()
        t.enter("block_backward")
        self._blocks(self.block.backward)
        t.enter("backward_tail")
        self._tail()
        t.give(INPUTS, 8 * s.n, 8 * s.n)

    def _blocks(self, play: Callable[[], None]) -> None:
        """Play the first and the last block, and between them as many times the first one's effect.

        What lives grows or shrinks by the same amount from block to block, so that the fullest moment falls in the first or
        the last.
        """
        before = self.t.live.copy()
        play()
        if self.run.model.n_layer > 2:
            change = {kind: self.t.live[kind] - before[kind] for kind in self.t.live}
            for kind, size in change.items():
                self.t.live[kind] += size * (self.run.model.n_layer - 2)
                self.t.total += size * (self.run.model.n_layer - 2)
        if self.run.model.n_layer > 1:
            play()

    def _embed(self) -> None:
        t, s = self.t, self.s
        positions = 8 * s.block
        table = s.block * s.hidden
        if self.copies:
            t.touch(TEMPORARIES, 4 * s.n * s.hidden, s.stream())
        t.take(TEMPORARIES, s.stream(), positions, s.compute * table)
        t.take(ACTIVATIONS, s.residual_stream)
        if s.residual != s.compute:
            t.touch(TEMPORARIES, s.stream())
        t.give(TEMPORARIES, s.stream(), s.compute * table)
        t.give(TEMPORARIES, positions)
        t.take(ACTIVATIONS, positions)  # the indices are kept for the embedding's gradient

    def _final_norm(self) -> None:
        t, s = self.t, self.s
        t.hold(ACTIVATIONS, self.block.statistics)
        if s.residual != s.compute:
            t.take(TEMPORARIES, s.residual_stream)
        t.take(LOSS, s.stream())
        if s.residual != s.compute:
            t.give(TEMPORARIES, s.residual_stream)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def _loss(self) -> None:
        if self.run.train.loss == "full":
            self._full_loss()
        else:
            self._chunked_loss()

    def _full_loss(self) -> None:
        """Logits, their fp32 copy and the log-softmax, of which the last is kept."""
        t, s = self.t, self.s
        logits = s.n * s.vocab
        if self.copies:
            t.take(COPIES, s.compute * self.head)
        t.take(LOSS, s.compute * logits)
        if s.compute != 4:
            t.take(LOSS, 4 * logits)
        t.take(LOSS, 4 * logits)
        t.give(LOSS, s.compute * logits)
        if s.compute != 4:
            t.give(LOSS, 4 * logits)

    def _chunked_loss(self) -> None:
        """Both gradients, and a chunk's logits at a time; the hidden states are not kept."""
        t, s = self.t, self.s
        chunk = min(self.run.train.loss_chunk, s.n)
        copy = s.compute * self.head if self.copies else 0
        t.take(COPIES, copy)
        t.take(LOSS, s.stream())
        t.take(LOSS, 4 * self.head)
        kv, vh = chunk * s.vocab, self.head
        t.touch(LOSS, s.compute * kv, 4 * kv, s.compute * kv if s.compute != 4 else 0)
        t.touch(LOSS, s.compute * kv, s.compute * vh if s.compute != 4 else 0)
        t.give(COPIES, copy)
        t.give(LOSS, s.stream())  # the hidden states

    def _loss_backward(self) -> None:
        """From the loss to the residual stream's gradient."""
        t, s = self.t, self.s
        if self.run.train.loss == "full":
            self._full_loss_backward()
        t.take(TEMPORARIES, s.residual_stream)
        if s.residual != s.compute:
            t.touch(TEMPORARIES, s.residual_stream)
        t.give(LOSS, s.stream())
        t.give(ACTIVATIONS, s.residual_stream)
        t.drop(ACTIVATIONS, self.block.statistics)
        if self.run.train.loss != "full":
            t.give(LOSS, 4 * self.head)
            t.take(GRADIENTS, 4 * self.head)
        if not self.run.model.tie_head and self.has_gradients:
            t.give(GRADIENTS, 4 * self.head)

    def _full_loss_backward(self) -> None:
        t, s = self.t, self.s
        logits = s.n * s.vocab
        t.take(LOSS, 4 * logits)  # of the log-softmax
        t.take(LOSS, 4 * logits)  # of the fp32 logits
        t.give(LOSS, 4 * logits, 4 * logits)
        if s.compute != 4:
            t.take(LOSS, s.compute * logits)
            t.give(LOSS, 4 * logits)
        t.take(TEMPORARIES, s.compute * self.head)
        t.take(LOSS, s.stream())  # of the hidden states
        t.give(LOSS, s.compute * logits)
        t.give(LOSS, s.stream())  # the hidden states themselves
        if self.copies:
            t.give(COPIES, s.compute * self.head)
        t.take(GRADIENTS, 4 * self.head)
        t.give(TEMPORARIES, s.compute * self.head)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _tail(self) -> None:
        """The embeddings' gradients; a tied head's is added to the token embedding's."""
        t, s = self.t, self.s
        stream = s.stream()
        if self.copies:
            t.take(TEMPORARIES, 4 * s.n * s.hidden)
            t.give(TEMPORARIES, s.residual_stream)
            stream = 4 * s.n * s.hidden
        t.take(GRADIENTS, 4 * self.head)
        t.give(TEMPORARIES, stream)
        if self.run.model.tie_head:
            t.take(GRADIENTS, 4 * self.head)
            t.give(GRADIENTS, 4 * self.head, 4 * self.head)
        if self.has_gradients:
            t.give(GRADIENTS, 4 * self.head)
        t.give(ACTIVATIONS, 8 * s.block)

    def _optimizer_step(self) -> None:
        if not self.run.train.fused:
            matrices = sum(rounded(4 * numel) for name, numel in self.numel.items() if len(self.shapes[name]) > 1)
            self.t.hold(TEMPORARIES, matrices)
            self.t.drop(TEMPORARIES, matrices)


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


__all__ = ["PHASES", "Moment", "Prediction", "predict"]
