"""Decode the chunks of a file, and report what is wrong with a file that does not decode."""

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from scalegpt.data.text.diagnosis import diagnose, read_at
from scalegpt.data.text.encodings import AUTO, UTF8
from scalegpt.errors import InputError
from scalegpt.text import one_line


class UnusableTextError(InputError):
    """A file that cannot be trained on.

    Attributes:
        reason: the reason in a few words, by which skipped files are counted, such as ``binary`` or ``not utf-8``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> Any:
        """Pickle the error by reason and message, since ranks send each other the errors that they raise."""
        return UnusableTextError, (self.reason, str(self))


class OtherFormError(UnusableTextError):
    """A file that may hold text, in a form that is not read: another format, or records without the field for the text."""


class NotInEncodingError(Exception):
    """Bytes do not decode in an encoding.

    Attributes:
        offset: byte offset of the first invalid byte, or of its chunk if the codec does not report the byte.
        before: in UTF-8, the characters of the chunk that precede the invalid byte; else empty.
    """

    def __init__(self, offset: int, before: str = "") -> None:
        super().__init__(offset)
        self.offset, self.before = offset, before


def decoded(chunks: Iterable[bytes], encoding: str) -> Iterator[str]:
    """Decode the chunks of a file; line ends stay as they are.

    Yields:
        The characters that end in each chunk; the text that ends the file, which is mostly empty.

    Raises:
        NotInEncodingError: the file has bytes that are invalid in the encoding.
        OSError: the file cannot be read.
    """
    decoder = codecs.getincrementaldecoder(encoding)(errors="strict")
    offset = 0
    for chunk in chain(chunks, [b""]):
        # UTF-8's byte order mark is dropped here: the codec utf-8-sig would count byte offsets from after the mark.
        skipped = 3 if offset == 0 and encoding == UTF8 and chunk.startswith(codecs.BOM_UTF8) else 0
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk[skipped:], final=not chunk)
            if encoding != UTF8 and not text.isascii():
                text.encode()  # some codecs make lone surrogates, which no tokenizer can take
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode() if encoding == UTF8 else ""
            raise NotInEncodingError(offset + skipped - pending + error.start, before) from None
        except UnicodeError:
            raise NotInEncodingError(offset) from None
        yield text
        offset += len(chunk)


def encoding_instead(path: Path, asked: str, offset: int, mark: str | None) -> str:
    """Detect the encoding of a file that did not decode.

    Args:
        path: the file.
        asked: the encoding that the user gave, or ``auto``.
        offset: byte offset of the first byte that did not decode.
        mark: the encoding of the file's byte order mark, if the file was read in the mark's encoding. None if it was read in
            the encoding ``asked``, or in UTF-8 because ``asked`` is ``auto``.

    Returns:
        The name of the encoding.

    Raises:
        UnusableTextError: ``asked`` is not ``auto``, or the encoding is not sure; the message says what the file probably is.
    """
    name = f"input {one_line(path)}"
    if mark not in (None, UTF8):
        raise UnusableTextError(
            f"broken {mark}",
            f"{name} has the byte order mark of {mark} and is not {mark}: {_byte_at(path, offset)}; get "
            "an undamaged copy, or convert it to UTF-8",
        )
    if asked not in {AUTO, UTF8}:
        advice = "give its own --encoding, or --encoding auto to detect it"
        raise UnusableTextError(f"not {asked}", f"{name} is not {asked}: {_byte_at(path, offset)}; {advice}")
    found = diagnose(path, offset)
    if found.is_binary:
        raise binary(path)
    if found.is_utf8:
        raise _broken_utf8(path, offset, is_cut=found.is_cut)
    if found.encoding is not None and asked == AUTO:
        return found.encoding
    if found.is_cut:
        advice = (
            f"the file may end inside a character: if so, cut it to its first {offset} bytes, else give its --encoding"
        )
    elif found.encoding is not None:
        known = "ISO-8859-1 (latin-1)" if found.encoding == "latin-1" else found.encoding
        advice = f"it is probably {known}: use --encoding {found.encoding}, or --encoding auto"
    else:
        advice = "its encoding cannot be detected: give its --encoding, or repair the file"
    reason = "not utf-8" if asked == UTF8 else "in an unknown encoding"
    raise UnusableTextError(reason, f"{name} is not UTF-8: {_byte_at(path, offset)}; {advice}")


def unsure(path: Path, encoding: str, offset: int) -> UnusableTextError:
    """The error for a file that decodes neither in UTF-8 nor in the detected encoding."""
    what = f"input {one_line(path)} is neither UTF-8 nor {encoding}: {_byte_at(path, offset)}"
    return UnusableTextError("in an unknown encoding", f"{what}; give its --encoding, or repair the file")


def binary(path: Path) -> UnusableTextError:
    """The error for a file that is not text."""
    return UnusableTextError(
        "binary", f"input {one_line(path)} is binary, not text; name a text file, or give --encoding if it is text"
    )


def _broken_utf8(path: Path, offset: int, *, is_cut: bool) -> UnusableTextError:
    if is_cut:
        what = f"cut inside its last character, at byte offset {offset}"
        advice = f"get an undamaged copy, or keep its first {offset} bytes: head -c {offset} FILE > NEW_FILE"
    else:
        what = f"broken at byte offset {offset} (0x{read_at(path, offset, 1).hex()})"
        advice = "repair it there, or drop what is not UTF-8: iconv -f utf-8 -t utf-8 -c FILE > NEW_FILE"
    return UnusableTextError("broken utf-8", f"input {one_line(path)} is UTF-8, {what}; {advice}")


def _byte_at(path: Path, offset: int) -> str:
    byte = read_at(path, offset, 1)
    return f"byte 0x{byte.hex()} at byte offset {offset}" if byte else f"it ends too early, at byte offset {offset}"
