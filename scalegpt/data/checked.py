"""Remember what reading large token files whole found, so that the next start does not read a terabyte again.

``$SCALEGPT_CACHE/checked`` has a file for each set of tokens. What it says of a token file holds as long as inode, size and
times of change are the same: the system sets the time of an inode's last change, and no program can set it back.
"""

import hashlib
import json
import logging
import os
import time
from pathlib import Path

from scalegpt.data.cache import cache_folder
from scalegpt.data.shards import TokenSet
from scalegpt.data.stored import Part
from scalegpt.data.token_file import Progress, Scanned, UnreadableTokensError
from scalegpt.errors import InputError
from scalegpt.storage import disk_errors, read_text, write_atomic

LARGE_BYTES = 1 << 30
"""Smaller sets of tokens are read whole at every start."""

_SETTLED_NS = 3 * 10**9
"""A file changed less than this before it was read is not remembered: the clock of its file system may be coarse."""

_LIMIT = 256 << 20
_log = logging.getLogger(__name__)


def check_once(tokens: TokenSet, progress: Progress | None = None) -> None:
    """Check the contents of tokens as :meth:`TokenSet.check_contents` does; do not read large files that have not changed.

    Raises:
        InputError: as for :meth:`TokenSet.check_contents`.
    """
    parts = [part for file in tokens.files.values() for part in file.tokens.parts]
    if sum(part.count * part.dtype.itemsize for part in parts) < LARGE_BYTES:
        tokens.check_contents(progress)
        return
    path = cache_folder() / "checked" / f"{hashlib.sha256(os.fsencode(tokens.path.absolute())).hexdigest()}.json"
    known, begun = _read(path), time.time_ns()
    for file in tokens.files.values():
        found = [known.get(_mark(part)) for part in file.tokens.parts]
        if None not in found:
            file.recall([each for each in found if each is not None])
    tokens.check_contents(progress)
    found_now = {
        _mark(part): each
        for file in tokens.files.values()
        for part, each in zip(file.tokens.parts, file.scanned(), strict=True)
    }
    settled = all(_changed(part) < begun - _SETTLED_NS for part in parts)
    if settled and found_now != known:
        _write(path, found_now)


def _mark(part: Part) -> str:
    """What is the same as long as a part is: where it is, and the state of its file."""
    status = _status(part)
    state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return " ".join(map(str, (*state, part.offset, part.count, part.dtype.str, part.path.absolute())))


def _changed(part: Part) -> int:
    status = _status(part)
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _status(part: Part) -> os.stat_result:
    try:
        return part.path.stat()
    except OSError as error:
        raise UnreadableTokensError(part.path, error) from None


def _read(path: Path) -> dict[str, Scanned]:
    """What was remembered; nothing if it is missing or damaged."""
    try:
        return {
            mark: Scanned(str(sha256), int(largest))
            for mark, (sha256, largest) in json.loads(read_text(path, _LIMIT)).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, found: dict[str, Scanned]) -> None:
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(found))
    except InputError as error:  # the check itself has succeeded; the next start reads the files again
        _log.warning("that the token files were checked is not remembered: %s", error)
