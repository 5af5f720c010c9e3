"""The place of one save: its folder while it is written, how it is committed, and how it is given up."""

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from scalegpt.checkpoint import store
from scalegpt.checkpoint.address import ADVICE, Address, Place
from scalegpt.checkpoint.manifest import MANIFEST, MANIFEST_LIMIT
from scalegpt.errors import RunError
from scalegpt.storage import free_bytes, read_bytes, retried, sync_folder, write_atomic

PlaceT = TypeVar("PlaceT", Path, Address)


@dataclass(frozen=True)
class Save(ABC, Generic[PlaceT]):
    """A save in progress, in the form that rank 0 sends to all ranks.

    Attributes:
        folder: the folder of the run's checkpoints.
        step: the step that is saved.
        nonce: a random number that identifies this save, in hex.
        ranks: number of ranks that write.
    """

    folder: PlaceT
    step: int
    nonce: str
    ranks: int

    poll_seconds = 0.02
    """Seconds between two looks for a rank's record."""

    @property
    def mark(self) -> str:
        """What the names of files hold besides rank and kind."""
        return ""

    @property
    def final(self) -> Place:
        """The checkpoint's directory once it is complete."""
        return self.folder / store.checkpoint_name(self.step)

    @property
    @abstractmethod
    def temporary(self) -> Place:
        """The directory until the save is complete; :func:`store.remove_leftovers` deletes it otherwise."""

    def record(self, rank: int) -> Place:
        """The JSON file in which a rank describes its part."""
        return self.temporary / f"rank_{rank:05d}{self.mark}.json"

    @abstractmethod
    def make(self, needed: int) -> None:
        """Make the directory, after the remains of earlier saves are deleted.

        Raises:
            OSError: the disk has no room for ``needed`` bytes, or the step has a checkpoint.
        """

    @abstractmethod
    def write_record(self, rank: int, content: str) -> None:
        """Write a rank's record."""

    @abstractmethod
    def read_record(self, rank: int) -> bytes:
        """Read a rank's record, which exists."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The names of all files written, with their sizes in bytes."""

    @abstractmethod
    def publish(self, manifest: bytes, check: Callable[[], None]) -> None:
        """Delete the records, write the manifest, and make the save a checkpoint.

        Args:
            manifest: the content of the manifest.
            check: called before the last operation; it may raise an error, and then there is no checkpoint.

        Raises:
            FileExistsError: the step has a checkpoint already.
        """

    @abstractmethod
    def discard(self) -> None:
        """Delete what was written, after a failure; what cannot be deleted stays for the next save's cleaning."""

    def _refuse_existing(self, there: bool) -> None:
        if there:
            raise FileExistsError(errno.EEXIST, "a checkpoint of that step already exists", str(self.final))


@dataclass(frozen=True)
class SaveOnDisk(Save[Path]):
    """A save into a directory that gets its name when it is complete."""

    @property
    def temporary(self) -> Path:
        """The directory until it gets its name."""
        return self.folder / f".{store.checkpoint_name(self.step)}.{self.nonce}.tmp"

    def make(self, needed: int) -> None:
        """See :meth:`Save.make`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        store.remove_leftovers(self.folder)  # the next pruning reports what cannot be deleted
        self._refuse_existing(os.path.lexists(self._final))
        free = free_bytes(self.folder)
        if free is not None and free < needed:
            raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes")
        self.temporary.mkdir()

    def write_record(self, rank: int, content: str) -> None:
        """See :meth:`Save.write_record`."""
        write_atomic(self.temporary / self.record(rank).name, content, durable=True)

    def read_record(self, rank: int) -> bytes:
        """See :meth:`Save.read_record`."""
        return read_bytes(self.temporary / self.record(rank).name, MANIFEST_LIMIT)

    def sizes(self) -> dict[str, int]:
        """See :meth:`Save.sizes`."""
        return {path.name: path.stat().st_size for path in self.temporary.iterdir()}

    def publish(self, manifest: bytes, check: Callable[[], None]) -> None:
        """See :meth:`Save.publish`."""
        retried(lambda: self._seal(manifest))
        check()
        self._refuse_existing(os.path.lexists(self._final))  # a rename would replace an empty directory
        self.temporary.rename(self._final)
        retried(lambda: sync_folder(self.folder))

    def _seal(self, manifest: bytes) -> None:
        for rank in range(self.ranks):
            (self.temporary / self.record(rank).name).unlink(missing_ok=True)  # an earlier attempt may have deleted it
        write_atomic(self.temporary / MANIFEST, manifest, durable=True)

    def discard(self) -> None:
        """See :meth:`Save.discard`."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    @property
    def _final(self) -> Path:
        return self.folder / store.checkpoint_name(self.step)


