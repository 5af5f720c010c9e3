"""Recognise files in formats other than plain text, by their content or their names."""

import csv
import json
import re
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import PurePath

HEAD_BYTES = 65536
"""Number of bytes from a file's beginning that :func:`recognise` needs."""


class Kind(Enum):
    """How a format holds text.

    Records and markup can be read as text, but would train the model on braces, commas and tags. The text of a container is
    packed and cannot be read here. Other files hold no text.
    """

    RECORDS = "records"
    MARKUP = "markup"
    CONTAINER = "container"
    OTHER = "other"


@dataclass(frozen=True)
class Format:
    """A format that is not plain text.

    Attributes:
        name: the format's name in tallies and messages.
        kind: how the format holds text.
        remedy: advice to the user on how to get plain text, for messages.
    """

    name: str
    kind: Kind
    remedy: str

    @property
    def is_readable(self) -> bool:
        """Whether a model can be trained on a file of this format as it is written, if the user asks for that."""
        return self.kind in {Kind.RECORDS, Kind.MARKUP}


_FIELDS = "write the text of its records to .txt files, one a document"
_UNPACK, _EXPORT = "unpack it first", "write its text to .txt files, one a document"

JSONL = Format("JSON Lines", Kind.RECORDS, _FIELDS)
JSON_RECORDS = Format("JSON array", Kind.RECORDS, _FIELDS)
CSV = Format("CSV", Kind.RECORDS, _FIELDS)
TSV = Format("TSV", Kind.RECORDS, _FIELDS)
JSON = Format("JSON", Kind.MARKUP, _EXPORT)
HTML = Format("HTML", Kind.MARKUP, "write its text without the tags to a .txt file")
XML = Format("XML", Kind.MARKUP, "write its text without the tags to a .txt file")
RTF = Format("RTF", Kind.MARKUP, "save it as plain text")
WARC = Format("WARC", Kind.CONTAINER, _EXPORT)
POINTER = Format("Git LFS pointer", Kind.CONTAINER, "get the file itself: git lfs pull")
PARQUET = Format("Parquet", Kind.CONTAINER, _EXPORT)
ARROW = Format("Arrow", Kind.CONTAINER, _EXPORT)
GZIP = Format("gzip", Kind.CONTAINER, "decompress it first: gzip -d")
ZSTD = Format("Zstandard", Kind.CONTAINER, "decompress it first: zstd -d")
XZ = Format("xz", Kind.CONTAINER, "decompress it first: xz -d")
BZIP2 = Format("bzip2", Kind.CONTAINER, "decompress it first: bzip2 -d")
LZ4 = Format("LZ4", Kind.CONTAINER, "decompress it first: lz4 -d")
BROTLI = Format("Brotli", Kind.CONTAINER, "decompress it first: brotli -d")
ZIP = Format("zip", Kind.CONTAINER, _UNPACK)
TAR = Format("tar", Kind.CONTAINER, _UNPACK)
SEVEN_ZIP = Format("7z", Kind.CONTAINER, _UNPACK)
RAR = Format("RAR", Kind.CONTAINER, _UNPACK)
SQLITE = Format("SQLite", Kind.CONTAINER, _EXPORT)
HDF5 = Format("HDF5", Kind.CONTAINER, _EXPORT)
AVRO = Format("Avro", Kind.CONTAINER, _EXPORT)
ORC = Format("ORC", Kind.CONTAINER, _EXPORT)
TFRECORD = Format("TFRecord", Kind.CONTAINER, _EXPORT)
NUMPY = Format("NumPy array", Kind.CONTAINER, "for tokens, write train.bin and val.bin as nanoGPT does")
PICKLE = Format("pickle", Kind.CONTAINER, _EXPORT)
PDF = Format("PDF", Kind.CONTAINER, "write its text to a .txt file: pdftotext")
OFFICE = Format("office document", Kind.CONTAINER, "save it as plain text")
EPUB = Format("EPUB", Kind.CONTAINER, "save it as plain text")
WEIGHTS = Format("model weights", Kind.OTHER, "name a text file")
IMAGE = Format("image", Kind.OTHER, "name a text file")
SOUND = Format("sound or film", Kind.OTHER, "name a text file")
PROGRAM = Format("program", Kind.OTHER, "name a text file")

