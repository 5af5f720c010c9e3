"""Compares the speed of ``scalegpt data prepare`` with that of tiktoken's own batch encoding of the same documents.

python benchmarks/prepare_speed.py book.txt src/                          (from the repository's root; 200 MB, files of text)
python benchmarks/prepare_speed.py book.txt --mb 50 --form jsonl --repeats 1
python benchmarks/prepare_speed.py book.txt --kinds                       (times of unusual text against prose)

The text of the given files is repeated, and cut into documents of 1 to 100 thousand characters. Both run in turn, each in a
process of its own, with as many threads as there are usable cores. The time of the preparation is that of all its work:
reading twice, hashing, encoding, writing and syncing. tiktoken's is that of ``encode_ordinary_batch`` alone, with all
documents in memory before. The memory is the largest sum over all processes (PSS where the system gives it, else RSS).
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least

FORMS = ("files", "one_file", "jsonl", "jsonl.gz")
THEIRS = """
import json, sys, time
from pathlib import Path
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.system.cores import usable_cores
texts = [json.loads(line) for line in Path(sys.argv[1]).open()]
encoding = make_tokenizer("gpt2")._encoding
start, cpu = time.perf_counter(), time.process_time()
ids = encoding.encode_ordinary_batch(texts, num_threads=usable_cores())
took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
print(json.dumps({**took, "tokens": sum(map(len, ids))}))
"""
OURS = """
import json, sys, time
from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare
start, cpu = time.perf_counter(), time.process_time()
tokens = prepare([sys.argv[1]], sys.argv[2], DataConfig(**json.loads(sys.argv[3])))
took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
print(json.dumps({**took, "tokens": len(tokens.train) + len(tokens.val)}))
"""


def main() -> None:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "input", nargs="+", type=Path, help="text files, and folders whose .py, .md, .rst and .txt are taken"
    )
    parser.add_argument("--mb", type=at_least(1), default=200, help="size of the corpus in MB [200]")
    parser.add_argument("--form", choices=FORMS, default="files", help="how the corpus is stored [files]")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="measurements of each, in turn [3]")
    parser.add_argument("--kinds", action="store_true", help="measure unusual text in place of the corpus")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    text = "".join(read_texts(arguments.input))
    figures = kinds_of_text(text) if arguments.kinds else compare(text, arguments.mb, arguments.form, arguments.repeats)
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:<28} {value:,.3f}" if isinstance(value, float) else f"{name:<28} {value}")


def read_texts(inputs: list[Path]) -> Iterator[str]:
    """The texts of files and of the files in folders that are UTF-8."""
    for given in inputs:
        files = [given] if given.is_file() else sorted(path for path in given.rglob("*") if path.is_file())
        for path in files:
            if path == given or path.suffix in {".py", ".md", ".rst", ".txt"}:
                try:
                    yield path.read_text(encoding="utf-8").replace("\0", "")
                except UnicodeDecodeError:
                    continue


def documents(text: str, size: int) -> Iterator[str]:
    """Documents of 1 to 100 thousand characters, ``size`` bytes in all, cut from the repeated text at ever other places."""
    draw, place = random.Random(1), 0
    while size > 0:
        length = int(10 ** draw.uniform(3, 5))
        document = text[place : place + length]
        place = (place + length) % len(text) if len(document) == length else draw.randrange(len(text))
        size -= len(document.encode())
        yield document


def store(texts: list[str], form: str, folder: Path) -> Path:
    """Write the documents in a form; return the path to prepare."""
    if form == "files":
        for number, text in enumerate(texts):
            path = folder / "texts" / f"{number // 1000:04}" / f"{number:08}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
        return folder / "texts"
    path = folder / f"texts.{'txt' if form == 'one_file' else form}"
    if form == "one_file":
        path.write_text("".join(texts), encoding="utf-8", newline="")
        return path
    lines = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(lines, 6) if form == "jsonl.gz" else lines)
    return path


def compare(text: str, megabytes: int, form: str, repeats: int) -> dict[str, Any]:
    """Measure both in turn; the speeds are those of the fastest run of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = list(documents(text, megabytes * 10**6))
        size = sum(len(each.encode()) for each in texts)
        source = store(texts, form, folder)
        in_memory = folder / "documents.json"
        batch = ["".join(texts)] if form == "one_file" else texts
        in_memory.write_text("".join(json.dumps(each) + "\n" for each in batch), encoding="utf-8")
        count = len(batch)
        del texts, batch
        ours, theirs = [], []
        for number in range(repeats):
            theirs.append(measured([THEIRS, str(in_memory)]))
            ours.append(measured([OURS, str(source), str(folder / f"out{number}"), json.dumps({"val_fraction": 0.01})]))
    best = {"ours": min(each["seconds"] for each in ours), "theirs": min(each["seconds"] for each in theirs)}
    cpu = {"ours": min(each["cpu_seconds"] for each in ours), "theirs": min(each["cpu_seconds"] for each in theirs)}
    return {
        "form": form,
        "documents": count,
        "megabytes": size / 1e6,
        "tokens": ours[0]["tokens"],
        "ours, MB/s": size / 1e6 / best["ours"],
        "tiktoken's batch, MB/s": size / 1e6 / best["theirs"],
        "ours / tiktoken's": best["theirs"] / best["ours"],
        "the same by CPU time": cpu["theirs"] / cpu["ours"],
        "all ours, s": [round(each["seconds"], 2) for each in ours],
        "all tiktoken's, s": [round(each["seconds"], 2) for each in theirs],
        "our memory, MiB": max(each["memory"] for each in ours) / 2**20,
        "tiktoken's memory, MiB": max(each["memory"] for each in theirs) / 2**20,
    }