@dataclass(frozen=True)
class SaveAtAddress(Save[Address]):
    """A save into the final folder at an address, where the manifest, which is written last, makes it a checkpoint.

    The names of its files hold the nonce. So a rank of an earlier save that is still writing cannot replace a file.
    """

    poll_seconds = 1.0

    @property
    def mark(self) -> str:
        """The nonce."""
        return f".{self.nonce}"

    @property
    def temporary(self) -> Address:
        """The final folder."""
        return self.folder / store.checkpoint_name(self.step)

    def make(self, needed: int) -> None:  # noqa: ARG002 - a store does not say how much room it has
        """See :meth:`Save.make`."""
        store.remove_leftovers(self.folder)  # the next pruning reports what cannot be deleted
        self._refuse_existing((self.temporary / MANIFEST).exists())

    def write_record(self, rank: int, content: str) -> None:
        """See :meth:`Save.write_record`."""
        (self.temporary / self.record(rank).name).write(content.encode())

    def read_record(self, rank: int) -> bytes:
        """See :meth:`Save.read_record`."""
        return (self.temporary / self.record(rank).name).read_whole(MANIFEST_LIMIT)

    def sizes(self) -> dict[str, int]:
        """See :meth:`Save.sizes`."""
        return self.temporary.objects()

    def publish(self, manifest: bytes, check: Callable[[], None]) -> None:
        """See :meth:`Save.publish`."""
        for rank in range(self.ranks):
            (self.temporary / self.record(rank).name).unlink(missing_ok=True)
        check()
        self._refuse_existing((self.temporary / MANIFEST).exists())
        (self.temporary / MANIFEST).write(manifest)

    def discard(self) -> None:
        """See :meth:`Save.discard`."""
        try:
            for name in self.temporary.objects():
                if self.nonce in name:
                    (self.temporary / name).unlink(missing_ok=True)
        except OSError:
            return  # the store fails; the failure that ended the save is reported


def save_at(folder: Place, step: int, nonce: str, ranks: int) -> Save[Path] | Save[Address]:
    """A save into a folder of checkpoints; nothing is written."""
    if isinstance(folder, Address):
        return SaveAtAddress(folder, step, nonce, ranks)
    return SaveOnDisk(folder, step, nonce, ranks)


def replace_manifest(checkpoint: Place, manifest: bytes) -> None:
    """Replace the manifest of a complete checkpoint atomically."""
    if isinstance(checkpoint, Address):
        (checkpoint / MANIFEST).write(manifest)
        return
    path = checkpoint / MANIFEST
    retried(lambda: write_atomic(path, manifest, durable=True))


@contextmanager
def failing_as_a_run(checkpoint: Place) -> Iterator[None]:
    """Turn an OSError inside the ``with`` block, which writes a checkpoint, into a RunError with a one-line message.

    Raises:
        RunError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        advice = "free disk space or make the folder writable"
        if isinstance(checkpoint, Address):
            advice = ADVICE
        else:
            reason = f"{reason}{_free_space(checkpoint.parent)}"
        raise RunError(
            f"checkpoint {checkpoint} cannot be written: {reason}; no earlier checkpoint was touched: {advice}, and start "
            "the run again"
        ) from error


def _free_space(folder: Path) -> str:
    """The free space on a folder's disk, as part of a message; empty if it is not known."""
    try:
        free = free_bytes(folder)
    except OSError:
        free = None
    return "" if free is None else f" ({free / 1e9:.1f} GB free)"
