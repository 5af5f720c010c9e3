"""Saves checkpoints during training.

The step loop waits for a copy in host memory; a thread writes and commits the copy.

All ranks call :meth:`Saver.save`, :meth:`Saver.finish` and :meth:`Saver.raise_failure` together. Their threads
communicate through the files alone (see :mod:`scalegpt.checkpoint.writer`). There is only one save at a time; the next
save waits until it ends. If the thread of a rank fails, the other ranks learn it when the training loop exchanges
:attr:`Saver.failed`, which it does in every step. Then all ranks raise the failure.

A state that is not finite is never saved. A finite state may still be ruined, which only the next step's loss shows.
Older checkpoints are therefore deleted only after the trainer confirms the newest (:meth:`Saver.confirm`).
"""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from scalegpt.backends.base import WEIGHT, Backend, Piece
from scalegpt.checkpoint import store, writer
from scalegpt.checkpoint.address import Place
from scalegpt.checkpoint.host_copy import HostCopy
from scalegpt.checkpoint.manifest import Header, UnreadableError
from scalegpt.checkpoint.reader import is_folder
from scalegpt.checkpoint.writer import AbandonedError, AnySave, bytes_of
from scalegpt.errors import RunError
from scalegpt.system.cores import available_bytes

COPY_MARGIN = 1.25
"""A copy is made only if this multiple of its size is free in host memory, since other processes need memory too."""


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints are kept.

    Attributes:
        newest: number of newest checkpoints that are kept.
        best: whether the checkpoint with the lowest validation loss is kept too.
    """

    newest: int
    best: bool


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        step: the step after which the model was evaluated.
        val_loss: the held-out loss; None if it is not finite.
        best_val_loss: the lowest finite held-out loss up to this step; None without one.
    """

    step: int
    val_loss: float | None
    best_val_loss: float | None


class SpoiledError(RunError):
    """The state to be saved is not finite."""


def none_gone(_rank: int) -> bool:
    """Return False: the rank is assumed to be still running. This is the default of the argument ``gone``."""
    return False