PACKED = (GZIP, ZSTD)
"""The formats that are unpacked to read the text or the records in them."""

PACKED_SUFFIXES = frozenset({".gz", ".gzip", ".zst", ".zstd"})
"""The suffixes of their files' names, before which the suffix of the content stands."""

_MAGIC: tuple[tuple[int, bytes, Format], ...] = (
    (0, b"\x1f\x8b", GZIP), (0, b"\x28\xb5\x2f\xfd", ZSTD), (0, b"\xfd7zXZ\0", XZ), (0, b"BZh", BZIP2),
    (0, b"\x04\x22\x4d\x18", LZ4), (0, b"PK\x03\x04", ZIP), (0, b"PK\x05\x06", ZIP), (257, b"ustar", TAR),
    (0, b"7z\xbc\xaf\x27\x1c", SEVEN_ZIP), (0, b"Rar!\x1a\x07", RAR), (0, b"PAR1", PARQUET), (0, b"ARROW1", ARROW),
    (0, b"FEA1", ARROW), (0, b"\xff\xff\xff\xff", ARROW), (0, b"SQLite format 3\0", SQLITE), (0, b"\x89HDF\r\n", HDF5),
    (0, b"Obj\x01", AVRO), (0, b"ORC", ORC), (0, b"\x93NUMPY", NUMPY), (0, b"%PDF-", PDF),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", OFFICE), (0, b"GGUF", WEIGHTS), (0, b"\x89PNG\r\n", IMAGE),
    (0, b"\xff\xd8\xff", IMAGE), (0, b"GIF8", IMAGE), (8, b"WEBP", IMAGE), (0, b"II*\0", IMAGE), (0, b"MM\0*", IMAGE),
    (0, b"\0\0\x01\0", IMAGE), (0, b"OggS", SOUND), (0, b"ID3", SOUND), (0, b"fLaC", SOUND), (8, b"WAVE", SOUND),
    (4, b"ftyp", SOUND), (0, b"\x1aE\xdf\xa3", SOUND), (0, b"\x7fELF", PROGRAM), (0, b"WARC/", WARC),
    (0, b"version https://git-lfs.github.com/spec/", POINTER), (0, b"{\\rtf", RTF),
)  # fmt: skip
_WORDS = frozenset({b"BZh", b"ORC", b"GIF8", b"ID3", b"GGUF", b"WEBP", b"WAVE", b"ftyp", b"PAR1", b"FEA1", b"OggS"})
"""Magic numbers that text may begin with. They count only if the file's first bytes include one that no text has."""

_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_BY_NAME: dict[str, Format] = {
    ".parquet": PARQUET, ".arrow": ARROW, ".feather": ARROW, ".orc": ORC, ".avro": AVRO, ".tfrecord": TFRECORD,
    ".br": BROTLI, ".lzma": XZ, ".npy": NUMPY, ".npz": NUMPY, ".pkl": PICKLE, ".pickle": PICKLE, ".sqlite": SQLITE,
    ".sqlite3": SQLITE, ".h5": HDF5, ".hdf5": HDF5, ".safetensors": WEIGHTS, ".gguf": WEIGHTS, ".csv": CSV, ".tsv": TSV,
    ".html": HTML, ".htm": HTML, ".xhtml": HTML, ".xml": XML, ".rtf": RTF,
}  # fmt: skip
"""Suffix of a file's name → format, for content without a known magic number.

Text in a file that is named as a binary format is a pointer to the file, or an error page.
"""

