"""Write a folder of prepared tokens atomically: into a hidden folder beside it, which is synced and then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from scalegpt.data.leftovers import make_unfinished, unfinished_name
from scalegpt.data.sidecar import FORMAT, SIDECAR, SPLITS, VERSION
from scalegpt.data.stored import Tokens
from scalegpt.data.token_file import TokenFile
from scalegpt.errors import InputError
from scalegpt.storage import disk_errors, sync_file, sync_folder

_COPY_BYTES = 8 << 20
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


class TokenWriter:
    """Writes a folder of prepared tokens, as a context manager.

    Entering makes a hidden folder beside ``out``, which :meth:`commit` renames to ``out``. Leaving without a commit removes
    the hidden folder.

    Args:
        out: the folder to make.
        dtype: the type of the ids in the files.

    Attributes:
        counts: split → number of tokens written so far.
    """

    def __init__(self, out: Path, dtype: np.dtype[Any]) -> None:
        self.out, self.dtype = out.absolute(), dtype
        self.counts = dict.fromkeys(SPLITS, 0)
        self._folder: Path | None = None
        self._lock: int | None = None
        self._files: dict[str, BinaryIO] = {}
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        try:
            with disk_errors(self.out):
                self._made = [parent for parent in self.out.parents if not parent.exists()]
                self.out.parent.mkdir(parents=True, exist_ok=True)
                folder, self._lock = make_unfinished(self.out)
                self._folder = folder
                self._files = {split: (folder / f"{split}.bin").open("w+b") for split in SPLITS}
        except InputError:
            self._clear()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._clear()

    def append(self, split: str, ids: Tokens) -> None:
        """Append token ids to the file of a split.

        Raises:
            InputError: the disk is full, or the file cannot be written.
        """
        with disk_errors(self.out):
            self._files[split].write(ids.astype(self.dtype, copy=False).tobytes())
        self.counts[split] += len(ids)

    def hold_out_tail(self, first: int) -> None:
        """Move the training tokens from token offset ``first`` on to the end of the held-out tokens."""
        train, val = (self._files[split] for split in SPLITS)
        with disk_errors(self.out):
            train.seek(first * self.dtype.itemsize)
            while block := train.read(_COPY_BYTES):
                val.write(block)
            train.seek(first * self.dtype.itemsize)
            train.truncate()
        self.counts["val"] += self.counts["train"] - first
        self.counts["train"] = first

    def commit(self, meta: dict[str, Any], files: Mapping[str, bytes]) -> bool:
        """Write the sidecar and the files beside it, sync everything, and rename the folder into place.

        Args:
            meta: the sidecar's entries, except the format, the counts and the digests.
            files: further files: name → content.

        Returns:
            True if the hidden folder became ``out``; False if another folder or a file is at ``out``.

        Raises:
            InputError: the disk is full, or ``out`` cannot be written.
        """
        folder = self._folder
        assert folder is not None
        with disk_errors(self.out):
            for file in self._files.values():
                sync_file(file)
                file.close()
            written = {
                split: TokenFile.open(folder / f"{split}.bin", self.counts[split], self.dtype) for split in SPLITS
            }
            digests = {split: file.digests() for split, file in written.items()}
            sidecar = {
                "format": FORMAT,
                "version": VERSION,
                "dtype": self.dtype.name,
                **{f"{split}_tokens": self.counts[split] for split in SPLITS},
                "files": {split: whole for split, (whole, _) in digests.items()},
                "blocks": {split: blocks for split, (_, blocks) in digests.items()},
                **meta,
            }
            with (folder / SIDECAR).open("w", encoding="utf-8") as stream:
                json.dump(sidecar, stream, indent=1)
                stream.write("\n")
                sync_file(stream)
            for name, content in files.items():
                with (folder / name).open("wb") as kept:
                    kept.write(content)
                    sync_file(kept)
            sync_folder(folder)
            try:
                folder.rename(self.out)  # replaces ``out`` only if it is an empty folder
            except OSError as error:
                if error.errno in _TAKEN:
                    return False
                raise
            sync_folder(self.out.parent)
        return True

    def _clear(self) -> None:
        """Remove the hidden folder and the parent folders made for it, unless they were committed."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # closing flushes, which fails again on a full disk: already reported
                continue
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for parent in self._made:
            try:
                parent.rmdir()
            except OSError:  # not empty: it holds the committed folder, or another process uses it
                return


def remove_folder(folder: Path) -> None:
    """Remove a folder of tokens; the folder is renamed first, so that no reader finds it partly removed."""
    aside = folder.with_name(unfinished_name(folder.name))
    with disk_errors(folder):
        try:
            folder.rename(aside)
        except FileNotFoundError:  # another process removed it first
            return
        shutil.rmtree(aside, ignore_errors=True)