def measured(words: list[str]) -> dict[str, Any]:
    """Run a Python program that prints JSON; add the largest memory of its processes, in bytes."""
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen([sys.executable, "-c", *words], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        peak, over = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, over))
        watcher.start()
        shown, _ = process.communicate()
        over.set()
        watcher.join()
    if process.returncode:
        sys.exit(process.returncode)
    return {**json.loads(shown), "memory": peak[0]}


def _watch(pid: int, peak: list[int], over: threading.Event) -> None:
    while not over.wait(0.02):
        try:
            first = psutil.Process(pid)
            processes = [first, *first.children(recursive=True)]
            peak[0] = max(peak[0], sum(_memory(process) for process in processes))
        except psutil.Error:
            continue


def _memory(process: psutil.Process) -> int:
    found = process.memory_full_info()
    return int(getattr(found, "pss", found.rss))


def kinds_of_text(text: str) -> dict[str, Any]:
    """The time of a megabyte of unusual text over that of as many bytes of prose, for reading and encoding on one core."""
    size = 10**6
    letters = random.Random(1).choices("acgt", k=size)
    kinds: dict[str, Callable[[], str]] = {
        "prose": lambda: (text * (1 + size // len(text)))[:size],
        "one letter": lambda: "a" * size,
        "one sign": lambda: "=" * size,
        "spaces": lambda: " " * size,
        "spaces before a word": lambda: " " * size + "word",
        "newlines": lambda: "\n" * size,
        "no spaces": lambda: "".join(letters),
        "no spaces, prose": lambda: "".join((text * (1 + 2 * size // len(text))).split())[:size],
        "digits": lambda: "0123456789" * (size // 10),
        "emoji": lambda: "\N{GRINNING FACE}" * (size // 4),
        "mixed emoji": lambda: "".join(chr(0x1F600 + number % 80) for number in range(size // 4)),
        "NULs": lambda: "\0" * size,
        "lone surrogates": lambda: "\ud83d" * (size // 3),
        "special tokens": lambda: "<|endoftext|>" * (size // 13),
        "combining accents": lambda: "a" + "\N{COMBINING ACUTE ACCENT}" * (size // 2),
        "Chinese": lambda: "天地玄黃宇宙洪荒" * (size // 24),
        "apostrophes": lambda: "'" * size,
        "CRLF": lambda: "\r\n" * (size // 2),
    }  # fmt: skip
    seconds = {name: _fastest(make()) for name, make in kinds.items()}
    return {name: value / seconds["prose"] for name, value in seconds.items()} | {"prose, s": seconds["prose"]}


def _fastest(text: str) -> float:
    from scalegpt.data.preparation.batches import Batch, Position, Segment
    from scalegpt.data.preparation.encoding import BatchEncoder
    from scalegpt.data.text.reading import _cut as cut
    from scalegpt.data.tokenizers import make_tokenizer

    encoder = BatchEncoder(make_tokenizer("gpt2"), marks=True)
    times = []
    for _ in range(3):
        start = time.thread_time()  # of the processor, so that other processes do not count
        for piece in cut([(text, 0)]):
            encoder.encode(Batch([Segment(piece.text, "", ends=True, is_held_out=False)], Position()))
        times.append(time.thread_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
