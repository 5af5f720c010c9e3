"""A copy of the state in host memory, from which a thread writes while training goes on."""

import threading
from collections.abc import Sequence

import torch

from scalegpt.backends.base import Piece


class HostCopy:
    """A copy of pieces in host memory, whose room is used again for the next.

    On CUDA it is pinned, so that the copy runs at the bus's speed: the memory is registered with the driver, since torch's
    own pinned memory comes in powers of two.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._room = torch.empty(0)
        self._pinned = False
        self._preparing: threading.Thread | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the room is made, after waiting for what makes it."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        return self._room.numel() > 0

    def prepare(self, count: int) -> None:
        """Make room for so many elements meanwhile: the system takes as long to hand it out as we take to fill it."""
        self._preparing = threading.Thread(target=self._make_room, args=(count,), name="room for a copy", daemon=True)
        self._preparing.start()

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copies of the pieces as they are now; the copies of an earlier call are overwritten."""
        count = sum(piece.values.numel() for piece in pieces)
        if not self.is_ready or len(self._room) != count:
            self._make_room(count)
        copies, end = [], 0
        for piece in pieces:
            start, end = end, end + piece.values.numel()
            values = self._room[start:end]
            if piece.values.device.type == "cpu":
                # By one thread, as numpy does it: memory is the limit, and torch's threads would wait for each other at
                # every piece where the cores are shared.
                values.numpy()[:] = piece.values.numpy()
            else:
                values.copy_(piece.values, non_blocking=self._pinned)
            copies.append(Piece(piece.name, piece.key, piece.start, values))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return copies

    def _make_room(self, count: int) -> None:
        self.release()
        room = torch.zeros(count)
        room.fill_(0.0)  # zeros may be pages that the system has only promised
        if self.device.type == "cuda" and count:
            with torch.cuda.device(self.device):  # a thread of its own begins at card 0
                status = torch.cuda.cudart().cudaHostRegister(room.data_ptr(), room.nbytes, 0)  # type: ignore[no-untyped-call]
            self._pinned = int(status) == 0  # refused, as a small limit on locked memory does: the copy is slower
        self._room = room

    def release(self) -> None:
        """Give the memory back."""
        if self._pinned:
            with torch.cuda.device(self.device):
                torch.cuda.cudart().cudaHostUnregister(self._room.data_ptr())  # type: ignore[no-untyped-call]
        self._room, self._pinned = torch.empty(0), False
