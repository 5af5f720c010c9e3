"""One optimizer step, simulated: the trainer's allocations and frees, in order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scalegpt.architecture import kernels
from scalegpt.architecture.loss import LossPart
from scalegpt.architecture.packing import PackingSizes
from scalegpt.architecture.parameters import Shape
from scalegpt.architecture.parts import TOKENS, rotary_table
from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.planner.memory.newton_schulz import Exchange
from scalegpt.planner.memory.programs import block_at, embedding_at, final_norm_at, loss_at, numerics_of
from scalegpt.planner.memory.states import casts_weights, counters, state_bytes, temporary_bytes, tensors_of
from scalegpt.planner.memory.tensors import ModelShapes, numel
from scalegpt.planner.memory.timeline import (
    GRADIENTS,
    INPUTS,
    LOSS,
    OPTIMIZER,
    TEMPORARIES,
    WEIGHTS,
    Timeline,
    rounded,
)

PHASES = ("forward", "loss", "loss_backward", "block_backward", "backward_tail", "optimizer_step")
"""The phases of a step, in order. With gradient accumulation, a phase's peak is the largest over all micro steps."""


@dataclass(frozen=True)
class Prediction:
    """The predicted memory of a training step, in bytes per rank.

    Attributes:
        peak_bytes: the peak: the most bytes that are allocated at the same time.
        phase: the phase in which this peak falls.
        phases: phase → the most live bytes in this phase.
        breakdown: kind of memory → its bytes at the peak; they add up to ``peak_bytes``.
        steady_bytes: the bytes that live between steps.
        host_bytes: the offloaded bytes in host memory.
    """

    peak_bytes: int
    phase: str
    phases: dict[str, int]
    breakdown: dict[str, int]
    steady_bytes: int
    host_bytes: int = 0


