"""Examines and summarises checkpoints for ``scalegpt checkpoint``, and writes their weights as one file."""

import glob
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from scalegpt.backends.base import WEIGHT
from scalegpt.checkpoint.address import Place
from scalegpt.checkpoint.manifest import Manifest, StoredFile, tensors_of
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.checkpoint.tensorfile import Entry, write_tensors
from scalegpt.errors import InputError
from scalegpt.storage import check_space, disk_errors, give_name, remove_temporaries, sync_folder, temporary_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Verdict:
    """The result of examining a checkpoint.

    Attributes:
        path: the checkpoint's directory.
        manifest: the manifest; None if it cannot be read.
        problems: a line for each problem; empty if the checkpoint is undamaged.
    """

    path: Place
    manifest: Manifest | None
    problems: tuple[str, ...] = field(default=())

    @property
    def is_whole(self) -> bool:
        """Whether there are no problems: every file is as written, and the pieces cover every tensor."""
        return not self.problems


def examine(path: Place) -> Verdict:
    """Verify a checkpoint completely: the manifest, the coverage of every tensor by pieces, and the digest of every file."""
    try:
        checkpoint = Checkpoint.open(path)
    except InputError as error:
        return Verdict(path, None, (str(error),))
    return Verdict(path, checkpoint.manifest, tuple(str(problem) for problem in checkpoint.problems()))


def summary(path: Place, manifest: Manifest) -> dict[str, Any]:
    """A manifest's content as plain JSON values, with counts in place of the tensors and their pieces."""
    header = manifest.header
    keys = Counter(name.partition("/")[0] for name in manifest.tensors)
    return {
        "checkpoint": str(path),
        "run": header.run,
        "written_by": header.written_by,
        "progress": asdict(header.progress),
        "data": header.data,
        "tokenizer": header.tokenizer.get("kind"),
        "parameters": sum(math.prod(tensor.shape) for _, tensor in tensors_of(manifest, WEIGHT)),
        "tensors": dict(keys),
        "pieces": sum(len(tensor.pieces) for tensor in manifest.tensors.values()),
        "bytes": manifest.size,
        "files": {name: asdict(file) for name, file in manifest.files.items()},
        "config": header.config,
    }


def convert(checkpoint: Checkpoint, out: Path, dtype: str) -> StoredFile:
    """Write the weights of a checkpoint as one safetensors file, tensor by tensor, under the parameters' names.

    Args:
        checkpoint: the checkpoint, whose files of weights have been verified.
        out: the new file.
        dtype: a key of :data:`DTYPES`; bf16 rounds to nearest.

    Returns:
        Size and digest of the new file.

    Raises:
        InputError: the file exists already, the disk has no room, or the folder cannot be written.
    """
    if out.exists():
        raise InputError(f"{out} exists already; choose another --out")
    entries = [Entry(name, DTYPES[dtype], tensor.shape) for name, tensor in tensors_of(checkpoint.manifest, WEIGHT)]
    check_space(out, sum(entry.bytes for entry in entries))
    temporary = temporary_name(out)
    with disk_errors(out):
        remove_temporaries(out.parent, glob.escape(out.name))
        temporary.unlink(missing_ok=True)
        try:
            values = (value.to(DTYPES[dtype]) for _, value in checkpoint.weights())
            written = write_tensors(temporary, entries, values, {"format": "pt"})
            publish(temporary, out)
            sync_folder(out.absolute().parent)
        finally:
            temporary.unlink(missing_ok=True)
    return written


def publish(temporary: Path, out: Path) -> None:
    """Give a finished file the name ``out``. Unlike a rename, this never replaces a file.

    Raises:
        InputError: another program has made a file of that name.
    """
    try:
        give_name(temporary, out)
    except FileExistsError:
        raise InputError(f"{out} exists already; choose another --out") from None
