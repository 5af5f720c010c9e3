"""Writes a checkpoint: every rank writes its part, then rank 0 the manifest. Ranks communicate through the files alone.

1. Rank 0 calls :func:`begin`: it checks the free space, makes ``.step_00001000.NONCE.tmp``, where NONCE is a random number of
   this save, and sends the :class:`Save` to the other ranks.
2. Every rank calls :func:`write_part`: it writes and syncs ``rank_00000.weights.safetensors`` and
   ``rank_00000.moments.safetensors``, and then ``rank_00000.json``, its record, with their sizes, digests and pieces.
3. Rank 0 calls :func:`commit`: it waits for every rank's record, checks that the records belong to this save and that the
   pieces cover every tensor exactly once, writes the manifest in place of the records, and renames the directory.

All ranks must see the same directory. A checkpoint is never written into an existing directory.

At an address (:class:`~scalegpt.checkpoint.save.SaveAtAddress`) the ranks write into the final folder. The manifest, which is
written last, takes the place of the rename.
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from scalegpt.backends.base import Piece
from scalegpt.checkpoint.address import Address, Place, retried_at
from scalegpt.checkpoint.manifest import (
    KINDS,
    MANIFEST_LIMIT,
    WEIGHTS,
    DamagedError,
    Header,
    Manifest,
    Placed,
    StoredFile,
    StoredTensor,
    entry_name,
    file_name,
    kind_of_key,
)
from scalegpt.checkpoint.reader import read_manifest
from scalegpt.checkpoint.save import Save, failing_as_a_run, replace_manifest, save_at
from scalegpt.checkpoint.tensorfile import Entry, write_tensors
from scalegpt.errors import InputError, RunError

PEERS_SECONDS = 900.0
"""Seconds that rank 0 waits for the other ranks' parts after writing its own."""

Shapes = Mapping[str, tuple[int, ...]]
"""Canonical tensor, ``KEY/NAME`` → its shape; see :meth:`scalegpt.backends.base.Backend.canonical_shapes`."""

AnySave = Save[Path] | Save[Address]

_SPARE_BYTES = 1 << 20
"""Disk space that a save needs besides the tensors, for the manifest and the file system's own data."""


class AbandonedError(RuntimeError):
    """This process has abandoned the save."""


def begin(folder: Place, step: int, ranks: int, needed: int) -> AnySave:
    """Make the directory into which all ranks write. Called only on rank 0.

    Args:
        folder: the folder of the run's checkpoints; no other save may run there.
        step: the step that is saved.
        ranks: number of ranks that will write.
        needed: size of all ranks' tensors in bytes.

    Raises:
        RunError: the disk has no room, the folder cannot be written, or the step already has a checkpoint.
    """
    save = save_at(folder, step, secrets.token_hex(8), ranks)
    with failing_as_a_run(save.final):
        retried_at(folder, lambda: save.make(needed + _SPARE_BYTES))
    return save


def write_part(save: AnySave, rank: int, pieces: Sequence[Piece]) -> None:
    """Write a rank's pieces, and then its record (a JSON file that lists the files and pieces).

    After an error that may be temporary, the files are deleted and written again. Another sync of the same file would not
    help: after a failed sync Linux marks the unwritten data as written, so that the next sync reports no error.

    Raises:
        RunError: the disk is full, or the folder still cannot be written after retries.
    """
    with failing_as_a_run(save.final):
        retried_at(save.folder, lambda: _try_to_write(save, rank, pieces))


