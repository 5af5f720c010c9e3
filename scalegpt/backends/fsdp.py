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

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from scalegpt.backends.base import DTYPES, OptimizerFactory, ParameterState
from scalegpt.backends.plain import TorchBackend, named
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.model.gpt import GPT
from scalegpt.planner import fsdp_memory


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

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See :meth:`Backend.load_weights`."""
        self._reshard()
        super().load_weights(weights)

    def states(self) -> Iterator[ParameterState]:
        """See :meth:`Backend.states`."""
        self._reshard()
        yield from super().states()

    def load_states(self, states: Iterable[ParameterState], steps: int) -> None:
        """See :meth:`Backend.load_states`."""
        self._reshard()
        super().load_states(states, steps)

    def _reshard(self) -> None:
        """Put the shards back in the modules: after an evaluation the gathered weights may still be in their place."""
        for module in (self.model, *self.model.blocks):
            assert isinstance(module, FSDPModule)
            module.reshard()

    @torch.no_grad()
    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Copy this rank's rows of a whole CPU tensor."""
        assert isinstance(tensor, DTensor)
        part = tensor.to_local()
        rows = self._rows(tensor)
        part.copy_(value[rows])

    def _rows(self, tensor: DTensor) -> slice:
        """The rows that FSDP2 gave this rank: it cuts the first dimension into ⌈rows / W⌉, the last ranks getting less."""
        if not any(
            isinstance(placement, Shard) and tensor.device_mesh.size(i) > 1
            for i, placement in enumerate(tensor.placements)
        ):
            return slice(None)
        per_rank = -(-tensor.shape[0] // self.world.size)
        start = min(self.world.rank * per_rank, tensor.shape[0])
        return slice(start, min(start + per_rank, tensor.shape[0]))

    @torch.no_grad()
    def whole(self, tensor: Tensor) -> Tensor:
        """Gather a tensor from all ranks to a CPU copy."""
        assert isinstance(tensor, DTensor)
        # Where parameters are offloaded, the mesh's collectives still run on the device.
        moved = tensor.to(self.world.device)
        assert isinstance(moved, DTensor)
        return moved.full_tensor().to("cpu", copy=True)
