"""Addresses of fsspec: which files are at one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from scalegpt.errors import InputError
from scalegpt.text import brief, one_line

_ADDRESS = re.compile(r"(?!hf:)[A-Za-z][A-Za-z0-9+.-]*://[^,]+")
_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "checksum",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
"""What file systems of fsspec call the version of a file, the surest first."""


class RemoteFile(NamedTuple):
    """A file at an address.

    Attributes:
        path: its path for the file system.
        size: its size in bytes; None: not known.
        version: what the server tells of its version; empty if it tells nothing.
    """

    path: str
    size: int | None
    version: str


def is_address(text: str) -> bool:
    """Whether an input is an address of fsspec; ``hf://`` names a data set instead."""
    return _ADDRESS.fullmatch(text) is not None


def open_address(address: str, subject: str = "input", **options: Any) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Args:
        address: an address of fsspec.
        subject: what the address is, in errors.
        options: options of the file system, besides those of fsspec's own configuration.

    Raises:
        InputError: a package is missing, or the protocol is unknown.
    """
    try:
        import fsspec
    except ImportError:
        raise InputError(
            f"{subject} {one_line(address)} needs the package fsspec: pip install 'scalegpt[data]', or give a local path"
        ) from None
    try:
        system, path = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:  # the package of the protocol, such as s3fs
        raise InputError(f"{subject} {one_line(address)} needs another package: {brief(error)}") from None
    except ValueError as error:  # an unknown protocol
        raise InputError(f"{subject} {one_line(address)} cannot be read: {brief(error)}; check the address") from None
    return system, str(path).rstrip("/")


def uncached(text: str) -> dict[str, Any]:
    """Options of a file system to which other machines write: no cached listings, and answers of S3 within bounded times."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if text.startswith(("s3://", "s3a://")):
        import fsspec

        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        bounds = {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard", "total_max_attempts": 5}}
        options["config_kwargs"] = {**bounds, **given}
    return options


@contextmanager
def errors_of(address: str) -> Iterator[None]:
    """Turn whatever a file system raises into an error of one line: each has its own classes."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = brief(error) or "no reason is given"
        raise InputError(
            f"input {one_line(address)} cannot be read: {type(error).__name__}: {reason}; check the address and your "
            "access to it"
        ) from None


def list_files(system: Any, path: str) -> tuple[bool, dict[str, RemoteFile]]:
    """Whether a path is a folder, and its files: name in the folder → file. Those that belong to a token file are with it."""
    try:
        info = system.info(path)
    except FileNotFoundError:
        info = None
    if info is not None and info["type"] == "directory":
        found = {each: _file(each, about) for each, about in system.find(path, detail=True).items()}
        return True, {name: file for each, file in found.items() if (name := _name_in(each, path)) is not None}
    folder, _, name = path.rpartition("/")
    files = {} if info is None else {name: _file(path, info)}
    for each in _beside(name, exists=info is not None):
        try:
            files[each] = _file(f"{folder}/{each}", system.info(f"{folder}/{each}"))
        except FileNotFoundError:
            continue
    return False, files


def _beside(name: str, *, exists: bool) -> list[str]:
    """The names of the files that may belong to a token file: of datatrove's, Megatron's, or a prefix of the latter."""
    if not exists:
        return [f"{name}.idx", f"{name}.bin"]
    stem, dot, suffix = name.rpartition(".")
    others = {
        "ds": [f"{name}.{each}" for each in ("index", "metadata", "loss")],
        "bin": [f"{stem}.idx"],
        "idx": [f"{stem}.bin"],
    }
    return others.get(suffix, []) if dot else []


def _name_in(path: str, folder: str) -> str | None:
    """The name of a file in its folder; None for a hidden one.

    Raises:
        InputError: the name leads out of the folder.
    """
    name = path.removeprefix(folder).lstrip("/")
    parts = name.split("/")
    if ".." in parts or "\0" in name:
        raise InputError(f"{one_line(path)} is no name for a file in a folder; rename it")
    return None if not name or any(part.startswith(".") for part in parts) else name


def _file(path: str, info: dict[str, Any]) -> RemoteFile:
    version = next((info[key] for key in _VERSIONS if info.get(key) is not None), "")
    size = info.get("size")
    return RemoteFile(path, size if isinstance(size, int) else None, str(version))
