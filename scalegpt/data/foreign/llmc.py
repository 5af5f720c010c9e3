"""llm.c: a header of 256 int32 (magic, version, number of tokens), then the ids, uint16 for GPT-2 and uint32 for Llama 3."""

import struct
from pathlib import Path

from scalegpt.data.foreign.found import Found, TokensOfFile, divided, names_in, read_at, size_of
from scalegpt.data.stored import DTYPES, Part
from scalegpt.errors import InputError
from scalegpt.text import one_line

NAME = "llm.c"

_HEADER_BYTES = 256 * 4
_VERSIONS = {20240520: (1, DTYPES["uint16"], "gpt2", "GPT-2"), 20240801: (7, DTYPES["uint32"], None, "Llama 3")}
"""Magic number → version, type of the ids, setting ``tokenizer``, and the tokenizer in words."""

_OTHERS = {
    20240326: "weights",
    20240327: "activations",
    20240328: "a tokenizer",
    20240522: "questions of an evaluation",
}
"""Magic number of llm.c's other files → what they hold."""

_TRIED = 20
"""The number of files of a folder that are opened to see whether they are llm.c's."""


def is_ours(path: Path) -> bool:
    """Whether a file has the header of tokens, or a folder has such a file; see :func:`find`."""
    if path.is_dir():
        files = [path / name for name in names_in(path) if name.endswith(".bin")]
        return any(_magic(each) in _VERSIONS for each in files[:_TRIED])
    return path.is_file() and _magic(path) in _VERSIONS | _OTHERS


def find(path: Path) -> Found:
    """Read the headers of a file, or of all ``.bin`` files of a folder.

    Raises:
        InputError: a header is malformed or does not fit its file, or the files are not of one kind.
    """
    if not path.is_dir():
        magic, file = _read(path)
        return Found(NAME, path, (file,), (), *_VERSIONS[magic][2:])
    files, magics = [], set()
    for each in (path / name for name in names_in(path) if name.endswith(".bin")):
        if _magic(each) not in _OTHERS:
            magic, file = _read(each)
            magics.add(magic)
            files.append(file)
    if len(magics) > 1:
        raise InputError(
            f"{one_line(path)} has token files of GPT-2 and of Llama 3; give each kind a folder of its own"
        )
    return Found(NAME, path, *divided(files, path), *_VERSIONS[magics.pop()][2:])


def _magic(path: Path) -> int | None:
    try:
        head = read_at(path, 0, 4)
    except InputError:
        return None
    return int(struct.unpack("<i", head)[0]) if len(head) == 4 else None


def _read(path: Path) -> tuple[int, TokensOfFile]:
    """The magic number of a file, and its tokens."""
    head, size = read_at(path, 0, _HEADER_BYTES), size_of(path)
    name = one_line(path)
    magic, version, count = struct.unpack_from("<3i", head) if len(head) == _HEADER_BYTES else (0, 0, 0)
    if magic in _OTHERS:
        raise InputError(f"{name} holds {_OTHERS[magic]} of llm.c, not tokens to train on; name its token files")
    if magic not in _VERSIONS:
        raise InputError(f"{name} has no whole header of llm.c's token files; write it again, or move it elsewhere")
    expected, dtype = _VERSIONS[magic][:2]
    if version != expected:
        raise InputError(f"{name} is of llm.c's version {version}, and version {expected} is read; write it again")
    if count < 1 or size != _HEADER_BYTES + count * dtype.itemsize:
        raise InputError(
            f"{name} has {size:,} bytes and its header says {count:,} tokens, which need "
            f"{_HEADER_BYTES + count * dtype.itemsize:,}; write it again"
        )
    return magic, TokensOfFile(Part(path, _HEADER_BYTES, count, dtype))