_IN_ZIP: dict[str, Format] = {
    ".docx": OFFICE, ".xlsx": OFFICE, ".pptx": OFFICE, ".odt": OFFICE, ".ods": OFFICE, ".epub": EPUB, ".npz": NUMPY,
    ".pt": WEIGHTS, ".pth": WEIGHTS, ".bin": WEIGHTS, ".jar": PROGRAM, ".whl": PROGRAM,
}  # fmt: skip
_JSON_NAMES = frozenset({".json", ".jsonl", ".ndjson", ".geojson", ".ipynb", ".jsonlines"})
_OBJECT = re.compile(r'[ \t\r\n]*\{[ \t\r\n]*("(?:[^"\\\n]|\\.){1,200}"[ \t\r\n]*:|\}[ \t\r\n]*\Z)')
_ARRAY_OF_OBJECTS = re.compile(r'\s*\[\s*\{\s*"(?:[^"\\\n]|\\.){1,200}"\s*:')
_HTML_START = re.compile(r"\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html(?:\s[^<>]*)?>)", re.IGNORECASE | re.DOTALL)
_FEWEST_RECORDS, _MOST_RECORDS, _LONGEST_TITLE = 4, 200, 64


def recognise(name: str, head: bytes) -> Format | None:
    """Name the format of a file that is not plain text.

    Args:
        name: the file's name.
        head: the file's first bytes, at most :data:`HEAD_BYTES`.

    Returns:
        The format; None for plain text, program code included, and for bytes in no known format.
    """
    suffix = PurePath(name).suffix.lower()
    for place, mark, found in _MAGIC:
        if head.startswith(mark, place) and (mark not in _WORDS or _is_no_text(head[: place + 64])):
            return _IN_ZIP.get(suffix, found) if found is ZIP else found
    if _PICKLE.match(head):
        return PICKLE
    by_name = _BY_NAME.get(suffix)
    if by_name is not None:
        return by_name
    return _written_format(suffix, _as_text(head), is_whole=len(head) < HEAD_BYTES)


def _is_no_text(start: bytes) -> bool:
    return any(byte < 9 or byte > 126 or 13 < byte < 32 for byte in start)


def _as_text(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return head.decode("utf-16", "ignore")
    return head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")


def _written_format(suffix: str, text: str, *, is_whole: bool) -> Format | None:
    """Recognise XML, HTML, JSON, JSON Lines, CSV and TSV; None for other text."""
    if text.lstrip().startswith("<?xml"):
        return XML
    if _HTML_START.match(text):
        return HTML
    lines = text.splitlines() if is_whole else text.splitlines()[:-1]
    lines = list(islice((line for line in lines if line.strip()), _MOST_RECORDS))
    found = _json_format(suffix, text, lines)
    if found is not None:
        return found
    for delimiter, tabular in ((",", CSV), (";", CSV), ("\t", TSV)):
        if _is_table(lines, delimiter):
            return tabular
    return None


def _json_format(suffix: str, text: str, lines: list[str]) -> Format | None:
    named = suffix in _JSON_NAMES
    if suffix in {".jsonl", ".ndjson", ".jsonlines"}:
        return JSONL
    # A file with a few broken lines is one too, so that they are reported and not trained on.
    if len(lines) > 1 and _is_record(lines[0]) and 2 * sum(map(_is_record, lines)) >= len(lines):
        return JSONL
    if _ARRAY_OF_OBJECTS.match(text):
        return JSON_RECORDS
    if named or _OBJECT.match(text):
        # A single line, in a file not named as JSON, is taken for one record of JSON Lines.
        return JSON if named or "\n" in text.strip() else JSONL
    return None


def _is_record(line: str) -> bool:
    if not line.lstrip().startswith(("{", "[")):
        return False
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_table(lines: list[str], delimiter: str) -> bool:
    """Whether lines are a table: distinct titles, then rows with as many fields as titles; no field begins with a blank."""
    if len(lines) < _FEWEST_RECORDS or delimiter not in lines[0]:
        return False
    try:
        rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    titles = rows[0]
    if len(set(titles)) < len(titles) or not all(0 < len(title) <= _LONGEST_TITLE for title in titles):
        return False
    rows = rows[:-1] if len(rows) > _FEWEST_RECORDS else rows  # the last row may be cut
    return all(len(row) == len(titles) and not any(cell[:1].isspace() for cell in row) for row in rows)
