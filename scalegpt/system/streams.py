"""Standard streams that may be missing, closed or full: a training run continues without them.

What a run prints is also in its metrics and its status. So a reader of a pipe that ends, a terminal that is closed, or a log
file on a full disk must not end it.
"""

import contextlib
import errno
import os
import sys
from typing import Any, TextIO, cast

from scalegpt.system.ranks import ranks_or_alone

_NAMES = ("stdin", "stdout", "stderr")
_NOBODY_READS = frozenset({errno.EPIPE, errno.EBADF})


def open_missing() -> None:
    """Open the null device in the place of standard streams that the caller has closed (``>&-``).

    Without it the next file that is opened gets that descriptor, and the output of libraries goes into that file.
    """
    for descriptor, name in enumerate(_NAMES):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            stream = os.fdopen(descriptor, "r" if descriptor == 0 else "w", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


class LastingStream:
    """A text stream whose writes never fail; what cannot be written is dropped.

    Args:
        stream: to write to.
        fallback: where the first failure is reported; None: nowhere.

    Attributes:
        lost: why the first failed write failed; None: none has failed.
    """

    def __init__(self, stream: TextIO, fallback: TextIO | None = None) -> None:
        self._stream, self._fallback = stream, fallback
        self.lost: str | None = None

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, if that is possible."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno in _NOBODY_READS or (error.errno == errno.EIO and self._stream.isatty()):
            self._silence()
        if self.lost is None:
            self.lost = error.strerror or str(error)
            if self._fallback is not None:
                with contextlib.suppress(OSError):
                    self._fallback.write(
                        f"scalegpt train: standard output cannot be written ({self.lost}); training continues without it\n"
                    )
                    self._fallback.flush()

    def _silence(self) -> None:
        """Send further output, buffers and other libraries' output included, to the null device."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of the stream."""
        return getattr(self._stream, name)


def lasting(stream: TextIO, fallback: TextIO | None = None) -> LastingStream:
    """The stream as a :class:`LastingStream`; itself where it is one already."""
    return stream if isinstance(stream, LastingStream) else LastingStream(stream, fallback)


def outlast_standard_streams() -> None:
    """Make the writes of this process to standard output and error never fail, those of other libraries included."""
    first = ranks_or_alone().rank == 0
    error = lasting(sys.stderr)
    output = lasting(sys.stdout, cast(TextIO, error) if first else None)
    sys.stderr, sys.stdout = cast(TextIO, error), cast(TextIO, output)


def lost_output() -> str | None:
    """The standard streams that could not be written, and why; None: all could."""
    streams = {"standard output": sys.stdout, "standard error": sys.stderr}
    lost = [f"{name}: {each.lost}" for name, each in streams.items() if isinstance(each, LastingStream) and each.lost]
    return "; ".join(lost) or None
