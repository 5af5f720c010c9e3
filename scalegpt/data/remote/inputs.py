"""The paths of all inputs: also of standard input, of data sets of the Hugging Face hub, and of what is at addresses."""

import atexit
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalegpt.data.leftovers import make_unfinished, remove_abandoned
from scalegpt.data.remote.download import local_path
from scalegpt.errors import InputError
from scalegpt.storage import disk_errors
from scalegpt.text import brief, one_line

STANDARD_INPUT, HUB = "-", "hf://"
_CHUNK_BYTES = 1 << 20
_spooled: Path | None = None


def as_paths(inputs: Sequence[str | Path], beside: Path) -> list[Path]:
    """The paths of the inputs' files.

    Standard input (``-``) is copied into a temporary file, which is deleted when the process ends. Data sets are downloaded,
    or found in the cache of the package ``datasets``; what is at other addresses, in the cache of prepared tokens.

    Args:
        inputs: paths, ``-``, and addresses such as ``hf://OWNER/NAME/CONFIG:SPLIT`` and ``s3://BUCKET/FOLDER``.
        beside: the folder beside which the temporary file is made.

    Raises:
        InputError: standard input or an address cannot be read.
    """
    paths: list[Path] = []
    for given in inputs:
        text = str(given)
        if text == STANDARD_INPUT:
            paths.append(_spool(beside))
        elif text.startswith(HUB):
            paths += _files_of_data_set(text)
        else:
            paths.append(local_path(text))
    return paths


def _spool(beside: Path) -> Path:
    """Copy standard input into a file, once in a process."""
    global _spooled
    if _spooled is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("standard input is no pipe or file; pipe text into it, or name a file")
        with disk_errors(beside):
            remove_abandoned(beside)
            folder, lock = make_unfinished(beside.absolute())
            atexit.register(_remove, folder, lock)
            with (folder / "standard input").open("wb") as file:
                for chunk in _chunks_of_standard_input():
                    file.write(chunk)
        _spooled = folder / "standard input"
    return _spooled


def is_standard_input(path: Path) -> bool:
    """Whether the path is that of the temporary copy of standard input."""
    return path == _spooled


def name_of(path: Path) -> str:
    """The path of an input's file, as messages and manifests name it: ``standard input`` for the copy of that."""
    return path.name if is_standard_input(path) else str(path)


@contextmanager
def naming_standard_input() -> Iterator[None]:
    """Name standard input, instead of its temporary copy, in the errors of the block."""
    try:
        yield
    except InputError as error:
        if _spooled is None or one_line(_spooled) not in str(error):
            raise
        said = str(error).replace(f"input {one_line(_spooled)}", _spooled.name)
        raise InputError(said.replace(one_line(_spooled), _spooled.name)) from None


def _chunks_of_standard_input() -> Iterator[bytes]:
    while True:
        try:
            chunk = sys.stdin.buffer.read(_CHUNK_BYTES)
        except OSError as error:
            raise InputError(f"standard input cannot be read: {error.strerror or brief(error)}") from None
        if not chunk:
            return
        yield chunk


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def parse_address(address: str) -> tuple[str, str | None, str]:
    """The parts of the address of a data set.

    Args:
        address: ``hf://[datasets/]OWNER/NAME[/CONFIG][:SPLIT]``, or ``hf://`` and the path of a local folder, which begins
            with a dot or a slash.

    Returns:
        The data set's name or the path, its configuration, and the split, ``train`` if none is given.

    Raises:
        InputError: the address is none.
    """
    body, colon, split = address.removeprefix(HUB).partition(":")
    if body.startswith((".", "/")):
        name, config = body, ""
    else:
        owner, _, rest = body.removeprefix("datasets/").partition("/")
        title, _, config = rest.partition("/")
        name = f"{owner}/{title}"
        if not owner or not title:
            name = owner + title
    if not name or (colon and not split.isidentifier()) or config.endswith("/"):
        raise InputError(
            f"{one_line(address)} is no address of a data set; write hf://OWNER/NAME, hf://OWNER/NAME/CONFIG or "
            "hf://OWNER/NAME/CONFIG:SPLIT"
        )
    return name, config or None, split or "train"


def _files_of_data_set(address: str) -> list[Path]:
    """The Arrow files of a split of a data set."""
    name, config, split = parse_address(address)
    try:
        import datasets  # imported here, since it is an extra
    except ImportError:
        raise InputError(f"{one_line(address)} needs a package: pip install 'scalegpt[datasets]'") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every attempt to reach the hub
    try:
        found: Any = datasets.load_dataset(name, config, split=split)
        files = [Path(each["filename"]) for each in found.cache_files]
    except Exception as error:  # the package raises errors of many kinds
        raise InputError(
            f"{one_line(address)} cannot be loaded: {brief(error)}; check the name and the network"
        ) from None
    if not files:
        raise InputError(f"{one_line(address)} has no records")
    return files
