"""Writes safetensors files tensor by tensor, with a digest of the bytes in memory.

``safetensors.torch.save_file`` would need all tensors in memory at once. The digest is computed from the bytes in
memory, since a digest of the file on the disk would not detect an error of the disk. The format is simple: the header's
length in 8 bytes, little-endian; a JSON header; the tensors one after another
(https://github.com/huggingface/safetensors, "Format").
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from scalegpt.checkpoint.address import Place, new_file
from scalegpt.checkpoint.manifest import StoredFile

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

CHUNK = 8 << 20
"""Number of bytes that are written and hashed at once. Other threads can run during both."""


@dataclass(frozen=True)
class Entry:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Place, entries: Sequence[Entry], values: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> StoredFile:
    """Write a new safetensors file and sync it to disk, or upload it.

    Args:
        path: the new file; on a disk it must not exist.
        entries: the tensors of the file, in order.
        values: the values of each entry, on any device; only one tensor at a time is taken from the iterator.
        metadata: the header's ``__metadata__``.

    Returns:
        Size and SHA-256 of the file.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    header = _header(entries, metadata)
    with new_file(path, len(header) + sum(entry.bytes for entry in entries)) as file:
        total = _Hashing(file)
        total.write(memoryview(header))
        for entry, value in zip(entries, values, strict=True):
            assert (value.dtype, value.numel()) == (entry.dtype, math.prod(entry.shape))
            total.write(_bytes_of(value))
    return StoredFile(total.bytes, total.digest.hexdigest())


class _Hashing:
    """A file being written, with the number and the digest of the bytes written so far."""

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
