"""Files of text and records, random and damaged: each is read exactly as other readers read it, or refused in one line.

python tests/fuzz/records.py --cases 10000 --seed 1
python tests/fuzz/records.py --only 1234 --seed 1      # one case again, with its traceback
"""

import argparse
import csv
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare
from scalegpt.data.text.corpus import survey
from scalegpt.data.text.reading import read_documents
from scalegpt.errors import InputError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    pa = pq = None
try:
    import zstandard
except ImportError:
    zstandard = None

SECONDS, MEMORY = 20, 6 << 30
"""Limits for a case, and for the process."""

PIECES = [
    "a",
    "word ",
    "two words",
    "\n",
    "\r\n",
    "é",
    "😀",
    "\u2028",
    '"',
    "\\",
    ",",
    ";",
    "\t",
    "{",
    "}",
    "[",
    "]",
    " ",
    "\0",
    "\x0b",
]


@dataclass
class Form:
    """A form of data.

    Attributes:
        name: name of a file of that form.
        write: makes a file's content of the documents.
        read: another reader, which gives a file's documents, with an error of any kind where it is damaged.
    """

    name: str
    write: Callable[[random.Random, list[str]], bytes]
    read: Callable[[bytes], list[str]]


def text_of(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("no text")
    value.encode()
    return value


def json_lines(rng: random.Random, texts: list[str]) -> bytes:
    end = rng.choice(["\n", "\r\n", "\n\n"])
    plain = rng.random() < 0.5
    return "".join(json.dumps({"n": 1, "text": text}, ensure_ascii=plain) + end for text in texts).encode()


def read_json_lines(content: bytes) -> list[str]:
    lines = content.removeprefix(b"\xef\xbb\xbf").decode().split("\n")
    return [text_of(json.loads(line)["text"]) for line in lines if line.strip()]


def json_array(rng: random.Random, texts: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in texts], indent=rng.choice([None, 1])).encode()


def read_json_array(content: bytes) -> list[str]:
    return [text_of(record["text"]) for record in json.loads(content.removeprefix(b"\xef\xbb\xbf").decode())]


def table(rng: random.Random, texts: list[str]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(
        stream, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), lineterminator=rng.choice(["\n", "\r\n"])
    )
    writer.writerows([("text", "n"), *((text.replace("\0", ""), 1) for text in texts)])
    return stream.getvalue().encode()


def read_table(content: bytes) -> list[str]:
    text = content.removeprefix(b"\xef\xbb\xbf").decode()
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    if any(len(row) != len(header) for row in rows):
        raise ValueError("a row of another length")
    return [row[header.index("text")] for row in rows]


def arrow_table(texts: list[str]) -> Any:
    return pa.table({"n": list(range(len(texts))), "text": texts})


def parquet(rng: random.Random, texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        arrow_table(texts), sink, row_group_size=rng.choice([2, 1000]), use_dictionary=rng.random() < 0.5,
        compression=rng.choice(["none", "snappy", "zstd"]), write_page_checksum=rng.random() < 0.5,
    )  # fmt: skip
    return sink.getvalue()


def arrow(rng: random.Random, texts: list[str]) -> bytes:
    sink, data = io.BytesIO(), arrow_table(texts)
    make = rng.choice([pa.ipc.new_file, pa.ipc.new_stream])
    with make(
        sink, data.schema, options=pa.ipc.IpcWriteOptions(compression=rng.choice([None, "lz4", "zstd"]))
    ) as writer:
        writer.write_table(data, max_chunksize=rng.choice([2, 1000]))
    return sink.getvalue()


def packed(inner: Form, pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes], suffix: str) -> Form:
    def read(content: bytes) -> list[str]:
        """Bytes without the beginning of the packing are taken as they are, whatever the name."""
        return inner.read(unpack(content) if content[:2] in {b"\x1f\x8b", b"\x28\xb5"} else content)

    return Form(inner.name + suffix, lambda rng, texts: pack(inner.write(rng, texts)), read)


def zstd_unpacked(content: bytes) -> bytes:
    reader = pa.CompressedInputStream(pa.BufferReader(content), "zstd")  # another program than the one that is tested
    return reader.read()


def forms() -> list[Form]:
    lines, rows = Form("d.jsonl", json_lines, read_json_lines), Form("d.csv", table, read_table)
    plain = Form("d.txt", lambda _, texts: "".join(texts).replace("\0", "").encode(), read_plain)
    found = [
        lines, lines, rows, rows, plain, Form("d.json", json_array, read_json_array),
        packed(lines, gzip.compress, gzip.decompress, ".gz"), packed(plain, gzip.compress, gzip.decompress, ".gz"),
    ]  # fmt: skip
    if pa is not None:
        # Where pyarrow itself reads a damaged file, what it reads counts; files without checksums may be changed unseen.
        found += [Form("d.parquet", parquet, read_parquet), Form("d.arrow", arrow, read_arrow)]
        if zstandard is not None:
            found.append(packed(lines, zstandard.compress, zstd_unpacked, ".zst"))
    return found


def read_plain(content: bytes) -> list[str]:
    if b"\0" in content:
        raise ValueError("binary")
    return [content.removeprefix(b"\xef\xbb\xbf").decode()]


