"""The cache of prepared tokens, and of what was found in others, which several users and processes may share."""

import errno
import hashlib
import json
import logging
import os
import pwd
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scalegpt.config.tokenizer import SIDECAR
from scalegpt.data.leftovers import remove_folder
from scalegpt.data.shards import TokenSet, digest_of, open_tokens
from scalegpt.data.sidecar import read_sidecar, recorded_digests
from scalegpt.data.stored import Part
from scalegpt.data.text.documents import is_prepared
from scalegpt.data.token_file import Progress, Scanned, UnreadableTokensError
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError, NoSpaceError
from scalegpt.storage import PlaceError, disk_errors, read_text, user_path, write_atomic
from scalegpt.text import one_line

_NO_ENTRY = frozenset({errno.ENOENT, errno.ENOTDIR})
LARGE_BYTES = 1 << 30
"""Smaller sets of tokens are read whole at every start."""

_SETTLED_NS = 3 * 10**9
"""A file changed less than this before it was read is not remembered: the clock of its file system may be coarse."""

_CHECKED_LIMIT = 256 << 20
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where prepared tokens are kept: ``$SCALEGPT_CACHE``, else ``~/.cache/scalegpt/data``."""
    chosen = os.environ.get("SCALEGPT_CACHE")
    if chosen:
        return Path(user_path(chosen))
    try:
        return Path.home() / ".cache" / "scalegpt" / "data"
    except RuntimeError as error:
        raise InputError(f"no folder for prepared tokens: {error}; set SCALEGPT_CACHE to a folder") from None


def find_cached(key: str) -> TokenSet | None:
    """The cached tokens with this cache key, after a check of their files' digests; None if the cache has none.

    A damaged entry is removed, and None is returned.

    Raises:
        UnreadableTokensError: the entry cannot be read now; it may be undamaged, so it is kept.
        PlaceError: the entry is damaged and cannot be removed.
    """
    out = cache_folder() / key
    try:
        found = tokens_in(out)
        if found is not None and found.meta.get("key") != key:
            raise something_else(out)
        if found is not None:
            found.check_contents()
    except UnreadableTokensError:
        raise
    except InputError as error:
        _log.warning("the cached tokens are damaged and are made again: %s", error)
        remove_folder(out)
        return None
    return found


def cached_with(digest: str) -> TokenSet | None:
    """The cached tokens whose :attr:`TokenSet.digest` is ``digest``; None if the cache has no undamaged ones.

    Raises:
        UnreadableTokensError: the cache's folder, or the entry with this digest, cannot be read.
    """
    folder = cache_folder()
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnreadableTokensError(folder, error) from None
    for entry in (folder / name for name in sorted(names) if not name.startswith(".")):
        if _recorded_digest(entry) != digest:
            continue
        try:
            tokens = open_tokens(entry)
            tokens.check_contents()
        except UnreadableTokensError:
            raise
        except InputError:  # damaged: find_cached removes the entry when its text is prepared again
            continue
        return tokens
    return None


def _recorded_digest(entry: Path) -> str | None:
    """The digest of a cache entry's tokens, as recorded in its sidecar (``meta.json``); None if that cannot be read."""
    try:
        meta = read_sidecar(entry / SIDECAR)
        recorded = meta["tokenizer"].get("digest")  # opening the tokens compares it
        known = recorded if isinstance(recorded, str) else Tokenizer.from_dict(meta["tokenizer"], entry).digest
        return digest_of(known, recorded_digests(meta))
    except OSError as error:
        if error.errno not in _NO_ENTRY:
            _log.warning("cached tokens %s cannot be read: %s", one_line(entry), error.strerror)
    except InputError:  # damaged
        pass
    return None


@contextmanager
def cache_errors() -> Iterator[None]:
    """Turn the error of an unusable cache into one that names the cache's owner and says how to use another cache.

    Raises:
        NoSpaceError: the cache's disk is full.
        InputError: in place of an :class:`UnreadableTokensError` or a :class:`PlaceError`.
    """
    try:
        yield
    except NoSpaceError as error:
        raise NoSpaceError(f"cache of prepared tokens: {error}; SCALEGPT_CACHE names another folder for it") from None
    except (UnreadableTokensError, PlaceError) as error:
        owner = _owner(error.path)
        whose = "" if owner is None else f" (it belongs to {one_line(owner)})"
        raise InputError(
            f"cache of prepared tokens: {one_line(error.path)} {error.problem}{whose}; get access to it, or set "
            "SCALEGPT_CACHE to a folder of your own"
        ) from None


def tokens_in(out: Path) -> TokenSet | None:
    """Open a folder of prepared tokens; None if the folder is missing or empty.

    Raises:
        UnreadableTokensError: the folder cannot be read.
        InputError: the folder holds something other than prepared tokens, or the tokens are damaged.
    """
    try:
        names = os.listdir(out)  # noqa: PTH208
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        if out.exists():
            raise something_else(out) from None
        return None  # a file is in the place of a parent folder: the later write reports that
    except OSError as error:
        raise UnreadableTokensError(out, error) from None
    if not names:
        return None
    if "train.bin" in names:
        try:
            (out / "train.bin").stat()
        except OSError as error:
            raise UnreadableTokensError(out, error) from None
    if not is_prepared(out):
        raise something_else(out)
    return open_tokens(out)


def something_else(out: Path) -> InputError:
    """The error for an output folder that already holds something other than the wanted tokens."""
    return InputError(f"out {one_line(out)} already holds something else; choose another --out, or remove it first")


def _owner(path: Path) -> str | None:
    """The owner of a path, or of its nearest accessible parent folder, in words; None if this user is the owner."""
    for each in (path, *path.parents):
        try:
            number = each.stat().st_uid
        except OSError:
            continue
        if number == os.geteuid():
            return None
        try:
            return f"user {pwd.getpwuid(number).pw_name}"
        except KeyError:  # this machine knows no user of this number
            return f"user number {number}"
    return None


def checked(tokens: TokenSet, progress: Progress | None = None) -> TokenSet:
    """The tokens, after :meth:`TokenSet.check_contents`; large files that have not changed since are not read again.

    ``checked`` in the cache keeps what reading them whole found. It holds as long as inode, size and times of change are the
    same: the system sets the time of an inode's last change, and no program can set it back.

    Raises:
        InputError: as for :meth:`TokenSet.check_contents`.
    """
    parts = [part for file in tokens.files.values() for part in file.tokens.parts]
    if sum(part.count * part.dtype.itemsize for part in parts) < LARGE_BYTES:
        tokens.check_contents(progress)
        return tokens
    path = cache_folder() / "checked" / f"{hashlib.sha256(os.fsencode(tokens.path.absolute())).hexdigest()}.json"
    known, begun = _read_checked(path), time.time_ns()
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
        _write_checked(path, found_now)
    return tokens


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


def _read_checked(path: Path) -> dict[str, Scanned]:
    """What was remembered; nothing if it is missing or damaged."""
    try:
        return {
            mark: Scanned(str(sha256), int(largest))
            for mark, (sha256, largest) in json.loads(read_text(path, _CHECKED_LIMIT)).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_checked(path: Path, found: dict[str, Scanned]) -> None:
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(found))
    except InputError as error:  # the check itself has succeeded; the next start reads the files again
        _log.warning("that the token files were checked is not remembered: %s", error)
