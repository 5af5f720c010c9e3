"""datatrove: ids of 2 or 4 bytes in ``NAME.ds``; the documents' ends (uint64) in ``.ds.index``; a text in ``.ds.metadata``.

The first line of the text is ``TOKENIZER|BYTES``, the second the number of tokens. As datatrove's own reader does, a folder
is searched with the folders in it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalegpt.data.foreign.found import (
    Found,
    TokensOfFile,
    UnreadableFileError,
    divided,
    names_in,
    read_at,
    size_of,
)
from scalegpt.data.stored import DTYPES, Part
from scalegpt.errors import InputError
from scalegpt.storage import read_text
from scalegpt.text import brief, one_line, shown

NAME = "datatrove"

_TYPES = {2: DTYPES["uint16"], 4: DTYPES["uint32"]}
_METADATA_LIMIT, _INDEX_CHUNK = 1 << 20, 1 << 20
_GPT2 = frozenset({"gpt2", "openai-community/gpt2"})
_UNKNOWN = "Unknown Tokenizer"

_DEEPEST = 8
"""How many levels of folders are searched below a folder without files to see whether it is datatrove's."""


def is_ours(path: Path) -> bool:
    """Whether a file is named so, or a folder has such a file with its index or metadata; see :func:`find`.

    A folder that holds nothing but folders is ours if each of them is, so that no text beside tokens is passed over.
    """
    return _has_tokens(path, _DEEPEST) if path.is_dir() else path.suffix == ".ds" and path.is_file()


def _has_tokens(folder: Path, depth: int) -> bool:
    """Whether a folder is ours; folders at most ``depth`` levels below it are searched."""
    names = set(names_in(folder))
    if any(name.endswith(".ds") and not names.isdisjoint(_beside(name)) for name in names):
        return True
    inside = (folder / name for name in names)
    return depth > 0 and bool(names) and all(each.is_dir() and _has_tokens(each, depth - 1) for each in inside)


def find(path: Path) -> Found:
    """Read the metadata of a ``.ds`` file, or of all such files in a folder at any depth, in the order of their paths.

    Raises:
        InputError: a file is missing beside its index, contradicts it or its metadata, or has loss masks; or the files are of
            several tokenizers.
        UnreadableFileError: a folder cannot be listed.
    """
    read = [_read(file, names) for file, names in _files_at(path)]
    files = [file for file, _ in read if file.part.count]
    if not files:
        raise InputError(f"{one_line(path)} has no tokens: its .ds files are empty; write them again")
    made_with = {name for _, name in read if name is not None}
    if len(made_with) > 1:
        listed = " and ".join(shown(name) for name in sorted(made_with)[:2])
        raise InputError(f"{one_line(path)} has files of several tokenizers, {listed}; give each a folder of its own")
    name = made_with.pop() if made_with else None
    training, held_out = divided(files, path) if path.is_dir() else (tuple(files), ())
    return Found(NAME, path, training, held_out, _setting(name), name)


def _files_at(path: Path) -> list[tuple[Path, set[str]]]:
    """A ``.ds`` file, or those of a folder and of the folders in it, each with the names that its own folder has."""
    if not path.is_dir():
        return [(path, set(names_in(path.parent)))]
    found: list[tuple[Path, set[str]]] = []
    pending, seen = [path], set()
    while pending:
        folder = pending.pop()
        if (real := folder.resolve()) in seen:  # a link back to a folder above
            continue
        seen.add(real)
        names = set(names_in(folder))
        files = {
            name.removesuffix(".index") for name in names if name.endswith((".ds", ".ds.index"))
        }  # an index alone: lost
        found += [(folder / name, names) for name in files]
        pending += [folder / name for name in sorted(names - files, reverse=True) if (folder / name).is_dir()]
    return sorted(found, key=lambda each: str(each[0]))


def _beside(name: str) -> tuple[str, str]:
    return f"{name}.index", f"{name}.metadata"


