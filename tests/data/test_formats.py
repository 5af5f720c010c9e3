"""Files that hold something else than plain text are named, by their content and by their names."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from scalegpt.data.text import formats
from scalegpt.data.text.corpus import survey
from scalegpt.data.text.formats import HEAD_BYTES, PACKED, recognise
from scalegpt.data.text.records.table import READERS
from scalegpt.errors import InputError

RECORDS = [{"text": f"number {number}, and so on", "label": number} for number in range(20)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ROWS = ("text,label\n" + "".join(f'"number {n}, and so on",{n}\n' for n in range(20))).encode()
PAGE = b"<!DOCTYPE html>\n<html><body><p>text</p></body></html>\n"


def zipped(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "text")
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.arange(10))
    return stream.getvalue()


def table() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table documents (text)")
    return connection.serialize()


FORMATS = [
    ("d.jsonl", LINES, "JSON Lines"),
    ("d.txt", LINES, "JSON Lines"),
    ("d.txt", "\ufeff".encode() + LINES, "JSON Lines"),
    ("d.txt", LINES.decode().encode("utf-16"), "JSON Lines"),
    ("d.jsonl", b'["a list", "of words"]\n', "JSON Lines"),
    ("d.json", json.dumps(RECORDS).encode(), "JSON array"),
    ("d.txt", json.dumps(RECORDS, indent=1).encode(), "JSON array"),
    ("d.json", b'{"a": 1}', "JSON"),
    ("d.json", b'a": 1}, {"b": 2}]', "JSON"),
    ("d.ipynb", b'{\n "cells": []\n}', "JSON"),
    ("d.csv", ROWS, "CSV"),
    ("d.txt", ROWS, "CSV"),
    ("d.txt", ROWS.replace(b",", b";").replace(b"; and", b", and"), "CSV"),
    ("d.csv", b"one line", "CSV"),
    ("d.tsv", b"a\tb\n", "TSV"),
    ("d.txt", b"text\tlabel\n" + b"some words\t1\n" * 9, "TSV"),
    ("d.html", b"anything", "HTML"),
    ("d.txt", PAGE, "HTML"),
    ("d", b"<!-- note -->\n<HTML lang=en>", "HTML"),
    ("d.xml", b"<a/>", "XML"),
    ("d.txt", b'<?xml version="1.0"?><mediawiki/>', "XML"),
    ("d.rtf", rb"{\rtf1\ansi text}", "RTF"),
    ("d.parquet", b"PAR1\x15\x04\x15\x80", "Parquet"),
    ("d", b"PAR1\x15\x04\x15\x80", "Parquet"),
    ("d.parquet", b"not found", "Parquet"),
    ("d.arrow", b"\xff\xff\xff\xff\x10\x02\0\0", "Arrow"),
    ("d.feather", b"ARROW1\0\0", "Arrow"),
    ("d.txt.gz", gzip.compress(LINES, mtime=0), "gzip"),
    ("d.txt", gzip.compress(LINES, mtime=0), "gzip"),
    ("d.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x58", "Zstandard"),
    ("d.xz", lzma.compress(LINES), "xz"),
    ("d.bz2", bz2.compress(LINES), "bzip2"),
    ("d.txt.br", b"\x1b\x2f\x00\xf8", "Brotli"),
    ("d.zip", zipped("a.txt"), "zip"),
    ("d.docx", zipped("word/document.xml"), "office document"),
    ("d.epub", zipped("mimetype"), "EPUB"),
    ("d.tar", tarred(), "tar"),
    ("d.db", table(), "SQLite"),
    ("d.npy", array(), "NumPy array"),
    ("d.pkl", pickle.dumps(RECORDS), "pickle"),
    ("d.pkl", pickle.dumps(RECORDS, 0), "pickle"),
    ("d.bin", pickle.dumps(RECORDS), "pickle"),
    ("d.pdf", b"%PDF-1.7\nstream", "PDF"),
    ("d.txt", b"%PDF-1.7\nstream", "PDF"),
    ("d.warc", b"WARC/1.0\r\nWARC-Type: warcinfo\r\n", "WARC"),
    ("d.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    ("d.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "image"),
    ("d.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "image"),
    ("d.safetensors", b"\x10\0\0\0\0\0\0\0{}", "model weights"),
    ("d.mp4", b"\0\0\0 ftypisom\0\0", "sound or film"),
    ("d", b"\x7fELF\x02\x01\x01\0", "program"),
]


@pytest.mark.parametrize(("name", "content", "found"), FORMATS, ids=[f"{name}-{found}" for name, _, found in FORMATS])
def test_formats_are_named(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    known = recognise(name, content)
    assert known is not None
    assert known.name == found
    if known.name in READERS or known in PACKED:
        return
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is (binary \()?{found}") as caught:
        survey([path], "auto")
    assert "\n" not in str(caught.value)
    assert ("--as_text true" in str(caught.value)) == known.is_readable


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"To be, or not to be: that is the question.\n" * 50),
        ("a.txt", b"Tomorrow, and tomorrow, and tomorrow.\n" * 50),
        ("a.txt", b"Name\tof a heading\n\nA paragraph\twith a tab.\nAnother.\n\tIndented.\n"),
        ("a.py", b"import json\n\nVALUES = {\n    'a': 1,\n}\nprint(json.dumps(VALUES))\n"),
        ("a.py", b"a, b = f(x, y)\nc, d = f(y, z)\ne, f = f(z, x)\ng, h = f(z, z)\nprint(a, b)\n"),
        ("a.c", b"int a,b;\nint c,d;\nint e,f;\nint main(void) { return 0; }\n"),
        ("a.md", b"# Title\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"),
        ("a.yaml", b"a: 1\nb: [1, 2]\n"),
        ("a.toml", b"[project]\nname = 'x'\n[tool]\nx = [1, 2]\n"),
        ("a.tex", b"\\documentclass{article}\n\\begin{document}\nText\n\\end{document}\n"),
        ("a.txt", b"[1] a note\n[2] another note\n[3] a third\n"),
        ("a.txt", b"ID3 is a tag, GIF89 a format, ORC a monster, BZh a mark.\n"),
        ("a.gz", b"plain text that somebody called so\n"),
        ("a.txt", b"<html is mentioned here, and that is all\n"),
        ("a.txt", b"Ein Satz; noch einer; und ein dritter.\n" * 9),
        ("a.txt", b"{} is the empty set, they say\n"),
        ("a.txt", b"a"),
        ("a.txt", b"\n\n"),
    ],
)
def test_text_and_code_are_neither(tmp_path: Path, name: str, content: bytes) -> None:
    assert recognise(name, content) is None
    path = tmp_path / name
    path.write_bytes(content)
    assert survey([path], "utf-8").bytes == len(content)


def test_a_record_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    line = json.dumps({"text": "word " * HEAD_BYTES}) + "\n"
    assert recognise("d.txt", (line * 3).encode()[:HEAD_BYTES]) is formats.JSONL


def test_on_request_records_and_markup_are_read_as_they_are(tmp_path: Path) -> None:
    for name, content in (("d.jsonl", LINES), ("d.csv", ROWS), ("d.html", PAGE), ("d.gz", gzip.compress(LINES))):
        (tmp_path / name).write_bytes(content)
        (source,) = survey([tmp_path / name], "utf-8", as_text=True).sources
        assert (source.bytes, source.documents, source.form) == (len(content), 1, None)
    (tmp_path / "d.zip").write_bytes(zipped("a.txt"))
    with pytest.raises(InputError, match="is zip"):
        survey([tmp_path / "d.zip"], "utf-8", as_text=True)


def test_a_folder_of_code_goes_on_without_its_small_data(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print('hello')\n" * 40)
    (tmp_path / "package.json").write_text(json.dumps({"name": "x" * 900}))
    (tmp_path / "data.csv").write_bytes(b"a,b\n1,2\n")
    (tmp_path / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0" + bytes(99_999))
    found = survey([tmp_path], "utf-8")
    assert [source.name for source in found.sources] == ["main.py", "package.json"]
    assert str(found.skipped) == "1 CSV without a field text or content (data.csv), 1 image (logo.png)"
    found = survey([tmp_path], "utf-8", as_text=True)
    assert [source.name for source in found.sources] == ["data.csv", "main.py", "package.json"]
    assert str(found.read_as_written) == "1 CSV (data.csv)"


OTHER_ROWS = b"name,label\n" + b"some words,7\n" * 20


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (
            {"train.jsonl": b'{"body": "some words"}\n' * 20},
            r"1 JSON Lines without a field text or content \(train\.jsonl\)",
        ),
        ({"a.csv": OTHER_ROWS, "b.csv": OTHER_ROWS}, r"2 CSV without a field text or content \(such as a\.csv\)"),
        ({"a.json": json.dumps(RECORDS).replace("text", "body").encode()}, r"1 JSON array without .* \(a\.json\)"),
        ({"data/0.parquet.gz": gzip.compress(b"PAR1" + bytes(range(256)) * 9)}, "1 Parquet in gzip"),
        ({"a.zip": zipped("a.txt") * 9}, "1 zip"),
        ({"1.html": PAGE * 20, "2.html": PAGE * 20}, "2 HTML"),
        ({"book.pdf": b"%PDF-1.7\n" + b"x" * 5000}, "1 PDF"),
    ],
)
def test_a_folder_that_is_mostly_unread_is_refused(tmp_path: Path, files: dict[str, bytes], named: str) -> None:
    (tmp_path / "README.md").write_text("What this is.\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        InputError, match=rf"most of folder .* is not plain text and is not read: .*{named}.*--as_text true"
    ):
        survey([tmp_path], "utf-8")
    readable = [name for name in files if name.endswith(("jsonl", "csv", "json", "html"))]
    found = survey([tmp_path], "utf-8", as_text=True)
    assert [source.name for source in found.sources] == sorted(["README.md", *readable])


def test_a_folder_that_is_mostly_records_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("What this is.\n")
    (tmp_path / "train.jsonl").write_bytes(LINES)
    (tmp_path / "more.csv").write_bytes(ROWS)
    (tmp_path / "some.jsonl.gz").write_bytes(gzip.compress(LINES))
    found = survey([tmp_path], "utf-8")
    assert [(source.name, source.documents) for source in found.sources] == [
        ("README.md", 1), ("more.csv", 20), ("some.jsonl.gz", 20), ("train.jsonl", 20),
    ]  # fmt: skip
    assert not found.read_as_written.counts


def test_a_packed_form_that_is_not_read_is_named(tmp_path: Path) -> None:
    for name, content, what in (
        ("a.tar.gz", tarred(), "tar in gzip, not plain text; unpack it first"),
        ("a.txt.gz", gzip.compress(b"text"), "gzip in gzip, not plain text"),
        ("a.html.gz", PAGE, "HTML, not plain text; write its text without the tags to a .txt file, or use --as_text"),
        ("a.gz", b"\0\1\2", "binary, not text"),
        ("a.csv.gz", b"a,b\n1,2\n", "CSV without a field text or content"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(InputError, match=what):
            survey([tmp_path / name], "utf-8")
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b\x08 cut")
    for given in (tmp_path / "a.txt.gz", tmp_path):
        with pytest.raises(InputError, match=r"a\.txt\.gz is damaged gzip: .* \(in a folder: --exclude\)"):
            survey([given], "utf-8")


def test_a_mixed_folder_says_what_it_skips(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 2000)
    (tmp_path / "b.zip").write_bytes(zipped("b"))
    (tmp_path / "c.npy").write_bytes(array())
    found = survey([tmp_path], "utf-8")
    assert str(found.skipped) == "1 NumPy array (c.npy), 1 zip (b.zip)"
