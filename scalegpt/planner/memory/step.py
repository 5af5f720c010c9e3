"""One optimizer step as a ledger: what the trainer allocates and frees, in order, from state to state."""

from collections.abc import Callable, Iterable
from typing import Self

from scalegpt.architecture import kernels
from scalegpt.architecture.loss import LossPart
from scalegpt.architecture.parameters import Shape
from scalegpt.architecture.parts import TOKENS
from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.planner.attention import attention_kernel
from scalegpt.planner.memory.newton_schulz import Exchange
from scalegpt.planner.memory.predict import Prediction
from scalegpt.planner.memory.programs import block_at, embedding_at, final_norm_at, loss_at, numerics_of
from scalegpt.planner.memory.sizes import GRADIENTS, INPUTS, LOSS, OPTIMIZER, TEMPORARIES, WEIGHTS, Sizes
from scalegpt.planner.memory.states import casts_weights, counters, state_bytes, temporary_bytes, tensors_of
from scalegpt.planner.memory.tensors import Tensors, numel
from scalegpt.planner.memory.timeline import Effect, Timeline, rounded


class Step:
    """One optimizer step under ``plain``: one process, fp32 weights that are cast where they are used.

    Sharded backends derive from it: they change what is held between steps, what a weight's gradient becomes, and what
    happens before and after a block.

    Args:
        run: a run whose precision and micro batch are fixed.
        mesh: how the ranks are laid out.
        grad_accum: micro batches per optimizer step.

    Raises:
        InputError: the backend cannot run the mesh.
    """

    backwards_alike = True
    """Whether the backward passes of blocks do the same, given which gradients exist."""

    def __init__(self, run: RunConfig, mesh: Mesh, grad_accum: int) -> None:
        run.parallel.spec.check_mesh(mesh)
        self.run, self.shards, self.grad_accum = run, mesh.shards, grad_accum
        # The second micro step meets gradients; those between it and the last are like it.
        self.micro_steps = min(grad_accum, 3)
        self.t, self.s = Timeline(), Sizes.of(run)
        self.parameters, self.counted = Tensors.of(run.model), tensors_of(run.model)
        self.shapes = self.parameters.shapes
        self.optimizer, self.exchange = run.train.optimizer_spec, Exchange(mesh, run.train.precision)
        self.casts_weights = casts_weights(run)
        self.copies = self.casts_weights and self.s.compute != 4
        self.gradient_bytes = 4 if self.casts_weights else self.s.compute
        self.has_gradients, self.last_micro, self.at_last_block = False, True, False
        self.block_shapes, self.root_shapes = self.parameters.block, self.parameters.root
        self.head = numel(self.shapes[TOKENS])
        self._seen: dict[object, Effect] = {}
        self._attend(attention_kernel(run))

    def attending_with(self, kernel: str) -> Self:
        """The step with this attention kernel; itself."""
        if kernel != self.kernel:
            self._attend(kernel)
        return self

    def _attend(self, kernel: str) -> None:
        self.kernel = kernel
        model, batch = self.run.model, self.s.batch
        numerics = numerics_of(self.run, kernel)
        self.block = block_at(model, numerics, self.run.train.recompute, batch)
        self.embedding, self.final_norm = embedding_at(model, numerics, batch), final_norm_at(model, numerics, batch)
        self.loss = loss_at(LossPart.of(model, self.run.train), numerics, batch)

    def play(self) -> Prediction:
        """Play the states, the micro steps and the optimizer."""
        t = self.t
        self.hold_states()
        steady = t.total
        for number in range(self.micro_steps):
            self.last_micro = number == self.micro_steps - 1
            self._micro_step()
            self.has_gradients = True
        t.enter("optimizer_step")
        self._optimizer_step()
        return Prediction.of(t, steady)

    # --- what a sharded backend does otherwise -----------------------------------------------------------------------

    def held(self, shape: Shape) -> int:
        """Bytes of an fp32 tensor of this shape on a rank, as the allocator counts them."""
        return rounded(4 * numel(shape))

    def over_all(self, size: Callable[[Shape], int]) -> int:
        """The sum of a size over all parameters."""
        block = sum(map(size, self.parameters.block))
        return sum(map(size, self.parameters.root)) + self.run.model.n_layer * block

    def hold_states(self) -> None:
        """Hold what lives between steps: fp32 weights, the optimizer's state, and the step counters on the device."""
        whole = self.over_all(self.held)
        self.t.hold(WEIGHTS, whole)
        self.t.hold(OPTIMIZER, state_bytes(self.optimizer, self.counted, self.held))
        self.t.hold(OPTIMIZER, rounded(4) * counters(self.optimizer, self.counted))

    def accumulate(self, elements: int) -> None:
        """Bring a weight's gradient, made in the compute dtype and counted as temporary, to where gradients add up.

        Here: cast to fp32, and it becomes the parameter's, or is added to it in place.
        """
        if self.s.compute == 4:
            self.t.give(TEMPORARIES, 4 * elements)
            self.t.take(GRADIENTS, 0 if self.has_gradients else 4 * elements)
            return
        self.t.take(GRADIENTS, 4 * elements)
        self.t.give(TEMPORARIES, self.s.compute * elements)
        if self.has_gradients:
            self.t.give(GRADIENTS, 4 * elements)

    def small_gradients(self, shapes: Iterable[Shape]) -> None:
        """Hold gradients that are too small to follow one by one: of norms and biases."""
        if not self.has_gradients:
            self.t.hold(GRADIENTS, sum(rounded(self.gradient_bytes * numel(shape)) for shape in shapes))

    def before_forward(self) -> None:
        """Gather what a forward pass needs from the start."""

    def block_forward(self) -> None:
        """One block's forward pass."""
        self.alike("forward", self.play_forward)

    def before_backward(self) -> None:
        """What precedes the backward pass."""

    def block_backward(self) -> None:
        """One block's backward pass, and what follows it."""
        if self.backwards_alike:
            self.alike(("backward", self.has_gradients), self.play_backward)
        else:
            self.play_backward()
        self.small_gradients(self.parameters.vectors)

    def play_forward(self) -> None:
        """The block's forward pass itself."""
        self.block.forward(self.t)

    def play_backward(self) -> None:
        """The block's backward pass itself."""
        self.block.leave(self.t)
        self.block.backward(self.t, lambda _name, elements: self.accumulate(elements))

    def after_backward(self) -> None:
        """What follows the last gradient."""

    def alike(self, name: object, play: Callable[[], None]) -> None:
        """Play what does the same wherever it begins: the first time as it is, then its effect."""
        effect = self._seen.get(name)
        if effect is None:
            self._seen[name] = self.t.observe(play)
        else:
            self.t.apply(effect)

    # --- one micro step ----------------------------------------------------------------------------------------------

    def _micro_step(self) -> None:
        t, s = self.t, self.s
        t.enter("forward")
        t.take(INPUTS, 8 * s.n, 8 * s.n)
        if self.has_gradients:  # those of the micro step before were held until these were there
            t.give(INPUTS, 8 * s.n, 8 * s.n)
        self.before_forward()
        self._embed()
        self._blocks(self.block_forward)
        self._final_norm()
        t.enter("loss")
        self._loss()
        t.enter("loss_backward")
        self.loss.leave(t)
        self.before_backward()
        self._loss_backward()
        t.enter("block_backward")
        self._blocks(self.block_backward)
        t.enter("backward_tail")
        self._tail()
        self.after_backward()

    def _blocks(self, play: Callable[[], None]) -> None:
        """Play the first two blocks and the last two, and between them as many times the second one's effect.

        From the second to the last but one, what lives grows or shrinks by the same amount from block to block, so that the
        fullest moment falls in one of these. The last is another matter: nothing is gathered ahead in it.
        """
        layers = self.run.model.n_layer
        played = [*range(min(layers, 2)), *range(max(2, layers - 2), layers)]
        for index in played:
            before = self.t.live.copy()
            self.at_last_block = index == layers - 1
            play()
            if index == 1 and layers > 4:
                self.t.repeat(before, layers - 4)

    def _embed(self) -> None:
        self.embedding.forward(self.t)

    def _final_norm(self) -> None:
        self.final_norm.forward(self.t)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def _loss(self) -> None:
        self.loss.forward(self.t)

    def _loss_backward(self) -> None:
        """From the loss to the residual stream's gradient, through the final norm."""
        self.loss.backward(self.t, lambda _name, _elements: self._head_gradient())
        if not self.run.model.tie_head:
            self.settle_head()
        self.t.enter("block_backward")
        self.final_norm.leave(self.t)
        self.final_norm.backward(self.t, lambda _name, _elements: None)

    def _head_gradient(self) -> None:
        """The head's gradient has been made: in the compute dtype, or by the chunked loss in fp32 and in its own memory."""
        t, made, wanted = self.t, self.s.compute * self.head, self.gradient_bytes * self.head
        kind = TEMPORARIES
        if self.run.train.loss == "chunked":
            kind, made = LOSS, 4 * self.head
        if made != wanted:
            t.take(GRADIENTS, wanted)
            t.give(kind, made)
        else:
            t.give(kind, made)
            t.take(GRADIENTS, wanted)

    def settle_head(self) -> None:
        """An untied head's gradient is complete at once, and is added to one that exists."""
        if self.has_gradients:
            self.t.give(GRADIENTS, 4 * self.head)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _tail(self) -> None:
        """The embeddings' gradients."""
        self.embedding.backward(self.t, self._embedding_gradient)

    def _embedding_gradient(self, name: str, elements: int) -> None:
        """A table's gradient has been made, dense and in the dtype of the weights."""
        self.t.give(GRADIENTS, self.gradient_bytes * elements)
        if name != TOKENS:
            self.small_gradients(self.parameters.small)
            return
        self.t.take(GRADIENTS, self.gradient_bytes * elements)
        if self.run.model.tie_head:
            if self.run.train.loss == "full" and not self.copies:
                self.t.touch(GRADIENTS, self.gradient_bytes * self.head)  # a third is made of the two
            self.t.give(GRADIENTS, self.gradient_bytes * self.head)  # else autograd adds one to the other in place
        self.settle_embedding()

    def settle_embedding(self) -> None:
        """The token embedding's gradient is added to one that exists."""
        if self.has_gradients:
            self.t.give(GRADIENTS, 4 * self.head)

    def _optimizer_step(self) -> None:
        """The norm, and then what the update allocates for a while."""
        norm = kernels.grouped_norm(len(self.shapes), self.largest_held)
        self.t.touch(TEMPORARIES, *kernels.sizes(norm))
        temporaries = temporary_bytes(self.optimizer, self.counted, self.held, self.exchange.peak_bytes)
        self.t.hold(TEMPORARIES, temporaries)
        self.t.drop(TEMPORARIES, temporaries)

    @property
    def largest_held(self) -> int:
        """Elements of the largest gradient of which the norm is taken."""
        return self.parameters.largest