class Step:
    """One simulated optimizer step under ``plain``: one process, fp32 weights that are cast where they are used.

    Sharded backends derive from this class. They change what is held between steps, how a weight's gradient is kept, and what
    happens before and after a block.

    Args:
        run: a run whose precision and micro batch are fixed.
        mesh: how the ranks are laid out.
        grad_accum: micro batches per optimizer step.
        kernel: the attention kernel.

    Raises:
        InputError: the backend cannot run the mesh.
    """

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int, kernel: str) -> None:
        run.parallel.spec.check_mesh(mesh)
        self.run, self.shards, self.grad_accum = run, mesh.shards, grad_accum
        # From the second micro step on gradients exist. So the second stands for all between the first and the last.
        self.micro_steps = min(grad_accum, 3)
        self.t, self.host = Timeline(), 0
        self.parameters, self.counted = ModelShapes.of(run.model), tensors_of(run.model)
        self.optimizer, self.exchange = run.train.optimizer_spec, Exchange(mesh, run.train.precision)
        self.has_gradients, self.last_micro, self.at_last_block = False, True, False
        self.shapes = self.parameters.shapes
        self.head = numel(self.shapes[TOKENS])
        model, batch, numerics = run.model, run.train.micro_batch, numerics_of(run, kernel)
        self.compute = numerics.compute
        self.gradient_bytes = 4 if casts_weights(run) else self.compute
        self.block = block_at(model, numerics, run.train.recompute, batch)
        self.embedding, self.final_norm = embedding_at(model, numerics, batch), final_norm_at(model, numerics, batch)
        self.loss = loss_at(LossPart.of(model, run.train), numerics, batch)
        # The math kernel adds the mask to the scores in place, so autograd does not keep it; recompute does.
        self.keeps_mask = kernel != "math" or run.train.recompute != "none"
        self.packing = PackingSizes.of(model, batch, self.compute) if run.train.packs_documents else None

    def play(self) -> Prediction:
        """Simulate the states, the micro steps and the update; return the memory at the moment with the most live bytes."""
        t = self.t
        self.hold_states()
        self.t.hold(WEIGHTS, rounded(rotary_table(self.run.model)))
        steady = t.total
        for number in range(self.micro_steps):
            self.last_micro = number == self.micro_steps - 1
            self._micro_step()
            self.has_gradients = True
        t.enter("optimizer_step")
        self._optimizer_step()
        (phase, moment), peaks = t.peak(), t.peaks
        phases = {name: peaks[name].total for name in PHASES if name in peaks}
        return Prediction(moment.total, phase, phases, moment.kinds, steady, self.host)

    # --- what sharded backends change --------------------------------------------------------------------------------

    def held(self, shape: Shape) -> int:
        """Bytes that a rank holds of an fp32 tensor of this shape, as the allocator counts them."""
        return rounded(4 * numel(shape))

    def over_all(self, size: Callable[[Shape], int]) -> int:
        """The sum of ``size(shape)`` over all parameters."""
        return sum(count * size(shape) for (_, shape), count in self.counted.items())

    def hold_states(self) -> None:
        """Allocate what lives between steps: fp32 weights, the optimizer's state, and the step counters on the device."""
        self.t.hold(WEIGHTS, self.over_all(self.held))
        self.t.hold(OPTIMIZER, state_bytes(self.optimizer, self.counted, self.held))
        self.t.hold(OPTIMIZER, rounded(4) * counters(self.optimizer, self.counted))

    def accumulate(self, elements: int) -> None:
        """Move the new gradient of a weight of ``elements`` elements from temporaries to gradients.

        The gradient has the compute dtype. It is cast to fp32, and then becomes the parameter's gradient or is added to
        it in place.
        """
        if self.compute == 4:
            self.t.give(TEMPORARIES, 4 * elements)
            self.t.take(GRADIENTS, 0 if self.has_gradients else 4 * elements)
            return
        self.t.take(GRADIENTS, 4 * elements)
        self.t.give(TEMPORARIES, self.compute * elements)
        if self.has_gradients:
            self.t.give(GRADIENTS, 4 * elements)

    @property
    def adds_at_once(self) -> bool:
        """Whether parameters already have gradients, so that a new gradient is added as soon as it is made."""
        return self.has_gradients

    def small_gradients(self, shapes: Iterable[Shape]) -> None:
        """Count the gradients that a part's program leaves out: those of norms, biases and position embeddings."""
        if not self.adds_at_once:
            self.t.hold(GRADIENTS, sum(rounded(self.gradient_bytes * numel(shape)) for shape in shapes))

    def before_forward(self) -> None:
        """Gather the weights that a sharded backend gathers before the forward pass. This class gathers none."""

    def block_forward(self) -> None:
        """Simulate one block's forward pass."""
        self.block.forward(self.t)

    def before_backward(self) -> None:
        """Simulate what a sharded backend does before the backward pass. This class does nothing."""

    def block_backward(self) -> None:
        """Simulate one block's backward pass, and count the block's gradients."""
        self.block.leave(self.t)
        self.block.backward(self.t, lambda _name, elements: self.accumulate(elements))
        self.small_gradients(self.parameters.vectors)

    def settle_head(self) -> None:
        """Add the complete gradient of an untied head or the token embedding to an existing one, if there is one."""
        if self.adds_at_once:
            self.t.give(GRADIENTS, self.gradient_bytes * self.head)

    def after_backward(self) -> None:
        """Simulate what a sharded backend does after the last gradient of a micro step. This class does nothing."""

    @property
    def largest_held(self) -> int:
        """The number of elements that this rank has of the largest gradient.

        The gradient norm's memory depends on it.
        """
        return self.parameters.largest

    # --- one micro step ----------------------------------------------------------------------------------------------

    def _micro_step(self) -> None:
        t, ids = self.t, 8 * self.run.train.micro_batch * self.run.model.block_size
        t.enter("forward")
        t.take(INPUTS, ids, ids)
        if self.has_gradients:  # the inputs of the micro step before live until the new ones exist
            t.give(INPUTS, ids, ids)
        self.before_forward()
        self._pack()
        self._embed()
        self._turn()
        self._blocks(self.block_forward)
        self._final_norm()
        t.enter("loss")
        self._loss()
        t.enter("loss_backward")
        self.loss.leave(t)
        self._end_forward()
        self.before_backward()
        self._loss_backward()
        t.enter("block_backward")
        self._blocks(self.block_backward)
        self._end_blocks()
        t.enter("backward_tail")
        self._tail()
        if self.packing is not None and self.run.model.position == "learned":
            t.give(INPUTS, self.packing.positions)
        self.after_backward()

    def _pack(self) -> None:
        """Make positions and mask of a micro batch of packed documents, if documents are packed."""
        sizes = self.packing
        if sizes is None:
            return
        self.t.touch(TEMPORARIES, *sizes.finding)
        self.t.take(INPUTS, sizes.positions, sizes.mask)
        self.t.touch(TEMPORARIES, *sizes.masking)

    def _turn(self) -> None:
        """Copy the rows of the rotary table for the positions of packed documents.

        Without packing, the table itself is used.
        """
        if self.packing is not None:
            self.t.take(INPUTS, self.packing.turns)

    def _end_forward(self) -> None:
        """Free what packed documents do not need in the backward pass: unused positions, and perhaps the mask."""
        if self.packing is None:
            return
        if self.run.model.position != "learned":
            self.t.give(INPUTS, self.packing.positions)
        if not self.keeps_mask:
            self.t.give(INPUTS, self.packing.mask)

    def _end_blocks(self) -> None:
        """Free what the blocks share of packed documents, after the first block's backward pass."""
        if self.packing is None:
            return
        self.t.give(INPUTS, self.packing.turns)
        if self.keeps_mask:
            self.t.give(INPUTS, self.packing.mask)

    def _blocks(self, play: Callable[[], None]) -> None:
        """Simulate a pass through all blocks; ``play`` simulates one block."""
        layers = self.run.model.n_layer
        for index in range(layers):
            self.at_last_block = index == layers - 1
            play()

    def _embed(self) -> None:
        self.embedding.forward(self.t)

    def _final_norm(self) -> None:
        self.final_norm.forward(self.t)

    def _loss(self) -> None:
        self.loss.forward(self.t)

    def _loss_backward(self) -> None:
        """Simulate the backward pass from the loss, through the final norm, to the residual stream's gradient."""
        self.loss.backward(self.t, lambda _name, _elements: self._head_gradient())
        if not self.run.model.tie_head:
            self.settle_head()
        self.t.enter("block_backward")
        self.final_norm.leave(self.t)
        self.final_norm.backward(self.t, lambda _name, _elements: None)
        self.small_gradients(self.parameters.last_norm)

    def _head_gradient(self) -> None:
        """Count the head's new gradient, made in the compute dtype or, by the chunked loss, in fp32."""
        chunked, wanted = self.run.train.loss == "chunked", self.gradient_bytes * self.head
        kind, made = (LOSS, 4 * self.head) if chunked else (TEMPORARIES, self.compute * self.head)
        if made != wanted:
            self.t.take(GRADIENTS, wanted)
            self.t.give(kind, made)
        else:
            self.t.give(kind, made)
            self.t.take(GRADIENTS, wanted)

    def _tail(self) -> None:
        """Simulate the backward pass of the embeddings."""
        self.embedding.backward(self.t, self._embedding_gradient)

    def _embedding_gradient(self, name: str, elements: int) -> None:
        """Count the new gradient of an embedding table, which is dense and in the dtype of the weights."""
        size = self.gradient_bytes * elements
        self.t.give(GRADIENTS, size)
        if name != TOKENS:
            assert self.parameters.positions is not None
            self.small_gradients([self.parameters.positions])
            return
        self.t.take(GRADIENTS, size)
        if self.run.model.tie_head:
            if self.run.train.loss == "full" and self.gradient_bytes == self.compute:
                self.t.touch(GRADIENTS, size)  # the sum is a third tensor; else autograd adds in place
            self.t.give(GRADIENTS, size)
        self.settle_head()

    def _optimizer_step(self) -> None:
        """Simulate the gradient norm, then the update with its temporaries."""
        norm = kernels.grouped_norm(len(self.shapes), self.largest_held)
        self.t.touch(TEMPORARIES, *kernels.sizes(norm))
        temporaries = temporary_bytes(self.optimizer, self.counted, self.held, self.exchange.peak_bytes)
        self.t.hold(TEMPORARIES, temporaries)
        self.t.drop(TEMPORARIES, temporaries)