class Saver:
    """Writes a run's checkpoints.

    Args:
        backend: the backend whose state is saved.
        folder: the folder of the run's checkpoints.
        keeping: which checkpoints are kept.
        asynchronous: whether to write while training continues; else :meth:`save` returns when everything is written.
        before_commit: called on rank 0 when its part is written; its error fails the save.

    Attributes:
        copy: the copy of the state that the thread writes.
        lacks_memory: whether the last save was synchronous because host memory had no room for the copy.
    """

    def __init__(
        self,
        backend: Backend,
        folder: Place,
        keeping: Keeping,
        *,
        asynchronous: bool,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.backend, self.world, self.folder, self.keeping = backend, backend.world, folder, keeping
        self.asynchronous, self.before_commit = asynchronous, before_commit
        self.lacks_memory = False
        self.copy = HostCopy(self.world.device)
        self._save: AnySave | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._abandoned = threading.Event()
        self._gone: Callable[[int], bool] = none_gone
        self._committed: list[Place] = []
        self._problems: list[str] = []
        self._judging = threading.Lock()  # guards the attributes below, which thread and loop share
        self._writes = False
        self._unproven: Place | None = None
        self._proven_step = -1
        self._evaluation: Evaluation | None = None

    def prepare(self) -> None:
        """Begin to allocate the memory of the copy in the background.

        Called if a save is due before the run's last step.
        """
        count = sum(
            len(self.backend.keys_of(piece.name)) * piece.values.numel() for piece in self.backend.held((WEIGHT,))
        )
        count //= self.backend.mesh.replicas
        if self.asynchronous and self._has_room_for(count * 4):
            self.copy.prepare(count)

    def save(self, header: Header, *, wait: bool = False) -> None:
        """Save the current state; all ranks must call it together.

        Waits for an earlier save. When this returns, training may continue and change the state.

        Args:
            header: the manifest's entries about the run.
            wait: whether to return only when the checkpoint is complete; then no copy is made.

        Raises:
            SpoiledError: the state is not finite on some rank; nothing was written.
            RunError: an earlier save failed; this save cannot begin; or this save was synchronous and failed.
        """
        self.finish()
        pieces = list(self.backend.pieces())
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # another stream may be changing the state still
        spoiled = next((name for name in self.world.gather(_spoiled(pieces)) if name is not None), None)
        if spoiled is not None:
            raise SpoiledError(
                f"{spoiled} is not finite after step {header.progress.step}, so no checkpoint is written"
            )
        # Summed before any rank writes: a save that does not fit on the disk is not begun.
        total = self._over_all_ranks(bytes_of(pieces))
        copies = self.asynchronous and not wait
        self.lacks_memory = copies and self.world.any(not self._has_room_for(bytes_of(pieces)))
        ranks, step = self.world.size, header.progress.step
        self._save = self.world.on_first(lambda: writer.begin(self.folder, step, ranks, total))
        self._evaluation, self._writes = None, True
        continues = copies and not self.lacks_memory
        source = self.copy.take(pieces) if continues else pieces
        self._thread = threading.Thread(target=self._run, args=(source, header), name=f"checkpoint {step}", daemon=True)
        self._thread.start()
        if not continues:
            self.finish()

    def _over_all_ranks(self, count: int) -> int:
        """The sum of a whole number over all ranks, exact up to 64 bits."""
        return int(self.world.sum(torch.tensor([count], dtype=torch.int64, device=self.world.device)).item())

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the current save has failed."""
        return self._failure is not None

    def committed(self) -> list[Place]:
        """The checkpoints that have become complete since the last call; empty on ranks other than 0."""
        found = []
        while self._committed:
            found.append(self._committed.pop(0))
        return found

    def problems(self) -> list[str]:
        """A line for each path that could not be deleted since the last call; empty on ranks other than 0."""
        found, self._problems = self._problems, []
        return found

    def resumed_from(self, checkpoint: Place) -> None:
        """Mark the checkpoint to which a resume or a rollback went back as unconfirmed. Called only on rank 0."""
        with self._judging:
            self._unproven, self._proven_step = checkpoint, -1

    def confirm(self, step: int) -> None:
        """Record that the weights after a step are good, and delete the checkpoints that need not be kept.

        Only rank 0 deletes. It does so here, or when it commits the checkpoint of that step, whichever is later.

        Raises:
            RunError: the folder cannot be read.
        """
        with self._judging:
            self._proven_step = max(self._proven_step, step)
            is_proven = self._unproven is not None and store.step_of(self._unproven) <= self._proven_step
            # A save under way looks like a leftover, which pruning deletes; the save's thread prunes when it has ended.
            due = is_proven and not self._writes
            if due:
                self._unproven = None
        if due:
            self._prune()

    def amend(self, evaluation: Evaluation) -> None:
        """Add the held-out loss of a step to its checkpoint, now or once the checkpoint is complete.

        Called only on rank 0.

        Raises:
            RunError: the checkpoint's manifest cannot be read or written.
        """
        path = self.folder / store.checkpoint_name(evaluation.step)
        with self._judging:
            self._evaluation = evaluation
            if is_folder(path):
                writer.amend(path, evaluation.val_loss, evaluation.best_val_loss)

    def finish(self) -> None:
        """Wait for the current save, if there is one; all ranks must call it together.

        Raises:
            RunError: the save failed on some rank; all ranks raise this.
        """
        save, self._save = self._save, None
        if save is None:
            return
        if not self.world.is_first:
            self._join()
        # Rank 0's thread waits for the other ranks' parts. If one of them will not come, the thread must stop waiting.
        if self.world.any(self.failed):
            self._abandoned.set()
        self._join()
        failures = [failure for failure in self.world.gather(self._failure) if failure is not None]
        self._failure, self._writes = None, False
        self._abandoned.clear()
        if not failures:
            return
        if self.world.is_first:
            save.discard()
        known = [failure for failure in failures if isinstance(failure, RunError)]
        raise known[0] if known else RunError(f"checkpoint {save.final} cannot be written: {failures[0]!r}")

    def raise_failure(self) -> None:
        """End a save that failed on some rank, without waiting for missing parts.

        Raises the same error as :meth:`finish`.
        """
        self._abandoned.set()
        self.finish()

    def close(self, seconds: float = 0.0, gone: Callable[[int], bool] = none_gone) -> None:
        """Close without the other ranks: wait for this rank's thread for some seconds, then abandon the save.

        Args:
            seconds: how long to wait.
            gone: returns whether a rank has ended. Missing parts of such ranks are not awaited.
        """
        self._gone = gone
        self._join(seconds)
        self._abandoned.set()
        if self._thread is None:
            self.copy.release()

    def _join(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def _has_room_for(self, size: int) -> bool:
        """Whether the free memory of this machine has room for a copy of ``size`` bytes by each of its ranks."""
        return self.copy.is_ready or available_bytes() > COPY_MARGIN * size * self.world.local_size

    def _run(self, pieces: Sequence[Piece], header: Header) -> None:
        """Write this rank's part; on rank 0 also wait for the other ranks' parts, and commit the checkpoint."""
        assert self._save is not None
        save = self._save
        try:
            writer.write_part(save, self.world.rank, pieces)
            if self.world.is_first:
                self.before_commit()
                path = writer.commit(
                    save,
                    header,
                    self.backend.canonical_shapes(),
                    abandoned=self._abandoned.is_set,
                    gone=lambda rank: self._gone(rank),  # close() may replace self._gone
                )
                self._conclude(path)
        except AbandonedError:
            return
        except Exception as error:  # any error: the loop learns of it by `failed`
            self._failure = error

    def _conclude(self, path: Place) -> None:
        """Record that a checkpoint is complete.

        Then add its loss and delete old checkpoints, if this was asked for during the write.
        """
        with self._judging:
            self._committed.append(path)
            self._writes = False
            found = self._evaluation
            if found is not None and found.step == store.step_of(path):
                writer.amend(path, found.val_loss, found.best_val_loss)
            is_proven = store.step_of(path) <= self._proven_step
            self._unproven = None if is_proven else path
        if is_proven:
            self._prune()

    def _prune(self) -> None:
        try:
            self._problems += store.prune(self.folder, self.keeping.newest, keep_best=self.keeping.best)
        except UnreadableError as error:
            raise RunError(str(error)) from error


def _spoiled(pieces: Iterable[Piece]) -> str | None:
    """Find the first tensor with a value that is not finite, without copying any; return its key and name, or None."""
    for piece in pieces:
        # The sum takes half the time of minimum and maximum, which decide only if a sum is infinite: it may have overflowed.
        if not math.isfinite(piece.values.sum().item()) and not _has_finite_ends(piece.values):
            return f"{piece.key} of {piece.name}"
    return None


def _has_finite_ends(values: torch.Tensor) -> bool:
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())
