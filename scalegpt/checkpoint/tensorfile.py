"""Writing safetensors files tensor by tensor, with the digest taken of what is written.

``safetensors.torch.save_file`` takes all tensors at once, and a digest of its file would be of what the disk holds, not of
what was to be written. The format is simple: the header's length in 8 bytes, little-endian; a JSON header; the tensors one
after another (https://github.com/huggingface/safetensors, "Format").
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from scalegpt.checkpoint.manifest import StoredFile
from scalegpt.storage import sync_file

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

CHUNK = 8 << 20
"""Bytes written and hashed at once; both let other threads run meanwhile."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, entries: Sequence[Entry], values: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> StoredFile:
    """Write a new safetensors file and sync it to disk.

    Args:
        path: the new file; an existing one is an error.
        entries: what the file will hold, in order.
        values: a tensor for each entry, on any device, taken one at a time.
        metadata: the header's ``__metadata__``.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    with path.open("xb") as file:
        total = _Hashing(file)
        total.write(memoryview(_header(entries, metadata)))
        for entry, value in zip(entries, values, strict=True):
            assert (value.dtype, value.numel()) == (entry.dtype, math.prod(entry.shape))
            total.write(_bytes_of(value))
        sync_file(file)
    return StoredFile(total.bytes, total.digest.hexdigest())


class _Hashing:
    """A file, and the digest of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: memoryview) -> None:
        for first in range(0, len(content), CHUNK):
            part = content[first : first + CHUNK]
            self.file.write(part)
            self.digest.update(part)
        self.bytes += len(content)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    document: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        ends = [offset, offset + entry.bytes]
        document[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _bytes_of(value: Tensor) -> memoryview:
    flat = value.detach().reshape(-1).to("cpu").contiguous()
    content: Any = flat.view(torch.uint8).numpy()  # an array is a buffer, which its type does not say
    return memoryview(content) if flat.numel() else memoryview(b"")
