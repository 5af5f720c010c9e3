"""FSDP2: torch's ``fully_shard`` over the blocks and the root.

=====  =====================================================  =================================================
stage  weights between forward and backward                   gradients while accumulating
=====  =====================================================  =================================================
0      whole on every rank (a mesh that only replicates)      whole, all-reduced after the last micro batch
2      gathered by the step's first forward, kept to its end  whole, reduce-scattered after the last micro batch
3      gathered for each block, forward and backward          reduce-scattered after every micro batch
=====  =====================================================  =================================================

Stages 0 and 2 do not communicate on inner micro steps, at the price of a whole fp32 gradient per rank; stage 3 never holds
one. fp32 masters and moments are sharded at stages 2 and 3; compute is in bf16 or fp16, gradients are reduced in fp32.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from scalegpt.backends.base import ALL_KEYS, DTYPES, OptimizerFactory, Piece
from scalegpt.backends.plain import TorchBackend, named
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.model.gpt import GPT
from scalegpt.planner.memory import fsdp as fsdp_memory


class FSDPBackend(TorchBackend):
    """FSDP2 on any number of ranks."""

    model: GPT

    def __init__(
        self, run: RunConfig, world: World, grad_accum: int, model: GPT, make_optimizer: OptimizerFactory
    ) -> None:
        super().__init__(run, world, grad_accum)
        world.ensure_group()
        self.stage = run.parallel.stage
        self.shards_weights = self.stage > 0
        self._shard(model)
        self.model = model.to_empty(device="cpu" if run.parallel.offload == "all" else world.device)
        self.optimizer = make_optimizer(named(self.model))

    def _shard(self, model: GPT) -> None:
        """Wrap each block, then the root with embeddings, final norm and head; the model is still on ``meta``."""
        compute = DTYPES[self.run.train.precision]
        on_cuda = self.world.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_cuda) if self.run.parallel.offload == "all" else OffloadPolicy()
        mesh = self._mesh()
        # The model casts its activations itself: FSDP must not cast what passes between blocks, or an fp32 residual
        # stream would be lost.
        precision = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=DTYPES[fsdp_memory.REDUCE_DTYPE], cast_forward_inputs=False
        )
        for block in model.blocks:
            fully_shard(
                block, mesh=mesh, reshard_after_forward=self.stage == 3, mp_policy=precision, offload_policy=offload
            )
        # The root's weights are needed last in the forward and first in the backward: resharding them between is waste.
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=precision, offload_policy=offload)

    def _mesh(self) -> DeviceMesh:
        kind, size = self.world.device.type, self.world.size
        if self.shards_weights:
            return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (size, 1), mesh_dim_names=("replicate", "shard"))

    def before_micro_step(self, last: bool) -> None:
        """Reduce gradients, and give gathered weights back, as the stage says."""
        root = self.model
        assert isinstance(root, FSDPModule)
        if self.stage != 3:
            root.set_requires_gradient_sync(last)
        if self.stage == 2:
            root.set_reshard_after_backward(last)
        # At stage 3 every backward pass is complete in itself: told otherwise, FSDP2 would keep the root's fp32 reduce
        # buffer, four bytes for each of its parameters, through the next micro batch.
        root.set_is_last_backward(last or self.stage == 3)

    def sum_over_shards(self, square: Tensor) -> Tensor:
        """Each rank holds a part of every gradient, or at stage 0 all of it."""
        return self.world.sum(square) if self.shards_weights else square

    def held(self, keys: Sequence[str] = ALL_KEYS) -> Iterator[Piece]:
        """See :meth:`Backend.held`."""
        self.refresh()
        yield from super().held(keys)

    def refresh(self) -> None:
        """Put the shards back in the modules: after an evaluation the gathered weights may still be in their place."""
        for module in (self.model, *self.model.blocks):
            assert isinstance(module, FSDPModule)
            module.reshard()

    @property
    def replicated(self) -> bool:
        """See :attr:`Backend.replicated`."""
        return not self.shards_weights

    def first_element(self, parameter: nn.Parameter) -> int:
        """FSDP2 cuts the first dimension into ⌈rows / W⌉ for each rank, the last ranks getting less, or nothing."""
        if not self.shards_weights:
            return 0
        rows = parameter.shape[0]
        first_row = min(self.world.rank * -(-rows // self.world.size), rows)
        return first_row * (parameter.numel() // rows)
