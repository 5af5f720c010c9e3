"""The formats of other programs' token files, and which of them a path holds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scalegpt.config.tokenizer import SIDECAR
from scalegpt.data.foreign import datatrove, llmc, megatron
from scalegpt.data.foreign.found import Found
from scalegpt.data.sidecar import FIRST_FILES


@dataclass(frozen=True)
class Format:
    """A format of token files.

    Attributes:
        name: the program's name.
        is_ours: whether a path, which need not exist, holds files of this format; it reads at most a few bytes of some files.
        find: what the path holds; it raises an :class:`~scalegpt.errors.InputError` for malformed files.
    """

    name: str
    is_ours: Callable[[Path], bool]
    find: Callable[[Path], Found]


FORMATS = tuple(Format(each.NAME, each.is_ours, each.find) for each in (megatron, llmc, datatrove))


def recognise(path: Path) -> Format | None:
    """The format of the token files at a path, by their content; None if no format of another program is there."""
    try:
        if (path / SIDECAR).is_file() and any((path / name).is_file() for name in FIRST_FILES):
            return None  # ScaleGPT's own folder
        return next((each for each in FORMATS if each.is_ours(path)), None)
    except (OSError, ValueError):  # the path is closed to this user, or cannot be a path
        return None
