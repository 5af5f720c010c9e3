"""The memory of one training step of our own code, found without a GPU and without allocating the tensors.

:func:`trace_step` builds the run's model and backend as the trainer does, on tensors that have a shape but no data.
Then it takes two steps: the first makes the optimizer's state, and the second is measured. The trace follows what
PyTorch's eager mode allocates on a CUDA device, in the caching allocator's blocks of 512 bytes. Its figures can be
compared with ``torch.cuda.max_memory_allocated()``, except for

- the workspaces of cuBLAS, some MiB that are the same in every step;
- the bytes that the allocator adds to a request: up to 1 MiB for each large tensor, unless segments are expandable;
- ``torch.compile``, which fuses operations: a compiled block keeps and makes fewer tensors than the traced block.

The phases are :data:`~scalegpt.planner.memory.step.PHASES`, which docs/MEMORY.md describes. A sharded backend's buffers
belong to the phase in which they live.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from scalegpt.backends import Backend, World, build_model, make_backend
from scalegpt.config import RunConfig
from scalegpt.config.backends import DEEPSPEED
from scalegpt.config.train import LOSS_ROWS
from scalegpt.errors import InputError, RunError
from scalegpt.hardware.gpus import Card
from scalegpt.model.gpt import GPT, Block
from scalegpt.model.loss import make_loss
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.attention import attention_kernel
from scalegpt.planner.memory.step import PHASES
from scalegpt.tracing.cuda import cuda_functions, extras, run_as_cuda, shared_extras
from scalegpt.tracing.tracker import Snapshot, Tracker

_BACKWARD = frozenset(PHASES[2:5])


@dataclass(frozen=True)
class Trace:
    """The memory of one step.

    Attributes:
        snapshots: phase → the storages at the moment of the phase with the most live bytes.
        steady: the storages that live between two steps: weights and the optimizer's state.
    """

    snapshots: dict[str, Snapshot]
    steady: Snapshot

    @property
    def phases(self) -> dict[str, int]:
        """Phase → the most bytes that live at once during the phase."""
        return {phase: self.snapshots[phase].size for phase in PHASES}

    @property
    def peak_phase(self) -> str:
        """The phase in which the most bytes live; if several are equal, the first."""
        return max(PHASES, key=self.phases.__getitem__)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that live at once."""
        return self.snapshots[self.peak_phase].size

    @property
    def breakdown(self) -> dict[str, int]:
        """Kind of memory → its bytes at the peak, the largest first.

        Kinds: weights, optimizer, gradients, inputs; activations (kept by blocks and embeddings), loss (kept by the loss),
        recomputed; cast weights, gathered weights, gather buffers, reduce buffers; temporaries.
        """
        return self.snapshots[self.peak_phase].by_kind

    @property
    def steady_bytes(self) -> int:
        """The bytes that live between two steps."""
        return self.steady.size


def trace_step(
    run: RunConfig, *, ranks: int = 1, grad_accum: int = 1, card: Card | None = None, as_cuda: bool = True
) -> Trace:
    """Trace one step in the steady state, on rank 0.

    Args:
        run: a run whose precision, vocabulary and micro batch are fixed.
        ranks: data-parallel ranks W.
        grad_accum: micro batches per step.
        card: the GPU, which decides on the attention kernel if the run leaves the choice to torch.
        as_cuda: if true, follow the allocations of CUDA's kernels, and count no host memory. If false, follow those of
            the CPU's kernels, without most of their temporary memory, and count offloaded states too.

    Raises:
        InputError: the backend cannot be traced, or settings contradict each other.
        RunError: the process has joined a process group.
    """
    _check(run)
    kernel = attention_kernel(run, card)
    if as_cuda:
        run = _with_attention(run, kernel)
    with ExitStack() as context:
        if not run.parallel.spec.one_process:
            context.enter_context(fake_process_group(ranks))
        context.enter_context(_no_collection())
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        backend = _make_backend(run, ranks, grad_accum, fake, as_cuda=as_cuda)
        if as_cuda and kernel == "mem_efficient":
            backend.model.set_attention("auto", expands=True)
        context.enter_context(fake)
        tracker = Tracker(run_as_cuda, extras) if as_cuda else Tracker(extras=shared_extras, block=1)
        context.enter_context(tracker)
        tracker.calibrate()
        context.enter_context(_resizing(tracker))
        context.enter_context(_uncounted_shape_inference(tracker))
        if as_cuda:
            context.enter_context(cuda_functions(kernel))
        offloads = as_cuda and run.parallel.offload == "all"
        if offloads:
            context.enter_context(_copies_to_host(tracker))
        _watch(backend.model, tracker)
        for _ in range(2):
            _mark_states(backend, tracker, fused=run.train.fused, on_host=offloads)
            gc.collect()
            tracker.restart()
            _take_step(backend, tracker, on_host=offloads)
        steady, snapshots = tracker.replay()
        return Trace(snapshots, steady)


