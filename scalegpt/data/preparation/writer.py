"""Write a folder of prepared tokens: into a hidden folder beside it, which is synced and then renamed.

The hidden folder records from time to time how far the preparation has come. If its process is killed, the same preparation
finds the folder again, and continues from the last record.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from scalegpt.config.tokenizer import SIDECAR
from scalegpt.data.leftovers import HOLDER, claim_unfinished, make_unfinished
from scalegpt.data.preparation.batches import KEPT_DIGEST_BYTES, Position, SeenDocuments
from scalegpt.data.preparation.shard_files import DIGESTS, ShardFiles
from scalegpt.data.sidecar import FORMAT, SHARDED, SPLITS, VERSION, Shard
from scalegpt.data.stored import Tokens
from scalegpt.data.text import reading
from scalegpt.errors import InputError, NoSpaceError
from scalegpt.storage import PlaceError, disk_errors, read_text, sync_file, sync_folder, write_atomic

RECORD_SECONDS = 5.0
"""The time between two records; what was written since the last one is lost when the process is killed."""

_RECORD, _SEEN = "record.json", "seen.bin"
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


@dataclass(frozen=True)
class Record:
    """How far a preparation has come.

    Attributes:
        key: the key of the preparation.
        position: the position in the corpus.
        tokens: split → number of tokens that belong to the text before the position.
        begun: where a document that is being written begins in the training tokens; None: between documents.
        owed: tokens that come next in the training part.
        pieces_of: :data:`~scalegpt.data.text.reading.PIECE_CHARACTERS`, on which the position depends.
    """

    key: str
    position: Position = field(default_factory=Position)
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    begun: int | None = None
    owed: list[int] = field(default_factory=list)
    pieces_of: int = field(default_factory=lambda: reading.PIECE_CHARACTERS)


class TokenWriter:
    """Writes a folder of prepared tokens, as a context manager.

    Entering makes a hidden folder beside ``out``, or takes over the one that an interrupted process left, with what is
    recorded in it. :meth:`commit` renames the hidden folder to ``out``. Leaving without a commit keeps the hidden folder if
    the same preparation can go on from its record; after an error of the input it is removed.

    Args:
        out: the folder to make.
        key: the key of the preparation.
        dtype: the type of the ids in the files.
        shard_tokens: number of tokens in a file.

    Attributes:
        record: the last record: at first the one that the preparation begins from.
        begun: as :attr:`Record.begun`, now.
        is_finished: whether an interrupted process wrote everything, so that only :meth:`publish` is left to do.
        can_resume: whether the hidden folder has a record.
    """

    def __init__(self, out: Path, key: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.out, self.record = out.absolute(), Record(key)
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self.begun: int | None = None
        self.is_finished = self.can_resume = self._is_published = False
        self._files: dict[str, ShardFiles] = {}
        self._made: list[Path] = []
        self._has_own_folder = False  # a folder of its own name, in which it is found again
        self._lock: int | None = None
        self._recorded = time.monotonic()

    def __enter__(self) -> Self:
        self._folder = self.out
        try:
            with disk_errors(self.out):
                self._made = [parent for parent in self.out.parents if not parent.exists()]
                self.out.parent.mkdir(parents=True, exist_ok=True)
                claimed = claim_unfinished(self.out, self.record.key)
                self._has_own_folder = claimed is not None
                self._folder, self._lock = claimed or make_unfinished(self.out)
                self._restore()
        except BaseException:
            self._leave(keep=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave(keep=kind is not None and may_resume_after(kind))

    def counts(self) -> dict[str, int]:
        """Split → number of tokens so far."""
        return {split: files.count for split, files in self._files.items()}

    def seen_documents(self) -> SeenDocuments:
        """The documents before the position of the record."""
        with disk_errors(self.out):
            content = self._seen.read_bytes() if self._seen.exists() else b""
        size = KEPT_DIGEST_BYTES
        return SeenDocuments(content[first : first + size] for first in range(0, len(content), size))

    def append(self, split: str, ids: Tokens) -> None:
        """Append token ids to a split.

        Raises:
            InputError: the disk is full, or a file cannot be written; so in all methods.
        """
        with disk_errors(self.out):
            self._files[split].append(ids)

    def hold_out_tail(self, first: int, ending: Tokens, position: Position, seen: SeenDocuments | None) -> None:
        """Move the training tokens from offset ``first`` on to the held-out tokens, and end both with ``ending``.

        A record is written before the tokens are removed, so that no moment is without a record of what the files hold.
        """
        train, val = (self._files[split] for split in SPLITS)
        with disk_errors(self.out):
            train.move_to(val, first)
            val.append(ending)
            self.begun = None
            self._write_record(position, seen, {"train": first, "val": val.count}, ending)
            train.cut(first)
            train.append(ending)

    def record_if_due(self, position: Position, seen: SeenDocuments | None) -> None:
        """Record that all text before a position is written, if :data:`RECORD_SECONDS` have passed since the last record."""
        if time.monotonic() - self._recorded >= RECORD_SECONDS:
            with disk_errors(self.out):
                self._write_record(position, seen, self.counts())

    def _write_record(
        self, position: Position, seen: SeenDocuments | None, tokens: dict[str, int], owed: Tokens | None = None
    ) -> None:
        if not self._has_own_folder:
            return
        for split, files in self._files.items():
            files.sync()
            files.settle(tokens[split] if self.begun is None or split != "train" else self.begun)
        if seen is not None:
            self._store(seen, position.documents)
        ids = [] if owed is None else owed.tolist()
        record = Record(self.record.key, position, tokens, self.begun, ids)
        write_atomic(self._record_path, json.dumps(asdict(record)), durable=True)
        self.record, self.can_resume = record, True
        self._recorded = time.monotonic()

    @property
    def _seen(self) -> Path:
        return self._folder / _SEEN

    def _store(self, seen: SeenDocuments, count: int) -> None:
        """Append the digests of the first ``count`` documents to their file, as far as it lacks them."""
        with self._seen.open("ab") as file:
            fresh = count - file.tell() // KEPT_DIGEST_BYTES
            file.write(b"".join(seen.fresh[:fresh]))
            sync_file(file)
        del seen.fresh[:fresh]

    def _restore(self) -> None:
        """Make the folder what its record says; without one, empty."""
        for split in SPLITS:  # a commit may have been interrupted
            single = self._folder / f"{split}.bin"
            if single.exists() and self._record_path.exists():
                single.rename(self._folder / f"{split}_00000.bin")
        self.is_finished = (self._folder / SIDECAR).exists() and not self._record_path.exists()
        if self.is_finished:
            return
        try:
            found = self._read_record()
            self._open_files(found.tokens)
        except (InputError, ValueError, TypeError, KeyError, FileNotFoundError):
            self._remove_all_but({HOLDER})
            self._open_files(self.record.tokens)
            return
        self.record, self.begun, self.can_resume = found, found.begun, True
        kept = {_RECORD, _SEEN, HOLDER, *(path.name for split in SPLITS for path in self._folder.glob(f"{split}_*"))}
        self._remove_all_but(kept)
        if self._seen.exists():
            os.truncate(self._seen, found.position.documents * KEPT_DIGEST_BYTES)
        if found.owed:
            self._files["train"].append(np.array(found.owed, dtype=self._dtype))

    @property
    def _record_path(self) -> Path:
        return self._folder / _RECORD

    def _read_record(self) -> Record:
        """Read the record.

        Raises:
            FileNotFoundError: there is none.
            InputError, ValueError, TypeError, KeyError: it is damaged, or of another preparation or release.
        """
        values = json.loads(read_text(self._record_path))
        record = Record(**{**values, "position": Position(**values["position"])})
        if (record.key, record.pieces_of) != (self.record.key, self.record.pieces_of) or set(record.tokens) != set(
            SPLITS
        ):
            raise ValueError("it is of another preparation")
        return record

    def _open_files(self, tokens: dict[str, int]) -> None:
        for split in SPLITS:
            self._files[split] = ShardFiles(self._folder, split, self._dtype, self._shard_tokens, tokens[split])

    def _remove_all_but(self, names: set[str]) -> None:
        for path in self._folder.iterdir():
            if path.name not in names:
                path.unlink()

    def commit(self, meta: dict[str, Any], files: Mapping[str, bytes]) -> bool:
        """Write the sidecar and the files beside it, sync everything, and rename the folder into place.

        Args:
            meta: the sidecar's entries, except the format, the counts and the digests.
            files: further files: name → content.

        Returns:
            As :meth:`publish`.
        """
        with disk_errors(self.out):
            shards = {split: each.finish() for split, each in self._files.items()}
            for name, content in files.items():
                write_atomic(self._folder / name, content, durable=True)
            head = {"format": FORMAT, **_listing(shards), "dtype": self._dtype.name}
            counts = {f"{split}_tokens": count for split, count in self.counts().items()}
            write_atomic(self._folder / SIDECAR, json.dumps({**head, **counts, **meta}, indent=1) + "\n", durable=True)
            for path in self._folder.glob(f"*{DIGESTS}"):
                path.unlink()
            self._seen.unlink(missing_ok=True)
            self._record_path.unlink(missing_ok=True)
        return self.publish()

    def publish(self) -> bool:
        """Rename the finished folder into place.

        Returns:
            True if the hidden folder became ``out``; False if another folder or a file is at ``out``.
        """
        with disk_errors(self.out):
            for path in self._folder.glob(".*"):  # of the process that wrote it
                path.unlink()
            sync_folder(self._folder)
            try:
                self._folder.rename(self.out)  # replaces ``out`` only if it is an empty folder
            except OSError as error:
                if error.errno in _TAKEN:
                    return False
                raise
            sync_folder(self.out.parent)
        self._is_published = True
        return True

    def _leave(self, *, keep: bool) -> None:
        """Close all files; remove the hidden folder unless it is kept, and parent folders made for it that are empty."""
        for file in self._files.values():
            file.close()
        if not self._is_published and not (keep and (self.can_resume or self.is_finished)) and self._lock is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for parent in self._made:
            try:
                parent.rmdir()
            except OSError:  # not empty: it holds the committed folder, or another process uses it
                return


def may_resume_after(kind: type[BaseException]) -> bool:
    """Whether the same preparation can go on after an error of this class: any but one of the input."""
    return not issubclass(kind, InputError) or issubclass(kind, NoSpaceError | PlaceError)


def _listing(shards: Mapping[str, list[Shard]]) -> dict[str, Any]:
    """The sidecar's entries about the token files.

    Where each split has one file they are those of version 1, which every release reads.
    """
    if all(len(each) == 1 for each in shards.values()):
        return {
            "version": VERSION,
            "files": {split: shard.sha256 for split, (shard,) in shards.items()},
            "blocks": {split: shard.blocks for split, (shard,) in shards.items()},
        }
    return {"version": SHARDED, "shards": {split: [asdict(shard) for shard in each] for split, each in shards.items()}}
