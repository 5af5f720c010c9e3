"""A copy of the state in host memory, from which a thread writes during training."""

import threading
from collections.abc import Sequence

import torch

from scalegpt.backends.base import Piece


class HostCopy:
    """A copy of pieces in host memory; the next copy uses the same memory.

    On CUDA it is pinned, so that the copy runs at the bus's speed. The memory is registered with the driver, since torch
    allocates pinned memory in powers of two.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0)
        self._pinned = False
        self._preparing: threading.Thread | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the memory is allocated; waits for an allocation under way."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        return self._memory.numel() > 0

    def prepare(self, count: int) -> None:
        """Allocate ``count`` elements in the background: the kernel takes as long for that as the copy itself takes."""
        self._preparing = threading.Thread(target=self._allocate, args=(count,), name="allocate a copy", daemon=True)
        self._preparing.start()

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copies of the pieces; those of an earlier call are overwritten."""
        count = sum(piece.values.numel() for piece in pieces)
        if not self.is_ready or len(self._memory) != count:
            self._allocate(count)
        copies, end = [], 0
        for piece in pieces:
            start, end = end, end + piece.values.numel()
            values = self._memory[start:end]
            if piece.values.device.type == "cpu":
                # By one thread, as numpy copies: memory is the limit, and on shared cores torch's threads would wait for
                # each other at every piece.
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
            with torch.cuda.device(self.device):  # a new thread starts with card 0
                status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)  # type: ignore[no-untyped-call]
            self._pinned = int(status) == 0  # a small limit on locked memory refuses it: the copy is slower
        self._memory = memory

    def release(self) -> None:
        """Free the memory."""
        if self._pinned:
            with torch.cuda.device(self.device):
                torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[no-untyped-call]
        self._memory, self._pinned = torch.empty(0), False