def _check(run: RunConfig) -> None:
    if run.parallel.spec is DEEPSPEED:
        raise InputError(
            "backend deepspeed cannot be traced: it runs no steps on tensors without data; trace plain or fsdp"
        )
    if run.train.precision == "auto":
        raise InputError("precision auto cannot be traced; give --precision bf16, fp16 or fp32")


def _with_attention(run: RunConfig, kernel: str) -> RunConfig:
    """The run with ``attention`` ``math`` if ``kernel`` is, else ``auto``, which :func:`cuda_functions` replaces."""
    return replace(run, train=run.train.changed(attention="math" if kernel == "math" else "auto"))


def _make_backend(run: RunConfig, ranks: int, grad_accum: int, fake: FakeTensorMode, *, as_cuda: bool) -> Backend:
    """The trainer's backend, with weights that have a shape and no data."""
    model = build_model(run, compiled=False)
    if run.train.packs_documents:
        model.set_packing(0)  # no allocation depends on where documents end
    if as_cuda:
        model.set_loss(make_loss(run.train.loss, run.train.loss_chunk, rows=LOSS_ROWS))

    def to_empty(*, device: torch.device, recurse: bool = True) -> GPT:
        with fake:
            return GPT.to_empty(model, device=device, recurse=recurse)

    model.to_empty = to_empty  # type: ignore[method-assign,assignment]
    world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, device=torch.device("cpu"))
    return make_backend(run, world, grad_accum, model, optimizer_factory(run.train))


def _take_step(backend: Backend, tracker: Tracker, *, on_host: bool = False) -> None:
    """Take a step as the trainer does. ``on_host`` says that the optimizer updates offloaded states in host memory."""
    shape = backend.run.train.micro_batch, backend.run.model.block_size
    tracker.phase = "forward"
    total = torch.zeros(())
    for micro in range(backend.grad_accum):
        tracker.phase = "forward"
        tokens, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        tracker.mark(tokens, "inputs")
        tracker.mark(targets, "inputs")
        total += backend.micro_step(tokens, targets, last=micro == backend.grad_accum - 1)
        for parameter in backend.model.parameters():
            tracker.mark(parameter.grad, "gradients")
    tracker.phase = "optimizer_step"
    tracker.on_host = on_host
    backend.step(backend.run.train.learning_rate)
    tracker.on_host = False


def _mark_states(backend: Backend, tracker: Tracker, *, fused: bool, on_host: bool) -> None:
    """Mark the tensors that live between two steps as weights or optimizer state, uncounted if ``on_host``."""
    tracker.on_host = on_host
    for parameter in backend.model.parameters():
        tracker.mark(parameter, "weights")
    for table in backend.model.tables:
        tracker.mark(table, "weights")
    for state in backend.optimizer.state.values():
        for name, value in state.items():
            if name == "step" and not fused:
                tracker.ignore(value)  # a number in host memory
            else:
                tracker.mark(value, "optimizer")
    tracker.on_host = False


