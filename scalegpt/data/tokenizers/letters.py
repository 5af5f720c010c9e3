"""The characters by which byte-level vocabularies write bytes, as GPT-2's does."""

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

LETTERS = {chr(byte if byte in _PRINTABLE else 0x100 + _OTHERS.index(byte)): byte for byte in range(256)}
"""Letter → byte, in the order of the bytes.

Printable bytes are written as the Latin-1 character of the same number, the others as U+0100 and following. Source: GPT-2's
``bytes_to_unicode``.
"""


def bytes_of(token: str) -> bytes:
    """The bytes that a token's letters stand for; the UTF-8 of the token if one of its characters is no letter."""
    try:
        return bytes(map(LETTERS.__getitem__, token))
    except KeyError:
        return token.encode()
