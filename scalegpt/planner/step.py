"""One optimizer step as a ledger: what the trainer allocates and frees, in order, from state to state."""

from collections.abc import Callable, Iterable
from typing import Self

from scalegpt.config import RunConfig
from scalegpt.config.train import LOSS_ROWS
from scalegpt.planner import kernels
from scalegpt.planner.attention import attention_kernel
from scalegpt.planner.block import BlockLedger
from scalegpt.planner.memory import Prediction
from scalegpt.planner.newton_schulz import exchange_of
from scalegpt.planner.parameters import Shape
from scalegpt.planner.sizes import ACTIVATIONS, COPIES, TEMPORARIES, Sizes
from scalegpt.planner.states import optimizer_row, tensors_of
from scalegpt.planner.tensors import Tensors, numel
from scalegpt.planner.timeline import Effect, Timeline, rounded

WEIGHTS, GRADIENTS, OPTIMIZER, INPUTS, LOSS = "weights", "gradients", "optimizer state", "inputs", "loss"


class Step:
    """One optimizer step under ``plain``: one process, fp32 weights that are cast where they are used.

    Sharded backends derive from it: they change what is held between steps, what a weight's gradient becomes, and what
    happens before and after a block.

    Args:
        run: a run whose precision and micro batch are fixed.
        ranks: data-parallel ranks W.
        grad_accum: micro batches per optimizer step.
    """

    casts_weights = True

    def __init__(self, run: RunConfig, ranks: int, grad_accum: int) -> None:
        self.run, self.ranks, self.grad_accum = run, ranks, grad_accum
        # The second micro step meets gradients; those between it and the last are like it.
        self.micro_steps = min(grad_accum, 3)
        self.t, self.s = Timeline(), Sizes.of(run)
        self.parameters, self.counted = Tensors.of(run.model), tensors_of(run.model)
        self.shapes = self.parameters.shapes
        self.optimizer, self.exchange = optimizer_row(run.train), exchange_of(run, ranks)
        self.copies = self.casts_weights and self.s.compute != 4
        self.gradient_bytes = 4 if self.casts_weights else self.s.compute
        self.has_gradients, self.last_micro, self.at_last_block = False, True, False
        self.block_shapes, self.root_shapes = self.parameters.block, self.parameters.root
        self.head = numel(self.shapes["wte.weight"])
        self._seen: dict[object, Effect] = {}
        self._attend(attention_kernel(run))

    def attending_with(self, kernel: str) -> Self:
        """The step with this attention kernel; itself."""
        if kernel != self.kernel:
            self._attend(kernel)
        return self

    def _attend(self, kernel: str) -> None:
        self.kernel = kernel
        self.block = BlockLedger(
            self.run, kernel, self.t, self.s, fp32_weights=self.casts_weights, accumulate=self.accumulate
        )

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
        self.t.hold(OPTIMIZER, self.optimizer.state_bytes(self.counted, self.held))
        self.t.hold(OPTIMIZER, rounded(4) * self.optimizer.counters(self.counted))

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
        self.alike("forward", self.block.forward)

    def before_backward(self) -> None:
        """What precedes the backward pass."""

    def block_backward(self) -> None:
        """One block's backward pass, and what follows it."""
        self.play_backward()
        self.small_gradients(self.parameters.vectors)

    def play_backward(self) -> None:
        """The block's backward pass itself; it depends on the gradients that exist."""
        self.alike(("backward", self.has_gradients), self.block.backward)

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
        if self.run.train.loss == "chunked":
            t.give(LOSS, s.stream())  # the hidden states, of which the loss has made the gradient
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
        if self.block.mask:
            t.take(ACTIVATIONS, self.block.mask)
            t.touch(ACTIVATIONS, s.residual_stream)

    def _final_norm(self) -> None:
        t, s = self.t, self.s
        t.take(COPIES, *self.block.norm_copies)
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
        rows = min(LOSS_ROWS, chunk)
        copy = s.compute * self.head if self.copies else 0
        t.take(COPIES, copy)
        t.take(LOSS, s.stream())
        t.take(LOSS, 4 * self.head)
        kv, vh = chunk * s.vocab, self.head
        t.touch(LOSS, s.compute * kv, 4 * rows * s.vocab if s.compute != 4 else 0)
        t.touch(LOSS, s.compute * kv, s.compute * vh if s.compute != 4 else 0)
        t.give(COPIES, copy)

    def _loss_backward(self) -> None:
        """From the loss to the residual stream's gradient, through the final norm."""
        t, s = self.t, self.s
        if self.run.train.loss == "full":
            self._full_loss_backward()
        else:
            self._chunked_loss_backward()
        if not self.run.model.tie_head:
            self.settle_head()
        t.enter("block_backward")
        t.take(TEMPORARIES, s.residual_stream)
        if s.residual != s.compute:
            t.touch(TEMPORARIES, s.residual_stream)
        t.give(LOSS, s.stream())
        t.give(ACTIVATIONS, s.residual_stream)
        t.drop(ACTIVATIONS, self.block.statistics)
        t.give(COPIES, *self.block.norm_copies)

    def _chunked_loss_backward(self) -> None:
        """The head's gradient, fp32, in the dtype of the weights that the loss was given."""
        if self.gradient_bytes != 4:
            self.t.take(GRADIENTS, self.gradient_bytes * self.head)
            self.t.give(LOSS, 4 * self.head)
        else:
            self.t.give(LOSS, 4 * self.head)
            self.t.take(GRADIENTS, 4 * self.head)

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
        if self.gradient_bytes != s.compute:
            t.take(GRADIENTS, self.gradient_bytes * self.head)
            t.give(TEMPORARIES, s.compute * self.head)
        else:
            t.give(TEMPORARIES, s.compute * self.head)
            t.take(GRADIENTS, s.compute * self.head)

    def settle_head(self) -> None:
        """An untied head's gradient is complete at once, and is added to one that exists."""
        if self.has_gradients:
            self.t.give(GRADIENTS, 4 * self.head)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _tail(self) -> None:
        """The embeddings' gradients; a tied head's is added to the token embedding's."""
        t, s = self.t, self.s
        bytes_each, stream = self.gradient_bytes, s.residual_stream
        if self.block.mask:
            t.touch(TEMPORARIES, stream)
            t.give(ACTIVATIONS, self.block.mask)
        if s.residual != s.compute:
            t.take(TEMPORARIES, s.stream())
            t.give(TEMPORARIES, stream)
            stream = s.stream()
        self._positions()
        if self.copies:
            t.take(TEMPORARIES, 4 * s.n * s.hidden)
            t.give(TEMPORARIES, stream)
            stream = 4 * s.n * s.hidden
        t.take(GRADIENTS, bytes_each * self.head)
        t.touch(TEMPORARIES, *kernels.sizes(kernels.embedding_backward(s.n, s.vocab, s.hidden)))
        t.give(TEMPORARIES, stream)
        if self.run.model.tie_head:
            if self.run.train.loss == "full" and not self.copies:
                t.touch(GRADIENTS, bytes_each * self.head)  # of the two a third is made
            t.give(GRADIENTS, bytes_each * self.head)  # else autograd adds one to the other in place
        self.settle_embedding()

    def _positions(self) -> None:
        """The position embedding's gradient: the sum over the batch, cast to the weights' dtype."""
        t, s = self.t, self.s
        table = s.block * s.hidden
        arriving = s.compute * table
        t.take(TEMPORARIES, arriving)
        if self.copies:
            t.take(TEMPORARIES, 4 * table)
            t.give(TEMPORARIES, arriving)
            arriving = 4 * table
        t.touch(GRADIENTS, self.gradient_bytes * table)
        t.give(TEMPORARIES, arriving)
        self.small_gradients(self.parameters.small)
        t.give(ACTIVATIONS, 8 * s.block)

    def settle_embedding(self) -> None:
        """The token embedding's gradient is added to one that exists."""
        if self.has_gradients:
            self.t.give(GRADIENTS, 4 * self.head)

    def _optimizer_step(self) -> None:
        """The norm, and then what the update allocates for a while."""
        norm = kernels.grouped_norm(len(self.shapes), self.largest_held)
        self.t.touch(TEMPORARIES, *kernels.sizes(norm))
        temporaries = self.optimizer.temporary_bytes(self.counted, self.held, self.exchange.peak_bytes)
        self.t.hold(TEMPORARIES, temporaries)
        self.t.drop(TEMPORARIES, temporaries)

    @property
    def largest_held(self) -> int:
        """Elements of the largest gradient of which the norm is taken."""
        return self.parameters.largest