def _setting(name: str | None) -> str | None:
    """The setting ``tokenizer`` for the name in the metadata: GPT-2's, or the path of a file that is there."""
    if name in _GPT2:
        return "gpt2"
    try:
        is_there = name is not None and name.endswith(".json") and Path(name).is_file()
    except (OSError, ValueError):
        return None
    return name if is_there else None


def _read(path: Path, names: set[str]) -> tuple[TokensOfFile, str | None]:
    """The tokens of a file, and the name of their tokenizer if its metadata says it.

    Args:
        path: path of the file.
        names: the names in its folder.
    """
    size, (index, metadata) = size_of(path), _beside(path.name)
    if f"{path.name}.loss" in names:
        raise InputError(
            f"{one_line(path)} has a mask of the loss beside it (.loss), which is not applied here; remove the mask to train "
            "on every token"
        )
    ends = _open_index(path.with_name(index)) if index in names else None
    name, width, count = _read_metadata(path.with_name(metadata)) if metadata in names else (None, None, None)
    last = None if ends is None else ends[-1] if len(ends) else 0
    width = width or next((each for each in _TYPES if last is not None and last * each == size), None)
    if width is None:
        raise InputError(
            f"{one_line(path)} does not say whether its ids have 2 or 4 bytes: it has no metadata, and no index that fits "
            f"its size; restore {one_line(metadata)}"
        )
    for beside, tokens in (("metadata", count), ("index", last)):
        if tokens is not None and tokens * width != size:
            raise InputError(
                f"{one_line(path)} has {size:,} bytes, where its {beside} says {tokens:,} tokens of {width} bytes; write it "
                "again"
            )
    part = Part(path, 0, size // width, _TYPES[width])
    return TokensOfFile(part, ends, None if ends is None else ends.check), name


def _read_metadata(path: Path) -> tuple[str | None, int, int]:
    """The tokenizer's name, the bytes of an id, and the number of tokens."""
    try:
        lines = read_text(path, _METADATA_LIMIT).split("\n")
    except OSError as error:
        raise UnreadableFileError(path, error) from None
    except UnicodeDecodeError:
        raise InputError(f"{one_line(path)} is not UTF-8, so it is no metadata of datatrove; write it again") from None
    name, _, width = lines[0].rpartition("|")
    count = lines[1] if len(lines) > 1 else ""
    if width not in {"2", "4"} or not (count.isascii() and count.isdigit()) or len(count) > 18:
        raise InputError(
            f"{one_line(path)} begins with {shown(brief(lines[0]))}, where datatrove writes TOKENIZER|2 or |4 and then the "
            "number of tokens; write it again"
        )
    return (None if not name or name.startswith(_UNKNOWN) else name), int(width), int(count)


@dataclass(frozen=True)
class _Index:
    """The ends of a file's documents; see :class:`~scalegpt.data.foreign.found.Ends`."""

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> int:
        place = range(self.count)[index]
        content = read_at(self.path, 8 * place, 8)
        if len(content) < 8:
            raise InputError(f"{one_line(self.path)} became shorter while it was read; run the command again")
        return int.from_bytes(content, "little")

    def check(self) -> None:
        """Check that the ends ascend.

        Raises:
            InputError: they do not.
        """
        last = 0
        for first in range(0, 8 * self.count, _INDEX_CHUNK):
            ends = np.frombuffer(read_at(self.path, first, _INDEX_CHUNK), dtype="<u8")
            if len(ends) and (ends[0] < last or (ends[1:] < ends[:-1]).any()):
                raise InputError(
                    f"{one_line(self.path)} is damaged: the ends of its documents do not ascend; write it again"
                )
            last = int(ends[-1]) if len(ends) else last


def _open_index(path: Path) -> _Index:
    size = size_of(path)
    if size % 8:
        raise InputError(f"{one_line(path)} has {size:,} bytes, no multiple of 8, so it was cut short; write it again")
    return _Index(path, size // 8)