def read_parquet(content: bytes) -> list[str]:
    data = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True).read(columns=["text"])
    data.validate(full=True)
    return list(map(text_of, data.column("text").to_pylist()))


def read_arrow(content: bytes) -> list[str]:
    make = pa.ipc.open_stream if content.startswith(b"\xff" * 4) else pa.ipc.open_file
    column = make(io.BytesIO(content)).schema.get_field_index("text")
    data = make(io.BytesIO(content), options=pa.ipc.IpcReadOptions(included_fields=[column])).read_all()
    data.validate(full=True)
    return list(map(text_of, data.column("text").to_pylist()))


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The content with one to three random changes."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            del changed[place : place + rng.randint(1, 20)]
        elif kind == 2:
            changed[place:place] = rng.choice(
                [rng.randbytes(rng.randint(1, 9)), b"\0", b"\xff", b'"', b"\n", b"{", b",", b"\\ud800"]
            )
        elif kind == 3 and place < len(changed):
            changed[place] = rng.randrange(256)
        elif kind == 4:
            first = rng.randrange(len(changed) + 1)
            changed[place:place] = changed[first : first + rng.randint(1, 60)]
        elif place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def faults(seed: int, number: int, folder: Path) -> list[str]:
    """What is wrong with how a case is handled; its files are made in an empty folder."""
    rng = random.Random(f"{seed}:{number}")
    form = rng.choice(forms())
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 12))) for _ in range(rng.randint(1, 30))]
    content = form.write(rng, texts)
    is_whole = rng.random() < 0.1
    content = content if is_whole else damaged(rng, content)
    path = folder / form.name
    path.write_bytes(content)
    try:
        expected = [text for text in form.read(content) if text]
    except Exception:  # the other reader refuses it
        expected = []
    try:
        sources = survey([path], "utf-8", text_field=None if path.suffix == ".txt" else "text").sources
        found = ["".join(parts) for source in sources for parts in documents_of(source)]
    except InputError as error:
        is_missed = is_whole and expected and not path.name.startswith("d.txt")  # plain text may look like JSON or CSV
        return refusal_faults(str(error), path) + (["whole, and refused"] if is_missed else [])
    if path.suffix in {".parquet", ".arrow"} and found == [text for text in texts if text]:
        expected = found  # the other reader may stumble over parts of the file that hold no text
    wrong = ["read otherwise"] if found != expected else []
    if number % 4 == 0:
        wrong += preparation_faults(path, folder / "out", expected)
    return wrong


def documents_of(source: Any) -> list[list[str]]:
    documents: list[list[str]] = [[]]
    for piece in read_documents(source):
        documents[-1].append(piece.text)
        if piece.ends:
            documents.append([])
    assert documents.pop() == []
    return documents


def refusal_faults(message: str, path: Path) -> list[str]:
    found = []
    if "\n" in message or not message.isprintable():
        found.append("the message has several lines, or signs that cannot be printed")
    if len(message) > 700:
        found.append("a long message")
    if path.name not in message:
        found.append("the message does not name the file")
    return found


def preparation_faults(path: Path, out: Path, expected: list[str]) -> list[str]:
    """Whether the tokens are the bytes of the documents, or nothing at all is left."""
    try:
        made = prepare([path], out, DataConfig(tokenizer="byte", text_field=None if path.suffix == ".txt" else "text"))
    except InputError as error:
        left = [each.name for each in out.parent.iterdir() if each != path]
        return refusal_faults(str(error), path) + ([f"{left} is left"] if left else [])
    ids = Counter([*made.train[:].tolist(), *made.val[:].tolist()])
    ends = ids.pop(256)
    is_right = ids == Counter("".join(expected).encode()) and ends >= len(expected)
    return [] if is_right else ["wrong tokens"]


def run_one(seed: int, number: int, scratch: Path) -> list[str]:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    signal.alarm(SECONDS)
    try:
        return faults(seed, number, folder)
    finally:
        signal.alarm(0)
        shutil.rmtree(folder)


def run_some(seed: int, numbers: list[int], scratch: Path) -> list[tuple[int, str]]:
    """Run cases in a child process; where it dies, its case has a fault and another child goes on."""
    bad: list[tuple[int, str]] = []
    left = list(numbers)
    while left:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(write_end, "w") as answers:
                for number in left:
                    try:
                        said = "; ".join(run_one(seed, number, scratch))
                    except BaseException as error:
                        said = f"{type(error).__name__}: {error}"
                    answers.write(json.dumps([number, said]) + "\n")
                    answers.flush()
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as answers:
            for line in answers:
                number, said = json.loads(line)
                left.remove(number)
                if said:
                    bad.append((number, said))
        status = os.waitpid(child, 0)[1]
        if status:
            bad.append((left.pop(0), f"the process died, status {status}"))
    return bad


def main() -> int:
    """Run the cases; 1 where some have faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this case alone, in this process")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    scratch = Path(tempfile.mkdtemp(prefix="scalegpt-records-"))
    try:
        if arguments.only is not None:
            print(run_one(arguments.seed, arguments.only, scratch))
            return 0
        numbers = list(range(arguments.first, arguments.first + arguments.cases))
        bad = run_some(arguments.seed, numbers, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for number, said in bad:
        print(f"case {number}: {said}")
    print(f"{len(numbers)} cases, {len(bad)} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
