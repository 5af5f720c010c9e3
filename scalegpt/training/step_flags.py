"""The flags that the ranks exchange in every step, packed into the all-reduce of the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalegpt.backends import World
from scalegpt.training.resilience.stopping import Reason


@dataclass(frozen=True)
class StepFlags:
    """Flags that decide what the ranks do after a step.

    They are summed together with the loss, so they need no extra collective.

    Before :meth:`pack` the flags are those of one rank; after :meth:`unpack` they hold for all ranks together.

    Attributes:
        save_failed: whether this rank, or after :meth:`unpack` any rank, could not write its part of a checkpoint.
        save_due: whether a checkpoint is due by the clock of rank 0.
        stop: why the run is to stop after the step; None: it continues. If ranks have different reasons, the first one
            in the order of :class:`Reason` counts.
        seconds: seconds of this rank's own work in the step, or after :meth:`unpack` those of each rank, in their order.
    """

    save_failed: bool
    save_due: bool
    stop: Reason | None
    seconds: tuple[float, ...] = ()

    def pack(self, loss: Tensor, world: World, counted: Tensor | None = None) -> Tensor:
        """Pack loss and flags into one tensor that can be summed over the ranks.

        Args:
            loss: the sum of the losses of this rank's micro batches, a scalar.
            world: the ranks.
            counted: the sum over the micro batches of the share of targets that count in the loss; None: all targets
                count.

        Returns:
            A vector of length 4 + number of reasons + number of ranks, on the device: the loss, ``counted`` or 0, two
            flags, the one-hot reason to stop, and the seconds at this rank's place.
        """
        seconds = [0.0] * world.size
        seconds[world.rank] = sum(self.seconds)
        flags = [float(self.save_failed), float(self.save_due), *Reason.counts(self.stop), *seconds]
        shares = torch.zeros_like(loss) if counted is None else counted
        return torch.cat([loss.reshape(1), shares.reshape(1), world.numbers(flags)])

    @classmethod
    def unpack(cls, sums: Sequence[float], ranks: int) -> tuple[float, float, "StepFlags"]:
        """Unpack the tensor summed over the ranks into the summed loss, ``counted``, and the flags of all ranks together."""
        loss, counted, failed, due, *rest = sums
        counts, seconds = rest[:-ranks], tuple(rest[-ranks:])
        return loss, counted, cls(failed > 0, due > 0, Reason.first(counts), seconds)