def write_weights(save: AnySave, shapes: Shapes, weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> None:
    """Write whole weights, one at a time, as the part of the only rank, without states of an optimizer.

    Args:
        save: from :func:`begin`, with one rank.
        shapes: as for :func:`commit`, in the order in which the weights come.
        weights: yields the name of each parameter and its fp32 value on the CPU; called again after an error that may be
            temporary.

    Raises:
        RunError: the disk is full, or the folder still cannot be written after retries.
    """
    name = file_name(0, WEIGHTS, save.mark)
    entries = [Entry(entry_name(tensor, 0), torch.float32, (math.prod(shape),)) for tensor, shape in shapes.items()]
    placed = {tensor: [Placed(0, math.prod(shape), name)] for tensor, shape in shapes.items()}

    def write() -> None:
        _drop(save.temporary / name)
        files = {name: write_tensors(save.temporary / name, entries, (value for _, value in weights()))}
        _write_record(save, 0, files, placed)

    with failing_as_a_run(save.final):
        retried_at(save.folder, write)


def commit(
    save: AnySave,
    header: Header,
    shapes: Shapes,
    *,
    patience: float = PEERS_SECONDS,
    abandoned: Callable[[], bool] = lambda: False,
    gone: Callable[[int], bool] = lambda _rank: False,
) -> Place:
    """Complete a checkpoint from all ranks' parts. Called only on rank 0.

    Args:
        save: from :func:`begin`.
        header: the manifest's entries about the run.
        shapes: the tensors that the pieces must cover.
        patience: seconds to wait for each other rank's part.
        abandoned: returns whether to abandon the save.
        gone: returns whether a rank has ended; the save is abandoned if the part of an ended rank is missing.

    Returns:
        The checkpoint's directory.

    Raises:
        RunError: a part is missing or belongs to another save, or the folder cannot be written.
        AbandonedError: the save was abandoned.
    """
    with failing_as_a_run(save.final):
        records = [_await(save, rank, patience, abandoned, gone) for rank in range(save.ranks)]
        manifest = _assemble(save, header, shapes, records)
        content = _encoded(save, manifest)
        save.publish(content, _raising(abandoned))
    return save.final


def amend(checkpoint: Place, val_loss: float | None, best_val_loss: float | None) -> None:
    """Add held-out losses, computed after the checkpoint was saved, to the manifest of a complete checkpoint.

    The new manifest replaces the old one atomically. Nothing is written if the manifest already has these losses.

    Raises:
        RunError: the manifest cannot be read or written.
    """
    try:
        manifest = read_manifest(checkpoint)
    except InputError as error:
        raise RunError(f"the held-out loss of {checkpoint} cannot be saved: {error}") from error
    header = manifest.header
    progress = replace(header.progress, val_loss=val_loss, best_val_loss=best_val_loss)
    if progress == header.progress:
        return
    with failing_as_a_run(checkpoint):
        replace_manifest(checkpoint, replace(manifest, header=replace(header, progress=progress)).encode())


def bytes_of(pieces: Iterable[Piece]) -> int:
    """The size of pieces in bytes, the same in memory and on the disk."""
    return sum(piece.values.numel() * piece.values.element_size() for piece in pieces)


def _raising(abandoned: Callable[[], bool]) -> Callable[[], None]:
    """A function that raises :class:`AbandonedError` if the save was abandoned."""

    def check() -> None:
        if abandoned():
            raise AbandonedError

    return check


def _encoded(save: AnySave, manifest: Manifest) -> bytes:
    """The bytes of a manifest.

    Raises:
        RunError: the manifest is larger than :data:`MANIFEST_LIMIT`.
    """
    content = manifest.encode()
    if len(content) > MANIFEST_LIMIT:
        raise RunError(
            f"checkpoint {save.final} cannot be written: its manifest has {len(content):,} bytes, and at most "
            f"{MANIFEST_LIMIT:,} are read; use fewer ranks"
        )
    return content


def _drop(path: Place) -> None:
    """Delete the file of a failed attempt, which cannot be overwritten on a disk."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)


def _try_to_write(save: AnySave, rank: int, pieces: Sequence[Piece]) -> None:
    files: dict[str, StoredFile] = {}
    placed: dict[str, list[Placed]] = {}
    for kind in KINDS:
        mine = [piece for piece in pieces if kind_of_key(piece.key) == kind]
        if not mine:
            continue
        name = file_name(rank, kind, save.mark)
        _drop(save.temporary / name)
        files[name] = write_tensors(save.temporary / name, [_entry(piece) for piece in mine], (p.values for p in mine))
        for piece in mine:
            where = Placed(piece.start, piece.values.numel(), name)
            placed.setdefault(f"{piece.key}/{piece.name}", []).append(where)
    _write_record(save, rank, files, placed)


def _write_record(
    save: AnySave, rank: int, files: Mapping[str, StoredFile], placed: Mapping[str, Sequence[Placed]]
) -> None:
    record = {
        "nonce": save.nonce,
        "rank": rank,
        "files": {name: asdict(file) for name, file in files.items()},
        "pieces": {tensor: [asdict(where) for where in places] for tensor, places in placed.items()},
    }
    save.write_record(rank, json.dumps(record))


def _entry(piece: Piece) -> Entry:
    assert piece.values.dtype == torch.float32
    return Entry(entry_name(f"{piece.key}/{piece.name}", piece.start), torch.float32, tuple(piece.values.shape))


def _await(
    save: AnySave, rank: int, patience: float, abandoned: Callable[[], bool], gone: Callable[[int], bool]
) -> dict[str, Any]:
    """Wait for a rank's record (its JSON file) and read it."""
    path, deadline = save.record(rank), time.monotonic() + patience
    while not path.exists():
        if abandoned() or (gone(rank) and not path.exists()):  # the rank may have written it before it ended
            raise AbandonedError
        if time.monotonic() > deadline:
            raise RunError(
                f"checkpoint {save.final} cannot be written: rank {rank} did not write its part within "
                f"{patience:.0f} s; check that {save.folder} is the same folder on all machines"
            )
        time.sleep(save.poll_seconds)
    record: dict[str, Any] = json.loads(save.read_record(rank))
    if (record["nonce"], record["rank"]) != (save.nonce, rank):
        raise RunError(f"checkpoint {save.final} cannot be written: {path.name} belongs to another save")
    return record


def _assemble(
    save: AnySave,
    header: Header,
    shapes: Shapes,
    records: Iterable[dict[str, Any]],
) -> Manifest:
    """Make the manifest from all ranks' records.

    Raises:
        RunError: the pieces do not cover every tensor exactly once, or the size of a file differs from its record.
    """
    files: dict[str, StoredFile] = {}
    placed: dict[str, list[Placed]] = {tensor: [] for tensor in shapes}
    for record in records:
        files |= {name: StoredFile(**file) for name, file in record["files"].items()}
        for tensor, places in record["pieces"].items():
            placed[tensor] += [Placed(**where) for where in places]
    tensors = {tensor: StoredTensor(tuple(shapes[tensor]), tuple(sorted(places))) for tensor, places in placed.items()}
    manifest = Manifest(header, tensors, files)
    try:
        manifest.check_coverage()
    except DamagedError as error:
        raise RunError(f"checkpoint {save.final} cannot be written: {error} (a bug in ScaleGPT)") from None
    sizes = save.sizes()
    for name, file in files.items():
        if sizes.get(name) != file.bytes:
            raise RunError(f"checkpoint {save.final} cannot be written: {name} changed after it was written")
    return manifest
