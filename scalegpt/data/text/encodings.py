"""Names of text encodings; byte order marks; and whether bytes look binary."""

import codecs
import encodings.aliases

from scalegpt.errors import InputError, nearest

AUTO = "auto"
UTF8 = "utf-8"

_BOMS = {
    # UTF-32's little-endian mark begins with UTF-16's, so the longer marks come first.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: UTF8,
}

_CONTROL_BYTES = bytes({*range(0x20), 0x7F} - {*b"\t\n\v\f\r\x1b\b"})
_MAX_CONTROL_SHARE = 0.3


def codec_name(encoding: str) -> str:
    """The canonical name of an encoding, such as ``iso8859-1`` for ``latin-1``, ``ISO-8859-1`` and ``l1``.

    Raises:
        InputError: Python has no such text encoding, or cannot decode it piece by piece.
    """
    if encoding.lower() == AUTO:
        return AUTO
    try:
        codec = codecs.lookup(encoding)
        b"a".decode(encoding)  # a LookupError for codecs that are not of text, such as base64
    except UnicodeError:  # one byte is not a whole UTF-16 character, but the codec is of text
        codec = codecs.lookup(encoding)
    except (LookupError, ValueError):
        hint = nearest(encoding, {alias.replace("_", "-") for alias in encodings.aliases.aliases})
        close = hint if "did you mean" in hint else "; use utf-8, latin-1, another of Python's codecs, or auto"
        raise InputError(f"encoding {encoding!r} is not known{close}") from None
    if codec.incrementaldecoder is None:
        raise InputError(f"encoding {encoding!r} cannot be read piece by piece; convert the file to utf-8 first")
    return UTF8 if codec.name == "utf-8-sig" else codec.name


def byte_order_mark(head: bytes) -> str | None:
    """The encoding of the byte order mark at the beginning of ``head``; None without a mark."""
    return next((name for mark, name in _BOMS.items() if head.startswith(mark)), None)


def looks_binary(sample: bytes) -> bool:
    """Whether bytes are no text in any encoding that includes ASCII: a NUL, or over 30 % control characters."""
    if not sample:
        return False
    controls = len(sample) - len(sample.translate(None, _CONTROL_BYTES))
    return b"\0" in sample or controls > _MAX_CONTROL_SHARE * len(sample)
