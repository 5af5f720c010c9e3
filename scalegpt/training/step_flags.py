"""What the ranks report to each other in every step, in the one reduction that they make for the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalegpt.backends import World
from scalegpt.training.resilience.stopping import Reason


@dataclass(frozen=True)
class StepFlags:
    """What is to be done after a step; packed with the loss, so that it costs no collective of its own.

    Attributes:
        save_failed: of a rank: its part of a checkpoint could not be written; unpacked: that of some rank.
        save_due: whether a checkpoint is due by the first rank's clock.
        stop: why the run is to stop after the step; None: it is not. Where ranks have several reasons, the first of
            :class:`Reason` counts: a signal comes before a time limit.
    """

    save_failed: bool
    save_due: bool
    stop: Reason | None

    def pack(self, loss: Tensor, world: World) -> Tensor:
        """The loss and the flags as numbers that can be summed over the ranks: [1 + 2 + reasons], on the device.

        Args:
            loss: the sum of this rank's micro batches, [].
            world: the ranks.
        """
        flags = [float(self.save_failed), float(self.save_due), *Reason.counts(self.stop)]
        return torch.cat([loss.reshape(1), world.numbers(flags)])

    @classmethod
    def unpack(cls, sums: Sequence[float]) -> tuple[float, "StepFlags"]:
        """The loss summed over all ranks, and the flags of all ranks together."""
        loss, failed, due, *counts = sums
        return loss, cls(failed > 0, due > 0, Reason.first(counts))
