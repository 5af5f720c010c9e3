"""A copy of the state in host memory, from which a thread writes a checkpoint during training."""

import threading
from collections.abc import Sequence

import torch

from scalegpt.backends.base import Piece


class HostCopy:
    """Host memory for a copy of a rank's pieces; each copy uses the same memory.

    On CUDA the memory is pinned, so that copies run at the bus's speed. It is ordinary memory that is registered with
    the driver, since torch would round its own pinned allocations up to powers of two.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0)
        self._pinned = False
        self._preparing: threading.Thread | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the memory is allocated. Waits until an allocation in the background has ended."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        return self._memory.numel() > 0

    def prepare(self, count: int) -> None:
        """Allocate memory for ``count`` fp32 elements in the background, since allocating takes as long as copying."""
        self._preparing = threading.Thread(target=self._allocate, args=(count,), name="allocate a copy", daemon=True)
        self._preparing.start()

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copy the pieces, and return the copies, which overwrite those of an earlier call."""
        count = sum(piece.values.numel() for piece in pieces)
        if not self.is_ready or len(self._memory) != count:
            self._allocate(count)
        copies, end = [], 0
        for piece in pieces:
            start, end = end, end + piece.values.numel()
            values = self._memory[start:end]
            if piece.values.device.type == "cpu":
                # numpy copies in one thread. More threads are no faster, since memory bandwidth is the limit, and on shared
                # cores torch's threads would wait for each other at every piece.
                values.numpy()[:] = piece.values.numpy()
            else:
                values.copy_(piece.values, non_blocking=self._pinned)
            copies.append(Piece(piece.name, piece.key, piece.start, values))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return copies

    def _allocate(self, count: int) -> None:
        self.release()
        memory = torch.zeros(count)
        memory.fill_(0.0)  # zeros may be pages that the kernel has not allocated yet
        if self.device.type == "cuda" and count:
            with torch.cuda.device(self.device):  # in a new thread card 0 is current
                status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)  # type: ignore[no-untyped-call]
            self._pinned = int(status) == 0  # False if the limit on locked memory is too low: slower copies
        self._memory = memory

    def release(self) -> None:
        """Free the memory."""
        if self._pinned:
            with torch.cuda.device(self.device):
                torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[no-untyped-call]
        self._memory, self._pinned = torch.empty(0), False