def _watch(model: GPT, tracker: Tracker) -> None:
    """Wrap the model's parts so that they set the tracker's phase and mark the tensors that they keep for backward."""

    def enter(phase: str) -> Callable[[Any], None]:
        def hook(_gradient: Any) -> None:
            tracker.phase = phase

        return hook

    original_loss, original_embed, made = model.loss, model.embed, [0]

    def embed(tokens: Tensor, past: int = 0, positions: Tensor | None = None) -> Tensor:
        made[0] = tracker.made
        x = original_embed(tokens, past, positions)
        x.register_hook(enter("backward_tail"))  # type: ignore[no-untyped-call]
        return x

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        tracker.mark_since(made[0], "activations")
        hidden.register_hook(enter("block_backward"))  # type: ignore[no-untyped-call]
        tracker.phase = "loss"
        with tracker.keeping("loss"):
            value = original_loss(hidden, head, targets)
        tracker.phase = "loss_backward"
        return value

    model.embed, model.loss = embed, loss  # type: ignore[method-assign]
    for block in model.layers:
        _watch_block(block, tracker)


def _watch_block(block: Block, tracker: Tracker) -> None:
    original = block.body

    def body(*args: Any) -> Tensor:
        if tracker.phase not in _BACKWARD:
            return original(*args)
        with tracker.keeping("recomputed"):
            return original(*args)

    block.body = body  # type: ignore[method-assign,assignment]


@contextmanager
def fake_process_group(ranks: int) -> Iterator[None]:
    """Join, inside the ``with`` block, a process group in which only this process (rank 0) exists.

    Collectives move nothing.

    Raises:
        RunError: the process has joined a group already.
    """
    import torch.distributed._tools.fake_collectives  # noqa: F401  # collectives on tensors without data
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RunError(
            "a trace makes its own process group, but this process has already joined one; trace in another process"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Switch off automatic garbage collection, whose timing is random.

    ``gc.collect`` then frees only objects made since.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def _overridden(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a function that a class or an object has inherited under this name, inside the ``with`` block."""
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)


@contextmanager
def _resizing(tracker: Tracker) -> Iterator[None]:
    """Report storages that are resized to the tracker, since FSDP2 frees and allocates gathered weights by resizing them."""
    inherited = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> None:
        inherited(storage, size)
        tracker.resized(storage)

    with _overridden(torch.UntypedStorage, "resize_", resize):
        yield


@contextmanager
def _copies_to_host(tracker: Tracker) -> Iterator[None]:
    """Make FSDP2 really copy between host and device. In a trace both are the CPU, so torch would leave the copies out.

    FSDP2 copies with ``tensor.to(device, non_blocking=…)``: shards to the device without blocking (``_fsdp_param.py:
    all_gather_inputs``), reduced gradients to the host with blocking, since memory is not pinned here
    (``_fsdp_collectives.py: foreach_reduce``). No other call in a step has the argument ``non_blocking``.
    """
    inherited = torch.Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "non_blocking" not in kwargs:
            return inherited(tensor, *args, **kwargs)
        was_on_host, tracker.on_host = tracker.on_host, not kwargs["non_blocking"]
        try:
            return tensor.clone()
        finally:
            tracker.on_host = was_on_host

    with _overridden(torch.Tensor, "to", to):
        yield


@contextmanager
def _uncounted_shape_inference(tracker: Tracker) -> Iterator[None]:
    """Do not count the unsharded tensors from which DTensor infers its results' shapes, which only a trace makes."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    inherited = propagator._propagate_tensor_meta_non_cached

    def propagate(*args: Any) -> Any:
        was_paused, tracker.paused = tracker.paused, True
        try:
            return inherited(*args)
        finally:
            tracker.paused = was_paused

    with _overridden(propagator, "_propagate_tensor_meta_non_cached", propagate):
        yield
