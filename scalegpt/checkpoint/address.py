"""Folders and objects at an address such as ``s3://bucket/runs/tiny``, as places of checkpoints.

An object store has neither folders nor renames. An object appears whole or not at all, and replaces another of its name at
once. A checkpoint is therefore committed by its manifest, which is written last and deleted first
(:mod:`scalegpt.checkpoint.store`).

fsspec's file systems raise errors of many kinds. All become an ``OSError`` here, so that callers treat a store as they treat
a disk: ENOENT, EACCES, and EIO for what may be transient, which :meth:`Address.persistently` tries again. Any other error is
final (EREMOTEIO).
"""

import errno
import io
import posixpath
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from scalegpt.data.remote.listing import is_address, open_address, uncached
from scalegpt.errors import InputError
from scalegpt.storage import retried, sync_file
from scalegpt.text import brief, one_line

Result = TypeVar("Result")

WAITS = (1.0, 4.0, 15.0, 40.0)
"""Seconds before each further attempt after an error of a store; fsspec has tried the request several times by then."""

PART_BYTES, MOST_PARTS = 16 << 20, 9_000
"""The size of the parts in which an object is written and read, and the most parts of one object (S3 allows 10,000)."""

ADVICE = "check the bucket, your credentials and rights to write, read, list and delete there, and the network"
"""What a user can do about an address that cannot be used."""

_LOCAL = re.compile(r"(?:file|local)://(?=/)")
_LIKE_AN_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?:/|$)")
_WEB = ("http://", "https://")
_OF_ONE_PROCESS = "memory://"
_FINAL = frozenset({
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "NoRegionError",
    "InvalidRegionError", "ParamValidationError", "DefaultCredentialsError", "ClientAuthenticationError",
})  # fmt: skip
"""Classes of errors of botocore, google-auth and azure-identity that another attempt does not change."""


