"""Diagnose a file that does not decode as UTF-8, from the whole file."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from scalegpt.data.text.encodings import UTF8, byte_order_mark, looks_binary
from scalegpt.data.text.guessing import guess
from scalegpt.data.tokenizers import code_points

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 65536
_WINDOWS, _WINDOW_BYTES, _SAMPLE_BYTES = 32, 65536, 16384
_C1 = bytes(range(0x80, 0xA0))
_LOWEST_TRAIL = 0x30
"""The lowest byte that any multi-byte encoding has inside a character, after its first byte."""

_SURELY_UTF8 = 8
"""A file with this many multi-byte UTF-8 characters before its first error is UTF-8: that does not arise by chance."""

_SELDOM = 20
"""In text of a single-byte encoding, fewer than 1 in this many bytes above 127 form UTF-8 characters by chance."""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a file that should be UTF-8.

    Attributes:
        is_binary: whether the file is not text.
        is_utf8: whether the file is damaged UTF-8, as valid multi-byte characters or a byte order mark show.
        is_cut: whether the file may end inside a UTF-8 character.
        encoding: the file's actual encoding; None if that is not sure.
    """

    is_binary: bool = False
    is_utf8: bool = False
    is_cut: bool = False
    encoding: str | None = None


def diagnose(path: Path, offset: int) -> Diagnosis:
    """Diagnose a file whose first invalid UTF-8 byte is at byte offset ``offset``.

    Raises:
        OSError: the file cannot be read.
    """
    mark, is_binary = _beginning(path, offset)
    if mark == UTF8:
        return Diagnosis(is_utf8=True, is_cut=_ends_inside(path, offset))
    if mark is not None:
        return Diagnosis(encoding=mark)
    if is_binary:
        return Diagnosis(is_binary=True)
    before, after, stray = _utf8_characters(path, offset)
    if _ends_inside(path, offset):
        return Diagnosis(is_utf8=before > 0, is_cut=True)
    if before + after >= stray or before >= _SURELY_UTF8:
        return Diagnosis(is_utf8=True)
    like_utf8 = before > 0 or _SELDOM * after > stray
    encoding = guess(_sample(path, offset), like_utf8=like_utf8)
    if encoding == "latin-1" and _holds_c1(path):
        encoding = "cp1252"  # the file has bytes that latin-1 reserves for control characters
    return Diagnosis(is_utf8=encoding is None and before > 0, encoding=encoding)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Read at most ``size`` bytes of a file from a byte offset."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _beginning(path: Path, offset: int) -> tuple[str | None, bool]:
    """The encoding of the file's byte order mark, if any, and whether its first bytes or those at the offset look binary."""
    head, there = read_at(path, 0, _HEAD_BYTES), read_at(path, max(0, offset - 4096), _HEAD_BYTES)
    return byte_order_mark(head[:4]), looks_binary(head) or looks_binary(there)


def _ends_inside(path: Path, offset: int) -> bool:
    """Whether the file's bytes from the offset on are exactly the beginning of one UTF-8 character."""
    rest = read_at(path, offset, 4)
    decoder = codecs.getincrementaldecoder(UTF8)()
    try:
        text = decoder.decode(rest)
    except UnicodeDecodeError:
        return False
    return not text and len(rest) < 4


def _utf8_characters(path: Path, offset: int) -> tuple[int, int, int]:
    """Count multi-byte UTF-8 characters before and after an offset, and the bytes above 127 that are in no such character."""
    before, stray_before = _count(_chunks(path, 0, offset))
    after, stray = _count(_chunks(path, offset, None))
    assert not stray_before
    return before, after, stray


def _count(chunks: Iterator[bytes]) -> tuple[int, int]:
    decoder = codecs.getincrementaldecoder(UTF8)("surrogateescape")
    whole = stray = 0
    for chunk in chain(chunks, [b""]):
        points = code_points(decoder.decode(chunk, final=not chunk))
        points = points[points >= 0x80]
        escaped = int(np.count_nonzero((points >= 0xDC80) & (points <= 0xDCFF)))
        whole, stray = whole + len(points) - escaped, stray + escaped
    return whole, stray


def _chunks(path: Path, first: int, end: int | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(first)
        while chunk := file.read(_CHUNK_BYTES if end is None else min(_CHUNK_BYTES, end - file.tell())):
            yield chunk


def _sample(path: Path, offset: int) -> bytes:
    """Sample lines with bytes above 127, around the offset and all over the file, none cut inside a character."""
    size = path.stat().st_size
    windows = min(_WINDOWS, -(-size // _WINDOW_BYTES))
    places = [number * size // windows for number in range(windows + 1)]
    spans = [(first, min(_WINDOW_BYTES, end - first)) for first, end in pairwise(places)]
    if size > windows * _WINDOW_BYTES:  # the spans leave gaps
        spans.append((max(0, offset - 4096), 2 * 4096))
    lines: list[bytes] = []
    for first, length in spans:
        window = read_at(path, first, length)
        inside = _whole_characters(window, is_first=not first, is_last=first + length >= size)
        lines += _some_lines(inside, _SAMPLE_BYTES // windows)
    # No line was found: the file is one long line of multi-byte characters.
    return b"\n".join(lines or [read_at(path, 0, _SAMPLE_BYTES)])


def _whole_characters(window: bytes, *, is_first: bool, is_last: bool) -> bytes:
    """Trim bytes of cut characters from the ends of a window (a byte range of the file), except at the file's ends."""
    places = [place for place, byte in enumerate(window) if byte < _LOWEST_TRAIL]
    if not places:
        return window if is_first and is_last else b""
    return window[0 if is_first else places[0] : len(window) if is_last else places[-1]]


def _some_lines(window: bytes, most: int) -> Iterator[bytes]:
    """Yield a window's (byte range's) first lines that have bytes above 127, at most ``most`` bytes in all."""
    size = 0
    for line in window.split(b"\n"):
        if line.isascii():
            continue
        if len(line) > most - size:
            end = next((place for place in range(most - size, 0, -1) if line[place] < _LOWEST_TRAIL), 0)
            if not line[:end].isascii():
                yield line[:end]
            return
        yield line
        size += len(line)


def _holds_c1(path: Path) -> bool:
    return any(len(chunk.translate(None, _C1)) != len(chunk) for chunk in _chunks(path, 0, None))
