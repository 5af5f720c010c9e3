"""What a format finds at a path: which stretches of which files are tokens, and what the files say about them."""

import errno
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scalegpt.data.stored import Part
from scalegpt.errors import InputError
from scalegpt.storage import DiskError, open_plain, retried
from scalegpt.text import one_line

_HELD_OUT = re.compile(r"(^|[^a-z0-9])(val|valid|validation)([^a-z0-9]|$)")


class UnreadableFileError(DiskError):
    """A file of another program cannot be read, because of permissions or the disk."""

    subject, done, advice = "", "read", "make it readable"


class Ends(Protocol):
    """The ends of the documents of a file, ascending, each in tokens from the file's first token; read on demand."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> int: ...


@dataclass(frozen=True)
class TokensOfFile:
    """The tokens of one file.

    Attributes:
        part: where they are.
        ends: the ends of their documents; None: not known.
        check: reads all that the file says beside its tokens, and raises an :class:`InputError` if it contradicts itself.
    """

    part: Part
    ends: Ends | None = None
    check: Callable[[], None] | None = None


@dataclass(frozen=True)
class Found:
    """The token files of another program at a path. Only headers have been read.

    Attributes:
        format: the program's name.
        path: the file or folder that the user named.
        files: the files with training tokens, in order.
        held_out: the files with held-out tokens; empty: a part of ``files`` has to be held out.
        tokenizer: the setting ``tokenizer`` that made them: ``gpt2``, or the path of a ``tokenizer.json``; None: not known.
        made_with: what the files say about their tokenizer, for messages.
    """

    format: str
    path: Path
    files: tuple[TokensOfFile, ...]
    held_out: tuple[TokensOfFile, ...] = ()
    tokenizer: str | None = None
    made_with: str | None = None

    @property
    def documents(self) -> int | None:
        """The number of documents in all files; None if it is not known."""
        ends = [each.ends for each in (*self.files, *self.held_out)]
        return sum(len(each) for each in ends if each is not None) if None not in ends else None


def divided(files: Sequence[TokensOfFile], folder: Path) -> tuple[tuple[TokensOfFile, ...], tuple[TokensOfFile, ...]]:
    """Divide the files of a folder into those for training and those that are held out by their names.

    A file is held out if its path in the folder has the word ``val``, ``valid`` or ``validation``.

    Raises:
        InputError: no file is for training.
    """
    names = [each.part.path.relative_to(folder).as_posix().lower() for each in files]
    held_out = tuple(each for each, name in zip(files, names, strict=True) if _HELD_OUT.search(name))
    training = tuple(each for each, name in zip(files, names, strict=True) if not _HELD_OUT.search(name))
    if not training:
        raise InputError(f"{one_line(folder)} has only held-out files, by their names; add the training files")
    return training, held_out


def size_of(path: Path) -> int:
    """The size of a plain file in bytes.

    Raises:
        InputError: the file is missing, or is not a plain file.
        UnreadableFileError: the file cannot be examined.
    """
    read_at(path, 0, 0)
    try:
        return path.stat().st_size
    except OSError as error:
        raise UnreadableFileError(path, error) from None


def read_at(path: Path, offset: int, count: int) -> bytes:
    """At most ``count`` bytes of a plain file from a byte offset; fewer at the file's end.

    Raises:
        InputError: the file is missing, or is not a plain file.
        UnreadableFileError: the file cannot be read.
    """

    def read() -> bytes:
        with open_plain(path) as file:
            return os.pread(file.fileno(), count, offset)

    try:
        return retried(read)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise InputError(f"{one_line(path)} is missing; restore it") from None
        raise UnreadableFileError(path, error) from None


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted, without hidden ones.

    Raises:
        UnreadableFileError: the folder cannot be listed.
    """
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except OSError as error:
        raise UnreadableFileError(folder, error) from None