@dataclass(frozen=True)
class Address:
    """A folder or an object at an address of fsspec, with the part of ``Path`` that checkpoints use.

    Each method tries again after errors that may be transient, unless it says otherwise.

    Attributes:
        text: the address, without a slash at its end.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Address":
        return Address(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return posixpath.basename(self.text)

    @property
    def parent(self) -> "Address":
        """The address without its last part."""
        return Address(posixpath.dirname(self.text))

    def with_name(self, name: str) -> "Address":
        """The address with another last part."""
        return self.parent / name

    def absolute(self) -> "Address":
        """The address itself."""
        return self

    def persistently(self, work: Callable[[], Result]) -> Result:
        """Call ``work`` until it succeeds, at most five times, with growing waits between errors that may be transient."""
        return retried(work, WAITS)

    # --- what is there -----------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is an object, or a folder with objects, at the address."""
        return self.persistently(lambda: self._info() is not None)

    def is_file(self) -> bool:
        """Whether there is an object at the address."""
        return self.size() is not None

    def size(self) -> int | None:
        """The object's size in bytes; None if there is no object."""
        info = self.persistently(self._info)
        return None if info is None or info["type"] == "directory" else int(info["size"])

    def _info(self) -> dict[str, Any] | None:
        with self._errors() as (system, path):
            try:
                found: dict[str, Any] = system.info(path)
            except FileNotFoundError:
                return None
        return found

    def objects(self) -> dict[str, int]:
        """The objects in a folder and below it: path below the folder → size in bytes; empty if there is none."""

        def find() -> dict[str, int]:
            with self._errors() as (system, path):
                try:
                    found = system.find(path, detail=True)
                except FileNotFoundError:
                    return {}
            below = {name.removeprefix(path).lstrip("/"): int(info["size"] or 0) for name, info in found.items()}
            return {name: size for name, size in below.items() if name}

        return self.persistently(find)

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` of the object; fewer where it ends earlier.

        Raises:
            OSError: the object is missing or cannot be read.
        """

        def read() -> bytes:
            with self._errors() as (system, path):
                return bytes(system.cat_file(path, start=start, end=end))

        return self.persistently(read)

    def read_whole(self, limit: int) -> bytes:
        """The whole object, or its first ``limit`` bytes.

        Raises:
            FileNotFoundError: there is no object.
            OSError: it cannot be read.
        """
        size = self.size()
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", self.text)
        return self.read(0, min(size, limit)) if size else b""

    def parts(self, size: int) -> Iterator[bytes]:
        """The first ``size`` bytes of the object, in parts of :data:`PART_BYTES`."""
        return (self.read(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES))

    # --- writing and deleting ----------------------------------------------------------------------------------------

    def write(self, content: bytes) -> None:
        """Write a whole small object, in place of another of its name.

        Raises:
            OSError: it cannot be written.
        """
        self.persistently(lambda: self.try_writing(content))

    def try_writing(self, content: bytes) -> None:
        """Do what :meth:`write` does, in one attempt."""
        with self._errors() as (system, path):
            system.pipe_file(path, content)

    @contextmanager
    def writing(self, size: int) -> Iterator[BinaryIO]:
        """A file whose content becomes the object when the block ends, and is uploaded in parts meanwhile; one attempt.

        After an error in the block there is no object, or an earlier one of the name is unchanged.

        Args:
            size: the number of bytes to come, from which the size of the parts follows.

        Raises:
            OSError: the object cannot be written. A missing object is EIO: a store that has completed an upload, but whose
                answer was lost, no longer knows the upload when it is asked again.
        """
        part = max(PART_BYTES, -(-size // (MOST_PARTS << 20)) << 20)
        with self._errors(missing=errno.EIO) as (system, path):
            file = system.open(path, "wb", block_size=part)
        try:
            yield _Translating(file, self)  # type: ignore[misc]
            with self._errors(missing=errno.EIO):
                file.close()
        except BaseException:
            file.closed = True  # else its deletion would complete the upload
            with suppress(Exception):  # what remains is deleted with the other leftovers
                file.discard()
            raise

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete the object.

        Raises:
            FileNotFoundError: there is none, and ``missing_ok`` is false.
        """

        def delete() -> None:
            with self._errors() as (system, path):
                try:
                    system.rm_file(path)
                except FileNotFoundError:
                    if not missing_ok:
                        raise

        self.persistently(delete)

    def copy_to(self, other: "Address") -> None:
        """Copy the object inside the store, without downloading it."""

        def copy() -> None:
            with self._errors() as (system, path):
                system.cp_file(path, other._path(system))

        self.persistently(copy)

    def abort_uploads(self) -> None:
        """Drop the parts of unfinished uploads below the address, which S3 keeps and charges for until someone drops them."""

        def abort() -> None:
            with self._errors() as (system, path):
                if not hasattr(system, "call_s3"):
                    return
                bucket, prefix, _ = system.split_path(path)
                for upload in system.list_multipart_uploads(bucket):
                    if upload["Key"].startswith(f"{prefix}/"):
                        place = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                        with suppress(FileNotFoundError):
                            system.call_s3("abort_multipart_upload", **place)

        self.persistently(abort)

    # --- how -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _errors(self, missing: int = errno.ENOENT) -> Iterator[tuple[Any, str]]:
        """The file system and the path in it; turns the errors of the block into ``OSError``."""
        try:
            system, path = open_address(self.text, "checkpoint_dir", **uncached(self.text))
            yield system, path
        except InputError:
            raise
        except Exception as error:
            raise OSError(_number(error, missing), _reason(error), self.text) from error

    def _path(self, system: Any) -> str:
        return str(system._strip_protocol(self.text))


Place = Path | Address
"""A folder or a file on a disk or at an address."""


class _Translating(io.RawIOBase):
    """A file that is being uploaded, whose errors are translated."""

    def __init__(self, file: Any, address: Address) -> None:
        self._file, self._address = file, address

    def write(self, content: Any) -> int:
        with self._address._errors(missing=errno.EIO):
            return int(self._file.write(content))


def place_of(text: str) -> Place:
    """The place that a text means: an address of fsspec, or a path. ``file:///PATH`` is a path.

    Raises:
        InputError: the address is one that other processes cannot see, or lacks a part, such as ``s3://``.
    """
    if text.startswith(_OF_ONE_PROCESS):
        raise InputError(f"{text} is the memory of one process; give an address such as s3://BUCKET/FOLDER, or a path")
    if _LOCAL.match(text):
        return Path(_LOCAL.sub("", text))
    address = text.rstrip("/")
    if is_address(address):
        return Address(address)
    if _LIKE_AN_ADDRESS.match(text):
        raise InputError(
            f"{one_line(text)} is not an address of checkpoints; give one such as s3://BUCKET/FOLDER, without a comma, or "
            "a folder"
        )
    return Path(text)


def try_out(address: Address) -> None:
    """Write, read and delete a small object, in one attempt each, to find out whether checkpoints can be kept at an address.

    Raises:
        InputError: the address cannot be used; the message says why, and what to do.
    """
    if address.text.startswith(_WEB):
        raise InputError(
            f"checkpoint_dir {address} is a web address, to which no checkpoint can be written; give one such as "
            "s3://BUCKET/FOLDER, with the server in AWS_ENDPOINT_URL if it is not Amazon's, or a folder"
        )
    probe, content = address / f".probe-{secrets.token_hex(8)}", b"scalegpt"
    try:
        with address._errors():  # so that an error of the protocol or its package names the address, not the probe
            probe.try_writing(content)
        if probe.read_whole(len(content) + 1) != content:
            raise OSError(errno.EREMOTEIO, "an object has another content than was written")
        probe.unlink()
    except OSError as error:
        raise InputError(f"checkpoint_dir {address} cannot be used: {error.strerror}; {ADVICE}") from None


def retried_at(place: Place, work: Callable[[], Result]) -> Result:
    """Call ``work``, which reads or writes at a place, again after an error that may be transient."""
    return retried(work, WAITS if isinstance(place, Address) else None)


@contextmanager
def new_file(path: Place, size: int) -> Iterator[BinaryIO]:
    """A new file of ``size`` bytes to be written, on the disk or at an address when the block ends.

    Raises:
        OSError: it cannot be written; or a file of this name is on the disk already.
    """
    if isinstance(path, Address):
        with path.writing(size) as file:
            yield file
        return
    with path.open("xb") as file:
        yield file
        sync_file(file)


def _number(error: Exception, missing: int) -> int:
    """The error number for what a file system raised."""
    if isinstance(error, FileNotFoundError):
        return missing
    if isinstance(error, PermissionError):
        return errno.EACCES
    is_final = isinstance(error, ValueError | TypeError | NotImplementedError) or type(error).__name__ in _FINAL
    return errno.EREMOTEIO if is_final else errno.EIO


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error)
    return brief(said) or type(error).__name__
