"""Reads safetensors files at an address: their digests, and parts of tensors with few requests and little memory."""

import errno
import hashlib
import json
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from scalegpt.checkpoint.address import PART_BYTES, Address
from scalegpt.checkpoint.manifest import DamagedError, StoredFile

HEADER_LIMIT = 100 << 20
"""The largest header of a safetensors file, in bytes; the safetensors library has the same limit."""

BLOCKS = 4
"""How many of the last parts read are kept. A rank reads weights and moments in turn, of one or two files each."""

_LENGTH_BYTES, _ELEMENT_BYTES = 8, 4


class RemoteTensors:
    """The fp32 tensors of the files of a checkpoint at an address.

    Small tensors that lie together are read by one request.
    """

    def __init__(self) -> None:
        self._headers: dict[Address, tuple[int, dict[str, Any]]] = {}
        self._blocks: OrderedDict[tuple[Address, int], bytes] = OrderedDict()

    def slice(self, file: Address, entry: str, first: int, last: int) -> Tensor:
        """Elements ``first`` to ``last`` of a one-dimensional entry of a file: fp32 [last - first].

        Raises:
            DamagedError: the file has no such entry, or one of another dtype or length.
            OSError: the file cannot be read.
        """
        if file not in self._headers:
            self._headers[file] = _header(file)
        data, entries = self._headers[file]
        found = entries.get(entry)
        if found is None:
            raise DamagedError(f"{file} has no entry {entry}")
        begin, end = found["data_offsets"]
        if found["dtype"] != "F32" or end - begin != _ELEMENT_BYTES * math.prod(found["shape"]):
            raise DamagedError(f"{file}: {entry} does not hold fp32")
        start, stop = (data + begin + _ELEMENT_BYTES * each for each in (first, last))
        if stop > data + end:
            raise DamagedError(f"{file}: {entry} has fewer than {last:,} elements")
        result = torch.empty(last - first)
        self._fill(memoryview(result.numpy()).cast("B"), file, start)  # type: ignore[arg-type]
        return result

    def _fill(self, into: memoryview, file: Address, start: int) -> None:
        """Fill a buffer with the bytes of a file from ``start`` on."""
        done = 0
        while done < len(into):
            number, skip = divmod(start + done, PART_BYTES)
            part = self._block(file, number)[skip : skip + len(into) - done]
            if not part:
                raise DamagedError(f"{file} ends before byte {start + len(into):,}")
            into[done : done + len(part)] = part
            done += len(part)

    def _block(self, file: Address, number: int) -> bytes:
        """A part of a file, which is kept until :data:`BLOCKS` others have been read."""
        key = file, number
        if key not in self._blocks:
            while len(self._blocks) >= BLOCKS:
                self._blocks.popitem(last=False)
            self._blocks[key] = file.read(number * PART_BYTES, (number + 1) * PART_BYTES)
        self._blocks.move_to_end(key)
        return self._blocks[key]


def digest_at(file: Address, expected: StoredFile) -> tuple[int, str]:
    """The size of an object, and its SHA-256 if the size is the expected one.

    Raises:
        OSError: the object is missing, or cannot be read.
    """
    digest, size = hashlib.sha256(), file.size()
    if size is None:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", str(file))
    for part in file.parts(size) if size == expected.bytes else ():
        digest.update(part)
    return size, digest.hexdigest()


def _header(file: Address) -> tuple[int, dict[str, Any]]:
    """Where the data of a file begin, in bytes, and its header."""
    length = int.from_bytes(file.read(0, _LENGTH_BYTES), "little")
    if length > HEADER_LIMIT:
        raise DamagedError(f"{file} has a header of {length:,} bytes")
    begin = _LENGTH_BYTES + length
    return begin, json.loads(file.read(_LENGTH_BYTES, begin))
