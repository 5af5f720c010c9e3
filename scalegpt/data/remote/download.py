"""Download the files at an address into the cache.

``$SCALEGPT_CACHE/remote`` has a folder for each address, with the files, and with ``.files.json``: what the server said of a
file's version when it was downloaded. A file whose size and version are the same is not downloaded again; one of which the
server says neither always is. An interrupted download continues where it stopped, if the server says which version it was of.
Nothing is removed but files that are no longer at the address.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from scalegpt.data.cache import cache_folder
from scalegpt.data.remote.listing import RemoteFile, errors_of, is_address, list_files, open_address
from scalegpt.data.token_file import Progress
from scalegpt.errors import InputError
from scalegpt.storage import check_space, disk_errors, read_text, sync_file, write_atomic
from scalegpt.text import one_line

_BLOCK_BYTES = 8 << 20
_LISTING = ".files.json"
_log = logging.getLogger(__name__)
_known: dict[tuple[str, Path], Path] = {}


def local_path(text: str, progress: Progress | None = None) -> Path:
    """The path of an input: of an address, the path of its copy in the cache, which is made or brought up to date first.

    A process looks at an address once.

    Args:
        text: a path or an address: of a file, a folder, or a prefix of Megatron's.
        progress: called with the bytes downloaded so far and in all.

    Raises:
        InputError: the address cannot be read, a package is missing, or the cache cannot be written.
    """
    if not is_address(text):
        return Path(text)
    key = (text, cache_folder())
    if key not in _known:
        _known[key] = _download(text, progress)
    return _known[key]


def forget() -> None:
    """Look at every address again when it is used next."""
    _known.clear()


def _download(address: str, progress: Progress | None) -> Path:
    with errors_of(address):
        system, path = open_address(address)
        is_folder, files = list_files(system, path)
    if not files:
        raise InputError(f"input {one_line(address)} does not exist or is empty; check the address")
    name = PurePosixPath(path).name or "files"
    entry = cache_folder() / "remote" / hashlib.sha256(address.encode()).hexdigest()[:32]
    target = entry / name if is_folder else entry
    with disk_errors(entry):
        target.mkdir(parents=True, exist_ok=True)
    with _locked(entry):
        listing = _read_listing(entry / _LISTING)
        wanted = {each: file for each, file in files.items() if not _is_there(target / each, file, listing.get(each))}
        total = sum(file.size or 0 for file in wanted.values())
        if wanted:
            check_space(entry, total)
            _log.warning(
                "downloading %d files, %.1f MB, of %s into the cache", len(wanted), total / 1e6, one_line(address)
            )
        done = 0
        for each, file in wanted.items():
            before = done

            def report(count: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + count, max(total, before + count))

            done += _fetch(address, system, file, target / each, report)
            listing[each] = file.version
            with disk_errors(entry):
                write_atomic(entry / _LISTING, json.dumps(listing))
        if is_folder:
            _remove_others(target, files.keys())
    return target if is_folder else target / name


def _is_there(path: Path, file: RemoteFile, version: str | None) -> bool:
    """Whether a file was downloaded before and has not changed at its address since."""
    try:
        size = path.stat().st_size
    except OSError:
        return False
    is_known = file.version != "" or file.size is not None
    return is_known and version == file.version and file.size in {None, size}


def _fetch(address: str, system: Any, file: RemoteFile, target: Path, report: Callable[[int], None]) -> int:
    """Download a file, or the rest of it; ``report`` is called with its bytes so far. Returns its size."""
    mark = hashlib.sha256(f"{file.version} {file.size}".encode()).hexdigest()[:16]
    partial = target.with_name(f".{target.name}.{mark}.part")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f".{target.name}.*.part"):
            if old != partial or file.size is None or not file.version:  # it may be the beginning of another content
                old.unlink()
        out = partial.open("ab")
    with out, errors_of(address), system.open(file.path, "rb") as source:
        count = out.tell()
        if count:
            source.seek(count)
        while block := source.read(_BLOCK_BYTES):
            with disk_errors(target):
                out.write(block)
            count += len(block)
            report(count)
        with disk_errors(target):
            sync_file(out)
    if file.size is not None and count != file.size:
        partial.unlink()
        raise InputError(
            f"input {one_line(address)}: {one_line(file.path)} gave {count:,} bytes, where its size is {file.size:,}; run "
            "the command again"
        )
    with disk_errors(target):
        partial.replace(target)
    return count


@contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Hold the lock of a folder in the cache; wait while another process downloads into it."""
    with disk_errors(entry):
        descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("%s cannot be locked (%s); start one process at a time", one_line(entry), error.strerror)
        yield
    finally:
        os.close(descriptor)


def _read_listing(path: Path) -> dict[str, str]:
    """The versions of the files that were downloaded; empty if the listing is missing or damaged: they are fetched again."""
    try:
        listed = json.loads(read_text(path))
    except (OSError, ValueError):
        return {}
    return {str(name): str(version) for name, version in listed.items()} if isinstance(listed, dict) else {}


def _remove_others(folder: Path, names: Any) -> None:
    """Remove files of a folder that are no longer at its address."""
    with disk_errors(folder):
        for path in folder.rglob("*"):
            if path.is_file() and path.relative_to(folder).as_posix() not in names:
                path.unlink()
