"""Names of text encodings, and a guess at the one a file is in."""

import codecs
import encodings.aliases
import re
from pathlib import Path
from typing import BinaryIO

from scalegpt.errors import InputError, nearest

AUTO = "auto"
UTF8 = "utf-8"

_BOMS = {
    # UTF-32's little-endian mark begins with UTF-16's: longest first.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: UTF8,
}

_COMMON = (
    "cp1252", "latin_1", "iso8859_15", "cp1250", "iso8859_2", "cp1251", "koi8_r", "koi8_u", "cp1253", "iso8859_7",
    "cp1254", "iso8859_9", "cp1255", "cp1256", "cp1257", "gb18030", "gbk", "gb2312", "big5", "cp932", "shift_jis",
    "euc_jp", "euc_jis_2004", "iso2022_jp", "cp949", "euc_kr", "cp874", "tis_620", "cp866", "cp437", "cp850",
    "mac_roman",
)  # fmt: skip
"""Encodings that files are found in, most usual first. Every byte string is text in dozens of others."""

_MESS_TOLERANCE = 0.1
_SAMPLE_BYTES = 128 * 1024
_CHUNK_BYTES = 1 << 20
_C1 = bytes(range(0x80, 0xA0))
_CONTROL_BYTES = bytes({*range(0x20), 0x7F} - {*b"\t\n\v\f\r\x1b\b"})
_MAX_CONTROL_SHARE = 0.3


def codec_name(encoding: str) -> str:
    """Return one name for all spellings of an encoding: ``latin-1``, ``ISO-8859-1``, ``l1`` are all ``iso8859-1``.

    Raises:
        InputError: Python has no such text encoding.

    """
    if encoding.lower() == AUTO:
        return AUTO
    try:
        codec = codecs.lookup(encoding)
        b"a".decode(encoding)  # a LookupError for codecs that are not of text, such as base64
    except UnicodeError:  # one byte is not a whole UTF-16 character: the codec is of text all the same
        codec = codecs.lookup(encoding)
    except (LookupError, ValueError):
        hint = nearest(encoding, {alias.replace("_", "-") for alias in encodings.aliases.aliases})
        close = hint if "did you mean" in hint else "; use utf-8, latin-1, another of Python's codecs, or auto"
        raise InputError(f"encoding {encoding!r} is not known{close}") from None
    if codec.incrementaldecoder is None:
        raise InputError(f"encoding {encoding!r} cannot be read piece by piece; convert the file to utf-8 first")
    return UTF8 if codec.name == "utf-8-sig" else codec.name


def byte_order_mark(head: bytes) -> str | None:
    """Return the encoding that the first bytes of a file announce, if they do."""
    return next((name for mark, name in _BOMS.items() if head.startswith(mark)), None)


def looks_binary(sample: bytes) -> bool:
    """Say whether bytes are no text in any encoding that keeps ASCII: a NUL, or mostly control characters."""
    if not sample:
        return False
    controls = len(sample) - len(sample.translate(None, _CONTROL_BYTES))
    return b"\0" in sample or controls > _MAX_CONTROL_SHARE * len(sample)


def guess_encoding(path: Path, offset: int) -> str | None:
    """Guess what a file that is not UTF-8 probably is.

    Args:
        path: the file.
        offset: of the first byte that is not UTF-8: the sample is taken there, where the telling bytes are.

    Returns:
        A codec's name, or None where the file looks binary or like nothing known.

    """
    with path.open("rb") as file:
        mark = byte_order_mark(file.read(4))
        if mark not in (None, UTF8):
            return mark
        sample = _sample_around(file, offset)
    if looks_binary(sample):
        return None
    guess = _guess_sample(sample)
    if guess == "latin-1" and _holds_c1(path):
        return "cp1252"  # the rest of the file uses the places that latin-1 leaves to control characters
    return guess


def _sample_around(file: BinaryIO, offset: int) -> bytes:
    """Read up to 128 KiB from the start of the offset's line, so that no multi-byte character is cut in front."""
    reach = min(offset, 4096)
    file.seek(offset - reach)
    sample = file.read(_SAMPLE_BYTES)
    line = sample.rfind(b"\n", 0, reach) + 1
    # A cut at the back may halve the last character, which would speak against the right encoding.
    end = sample.rfind(b"\n") + 1 if len(sample) == _SAMPLE_BYTES else len(sample)
    return sample[line : end if end > reach else None]


def _guess_sample(sample: bytes) -> str | None:
    """Choose charset-normalizer's best match among the encodings in use.

    Its own first choice can be an exotic code page that differs from the right one in one letter (Italian latin-1 reads
    as Vietnamese cp1258, with every ``ì`` spoilt), so that the usual encodings go first wherever they read as cleanly.
    """
    import charset_normalizer

    matches = list(charset_normalizer.from_bytes(sample, steps=10))
    if not matches:
        return None
    cleanest = min(match.chaos for match in matches)
    usual = [m for m in matches if m.encoding in _COMMON and m.chaos <= cleanest + _MESS_TOLERANCE]
    best = min(usual or matches, key=lambda m: (m.chaos, -m.coherence, _rank(m.encoding)))
    if str(best) == sample.decode("latin-1"):
        return "latin-1"  # the name that people know, of several that read these bytes alike
    return best.encoding.replace("_", "-") if re.match("utf|iso", best.encoding) else best.encoding


def _rank(encoding: str) -> int:
    return _COMMON.index(encoding) if encoding in _COMMON else len(_COMMON)


def _holds_c1(path: Path) -> bool:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            if len(chunk.translate(None, _C1)) != len(chunk):
                return True
    return False
