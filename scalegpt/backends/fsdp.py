"""FSDP2: torch's ``fully_shard`` over the blocks and the root.

=====  =====================================================  =================================================
stage  weights between forward and backward                   gradients while accumulating
=====  =====================================================  =================================================
0      whole on every rank (a mesh that only replicates)      whole, all-reduced after the last micro batch
2      gathered by the step's first forward, kept to its end  whole, reduce-scattered after the last micro batch
3      gathered for each block, forward and backward          reduce-scattered after every micro batch
=====  =====================================================  =================================================

At stages 2 and 3 the shards may have replicas (HSDP). Weights are gathered and gradients scattered among the shards of a
replica. The scattered gradients are then all-reduced over the replicas, after the last micro batch; until then each replica
adds up its own. With offload they are all-reduced after every micro batch, since FSDP2 would keep a replica's sum on the
device.

Stages 0 and 2 communicate only in the first and the last micro step, but hold whole fp32 gradients on each rank. Stage
3 keeps only shards of gradients. fp32 masters and moments are sharded at stages 2 and 3. The model computes in the
run's precision. Gradients are reduced in fp32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from scalegpt.backends.base import ALL_KEYS, DTYPES, OptimizerFactory, Piece, named
from scalegpt.backends.plain import TorchBackend
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.model.gpt import GPT
from scalegpt.planner.memory import fsdp as fsdp_memory


class FSDPBackend(TorchBackend):
    """FSDP2 on any number of ranks."""

    model: GPT

    def __init__(
        self,
        run: RunConfig,
        world: World,
        grad_accum: int,
        model: GPT,
        make_optimizer: OptimizerFactory,
        _settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(run, world, grad_accum)
        world.ensure_group()
        self._wrap(model)
        self.model = model.to_empty(device="cpu" if run.parallel.offload == "all" else world.device)
        self.optimizer = make_optimizer(named(self.model))

    def _wrap(self, model: GPT) -> None:
        """Wrap each block, then the root with embeddings, final norm and head; the model is still on ``meta``."""
        compute = DTYPES[self.run.train.precision]
        on_cuda = self.world.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_cuda) if self.run.parallel.offload == "all" else OffloadPolicy()
        mesh = self._device_mesh()
        # The model casts its activations itself: FSDP must not cast what passes between blocks, or an fp32 residual
        # stream would be lost.
        precision = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=DTYPES[fsdp_memory.REDUCE_DTYPE], cast_forward_inputs=False
        )
        for block in model.blocks:
            fully_shard(
                block, mesh=mesh, reshard_after_forward=self.stage == 3, mp_policy=precision, offload_policy=offload
            )
        # The root's weights are used last in the forward and first in the backward: resharding them in between is wasteful.
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=precision, offload_policy=offload)

    def _device_mesh(self) -> DeviceMesh:
        """Make torch's mesh. On a 1-D mesh FSDP2 only shards; on a 2-D mesh it also reduces over replicas."""
        kind, mesh = self.world.device.type, self.mesh
        if self.stage > 0 and mesh.replicas == 1:
            return init_device_mesh(kind, (mesh.shards,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (mesh.replicas, mesh.shards), mesh_dim_names=("replicate", "shard"))

    def before_micro_step(self, last: bool) -> None:
        """Set whether this micro step reduces gradients and frees gathered weights, as the stage requires."""
        root = self.model
        assert isinstance(root, FSDPModule)
        if self.stage != 3:
            root.set_requires_gradient_sync(last)
        elif self.mesh.replicas > 1:
            root.set_requires_all_reduce(fsdp_memory.reduces_over_replicas(self.run.parallel, last=last))
        if self.stage == 2:
            root.set_reshard_after_backward(last)
        # At stage 3 every backward pass reduces. If it did not count as the last, FSDP2 would keep the root's fp32 reduce
        # buffer, four bytes for each of its parameters, through the next micro batch.
        root.set_is_last_backward(last or self.stage == 3)

    def sum_over_shards(self, square: Tensor) -> Tensor:
        """See :meth:`TorchBackend.sum_over_shards`.

        Without shards every rank has the whole gradient, so no sum is needed. The sum over all ranks counts each replica,
        and is the same on all ranks, which must agree whether to skip the step.
        """
        return self.world.sum(square / self.mesh.replicas) if self.mesh.shards > 1 else square

    def held(self, keys: Sequence[str] = ALL_KEYS) -> Iterator[Piece]:
        """See :meth:`Backend.held`."""
        self.refresh()
        yield from super().held(keys)

    def refresh(self) -> None:
        """Free the gathered weights that an evaluation may leave, so that the modules' parameters are the shards again."""
        for module in (self.model, *self.model.blocks):
            assert isinstance(module, FSDPModule)
            module.reshard()

    def first_element(self, parameter: nn.Parameter) -> int:
        """See :meth:`TorchBackend.first_element`.

        Each shard has ⌈rows / shards⌉ rows; the last shards may have fewer or none.
        """
        rows = parameter.shape[0]
        first_row = min(self.shard * -(-rows // self.mesh.shards), rows)
        return first_row * (parameter.numel() // rows)
