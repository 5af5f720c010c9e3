"""Standard streams that may be missing or unwritable: a training run continues without them.

All that a run prints is also in its metrics and status files. A run therefore continues if its output is lost: because
the process that reads its pipe ends, its terminal is closed, or its log file is on a full disk.
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
    """Open the null device in place of each standard stream that the caller has closed, as a shell does with ``>&-``.

    If the stream's descriptor stayed free, the next file to be opened would get it, and output would go into that file.
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
    """A text stream whose writes never fail: text that cannot be written is dropped.

    Args:
        stream: the stream to write to.
        fallback: another stream, on which the first failure is reported; None: it is not reported.

    Attributes:
        lost: the reason of the first failure; None if no write has failed.
    """

    def __init__(self, stream: TextIO, fallback: TextIO | None = None) -> None:
        self._stream, self._fallback = stream, fallback
        self.lost: str | None = None

    def write(self, text: str) -> int:
        """Write the text, or drop it if it cannot be written."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Write the buffered text, or drop it if it cannot be written."""
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
        """Redirect the stream's descriptor to the null device, so that buffered text and libraries' output go there too."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        """Get an attribute that this class does not define from the wrapped stream."""
        return getattr(self._stream, name)


def lasting(stream: TextIO, fallback: TextIO | None = None) -> LastingStream:
    """Wrap a stream in a :class:`LastingStream`, unless it already is one."""
    return stream if isinstance(stream, LastingStream) else LastingStream(stream, fallback)


def outlast_standard_streams() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams whose writes never fail.

    Rank 0 reports a lost standard output.
    """
    first = ranks_or_alone().rank == 0
    error = lasting(sys.stderr)
    output = lasting(sys.stdout, cast(TextIO, error) if first else None)
    sys.stderr, sys.stdout = cast(TextIO, error), cast(TextIO, output)


def lost_output() -> str | None:
    """A text that names the standard streams to which a write failed, each with the reason; None if no write failed."""
    streams = {"standard output": sys.stdout, "standard error": sys.stderr}
    # While rich shows a live line, it stands before the streams.
    behind = {name: getattr(each, "rich_proxied_file", each) for name, each in streams.items()}
    lost = [f"{name}: {each.lost}" for name, each in behind.items() if isinstance(each, LastingStream) and each.lost]
    return "; ".join(lost) or None
