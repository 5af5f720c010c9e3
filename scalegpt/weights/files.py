"""Reads the weights in a Hugging Face folder tensor by tensor: safetensors or PyTorch files, one file or shards.

The files may come from a stranger. An index can name only files in its folder. The safetensors library checks the
header of a file, and compares it with the file's size. A pickle is read by torch's restricted unpickler, which runs no
code. Links are followed, since Hugging Face's cache of downloads consists of them.
"""

import pickle
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalegpt.errors import InputError
from scalegpt.storage import read_text
from scalegpt.structured import parse_json
from scalegpt.text import shown

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"

INDEX = ".index.json"
"""The index says which shard holds which tensor. Its file name has this ending."""

INDEX_LIMIT = 64 << 20
"""The largest index that is read, in bytes: about half a million tensors."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Name of a dtype in safetensors → the dtype, for the dtypes that are read."""

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.(safetensors|bin)")


class Shard(Protocol):
    """One open file of weights."""

    def entries(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | str]]:
        """Name → shape and dtype of each tensor. An unsupported dtype is given as a word."""

    def read(self, name: str) -> Tensor:
        """The tensor of this name, on the CPU, in its own dtype."""


class SafetensorsShard:
    """A safetensors file. It is mapped into memory only while a tensor of it is in use, since read pages count as memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries()

    def entries(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | str]]:
        """See :class:`Shard`."""
        found = {}
        file = self._open()
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            kind = str(part.get_dtype())
            found[name] = tuple(part.get_shape()), DTYPES.get(kind, kind)
        return found

    def read(self, name: str) -> Tensor:
        """See :class:`Shard`."""
        try:
            value: Tensor = self._open().get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(self._path, error) from None
        return value

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(self._path, error) from None


class PickleShard:
    """A file of ``torch.save``, mapped into memory like :class:`SafetensorsShard`. Only tensors are unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        known = DTYPES.values()
        self._entries = {
            name: (tuple(value.shape), value.dtype if value.dtype in known else str(value.dtype).removeprefix("torch."))
            for name, value in self._open().items()
        }

    def entries(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | str]]:
        """See :class:`Shard`."""
        return self._entries

    def read(self, name: str) -> Tensor:
        """See :class:`Shard`."""
        return self._open()[name].detach()

    def _open(self) -> dict[str, Tensor]:
        path = self._path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise InputError(
                f"{path} is a pickle with more than tensors, so it could run code and is not read; save the model as "
                "safetensors instead"
            ) from None
        except (RuntimeError, ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, BadZipFile) as error:
            raise _damaged(path, error) from None
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise InputError(f"{path} holds more than named tensors; save the model as safetensors instead")
        return content


class WeightFiles:
    """The tensors of a folder, found but not read.

    Attributes:
        path: the folder.
        shapes: name → shape of every tensor.
        dtypes: name → dtype. An unsupported dtype is given as a word.
    """

    def __init__(self, path: Path) -> None:
        """Open all files of a folder.

        Raises:
            InputError: there are no weights; a file is missing, damaged, or a pickle with more than tensors; or two files
                hold the same tensor.
        """
        self.path = path
        self._shard_of: dict[str, Shard] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        for file in _files(path):
            shard = SafetensorsShard(file) if file.suffix == ".safetensors" else PickleShard(file)
            for name, (shape, dtype) in shard.entries().items():
                if name in self._shard_of:
                    raise InputError(f"{file} holds {shown(name)}, which another file of {path} holds too")
                self._shard_of[name], self.shapes[name], self.dtypes[name] = shard, shape, dtype

    def read(self, name: str) -> Tensor:
        """The tensor of this name, on the CPU, in its own dtype.

        Raises:
            InputError: the file cannot be read.
        """
        return self._shard_of[name].read(name)


def _files(folder: Path) -> list[Path]:
    """The files of weights in a folder: a single file, or the shards that its index names.

    Raises:
        InputError: the folder has no weights, or the index or one of its shards is missing or not allowed.
    """
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).exists():
            return [_plain(folder / name)]
        if (folder / f"{name}{INDEX}").exists():
            return _shards(folder / f"{name}{INDEX}")
    raise InputError(f"{folder} has no weights: neither {SAFETENSORS} nor {PICKLE}, nor an index of shards")


def _shards(index: Path) -> list[Path]:
    try:
        values = parse_json(read_text(_plain(index), INDEX_LIMIT), str(index))
    except UnicodeDecodeError:
        raise InputError(f"{index} is not a text file") from None
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map, which names the shard of each tensor")
    names = dict.fromkeys(str(name) for name in places.values())
    for name in names:
        if not _SHARD.fullmatch(name):
            raise InputError(f"{index} names {shown(name)}, which is not a file of weights in its own folder")
    return [_plain(index.with_name(name), f", which {index.name} names") for name in sorted(names)]


def _plain(path: Path, why: str = "") -> Path:
    """Return the path if it is a plain file or a link to one.

    Raises:
        InputError: the path is missing or is something else.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path
    except FileNotFoundError:
        raise InputError(f"{path}{why} is missing; copy or download the folder again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    raise InputError(f"{path}{why} is not a plain file")


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).removesuffix(f": {path}").split())[:200]
    return InputError(f"{path} is damaged or cut short ({reason}); copy or download it again")
