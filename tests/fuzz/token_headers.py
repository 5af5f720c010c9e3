"""Fuzzes the readers of token files: ``python tests/fuzz/token_headers.py --cases 10000 --seed 1``.

Each case damages the headers, indices or names of token files at random. They must be refused in one line, or be read as a
plain reader of the format reads them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]
from scalegpt.config import DataConfig  # noqa: E402
from scalegpt.data.foreign.given import open_given  # noqa: E402
from scalegpt.data.prepare import prepare  # noqa: E402
from scalegpt.errors import InputError  # noqa: E402
from token_files import MEGATRON_CODES, write_datatrove, write_llmc, write_megatron  # noqa: E402

SETTINGS = DataConfig(tokenizer="byte")
DOCUMENTS = [[*range(number, number + 3 + number % 4), 256] for number in range(1, 30)]
EDGES = (0, 1, 2, 7, 8, 255, 256, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
_TYPES = {code: np.dtype(name).newbyteorder("<") for name, code in MEGATRON_CODES.items() if "float" not in name}


class UnreadableError(Exception):
    """The plain reader does not read the files either."""


# --- the files, and plain readers of them ------------------------------------------------------------------------------


def make_ours(folder: Path) -> Path:
    return _prepare(folder, SETTINGS)


def make_sharded(folder: Path) -> Path:
    """Three files of training tokens and one of held-out ones."""
    return _prepare(folder, SETTINGS.changed(shard_tokens=1000))


def _prepare(folder: Path, settings: DataConfig) -> Path:
    """The tokens replace the text in the folder."""
    (folder / "text.txt").write_text("0123456789" * 300)
    tokens = prepare([folder / "text.txt"], folder / "tokens", settings).path
    for each in tokens.iterdir():
        each.rename(folder / each.name)
    (folder / "text.txt").unlink()
    tokens.rmdir()
    return folder


def read_ours(path: Path) -> list[int]:
    """The files that the sidecar lists; without a sidecar or a list nanoGPT's two."""
    sidecar = path / "meta.json"
    shards = json.loads(sidecar.read_text()).get("shards") if sidecar.is_file() else None
    names = (
        ["train.bin", "val.bin"] if shards is None else [each["name"] for split in shards.values() for each in split]
    )
    files = [path / name for name in names]
    return [int(token) for file in files for token in np.fromfile(file, dtype="<u2")]


def make_llmc(folder: Path) -> Path:
    ids = [token for document in DOCUMENTS for token in document]
    write_llmc(folder / "x_train_000001.bin", ids)
    write_llmc(folder / "x_train_000002.bin", ids[:20])
    write_llmc(folder / "x_val_000000.bin", ids[:30])
    return folder


def read_llmc(path: Path) -> list[int]:
    result = []
    for file in sorted(path.glob("*.bin"), key=lambda file: ("val" in file.name, file.name)):
        content = file.read_bytes()
        magic, version, count = struct.unpack_from("<3i", content)
        dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}.get((magic, version))
        if dtype is None or len(content) != 1024 + count * np.dtype(dtype).itemsize:
            raise UnreadableError
        result += np.frombuffer(content, dtype=dtype, offset=1024).tolist()
    return result


def make_megatron(folder: Path) -> Path:
    write_megatron(folder / "a", [[document[:2], document[2:]] for document in DOCUMENTS], "uint16")
    write_megatron(folder / "b", [[document] for document in DOCUMENTS[:5]], "int32")
    return folder


def read_megatron(path: Path) -> list[int]:
    """As Megatron-LM's ``IndexedDataset`` reads sequence after sequence."""
    result: list[int] = []
    for index in sorted(path.glob("*.idx")):
        content, ids = index.read_bytes(), index.with_suffix(".bin").read_bytes()
        if content[:9] != b"MMIDIDX\0\0" or len(content) < 34:
            raise UnreadableError
        version, code, sequences, bounds = struct.unpack_from("<QBQQ", content, 9)
        if version != 1 or code not in _TYPES or len(content) < 34 + 12 * sequences + 8 * bounds:
            raise UnreadableError
        lengths = np.frombuffer(content, "<i4", sequences, 34)
        places = np.frombuffer(content, "<i8", sequences, 34 + 4 * sequences)
        documents = np.frombuffer(content, "<i8", bounds, 34 + 12 * sequences)
        if not bounds or documents[-1] != sequences:
            raise UnreadableError
        for length, place in zip(lengths.tolist(), places.tolist(), strict=True):
            if length < 0 or place < 0 or place + length * _TYPES[code].itemsize > len(ids):
                raise UnreadableError
            result += np.frombuffer(ids, _TYPES[code], length, place).tolist()
    return result


def make_datatrove(folder: Path) -> Path:
    write_datatrove(folder / "00000.ds", DOCUMENTS[:10])
    write_datatrove(folder / "00001.ds", DOCUMENTS[10:])
    return folder


def read_datatrove(path: Path) -> list[int]:
    result: list[int] = []
    for file in sorted(path.glob("*.ds")):
        metadata, index = (file.with_name(f"{file.name}.{kind}") for kind in ("metadata", "index"))
        size, ends = file.stat().st_size, np.fromfile(index, dtype="<u8") if index.is_file() else None
        if metadata.is_file():
            width = {"2": 2, "4": 4}.get(metadata.read_text().split("\n")[0].rpartition("|")[2])
        else:
            last = None if ends is None else int(ends[-1]) if len(ends) else 0
            width = next((each for each in (2, 4) if last is not None and last * each == size), None)
        if width is None:
            raise UnreadableError
        result += np.fromfile(file, dtype=f"<u{width}").tolist()
    return result


KINDS: tuple[tuple[Callable[[Path], Path], Callable[[Path], list[int]]], ...] = (
    (make_ours, read_ours), (make_sharded, read_ours), (make_llmc, read_llmc), (make_megatron, read_megatron),
    (make_datatrove, read_datatrove),
)  # fmt: skip


# --- damage --------------------------------------------------------------------------------------------------------------


def damage(rng: random.Random, folder: Path) -> None:
    """Change a file of a folder at random, mostly its first bytes."""
    path = rng.choice(sorted(each for each in folder.iterdir() if each.is_file()))
    content = bytearray(path.read_bytes())
    kind = rng.randrange(8)
    if kind == 0:
        content = content[: rng.randrange(len(content) + 1)]
    elif kind == 1:
        content += rng.randbytes(rng.choice((1, 2, 4, 8, 100)))
    elif kind == 2 and content:
        place = rng.randrange(len(content))
        del content[place : place + rng.choice((1, 2, 4, 8))]
    elif kind == 3:
        path.unlink()
        if rng.random() < 0.3:
            rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("nowhere")))()
        return
    elif kind == 4:
        content = bytearray(rng.randbytes(rng.choice((0, 3, 34, 200))))
    elif kind == 5:
        path.with_name(f"{rng.choice(('c', 'valid', 'x'))}{path.suffix}").write_bytes(content)
        return
    else:
        for _ in range(rng.choice((1, 1, 2))):
            width = rng.choice((1, 2, 4, 8))
            place = rng.randrange(min(len(content), rng.choice((40, 80, 1100, 10**6))) or 1)
            value = rng.choice((*EDGES, rng.getrandbits(64))) * rng.choice((1, 1, 1, -1)) % (1 << 8 * width)
            content[place : place + width] = value.to_bytes(width, "little")
    path.write_bytes(content)


def fault(seed: int, number: int, scratch: Path) -> str | None:
    """Run a case; what is wrong with its outcome, or None."""
    rng = random.Random(f"{seed}:{number}")
    make, read = rng.choice(KINDS)
    base = scratch / make.__name__
    if not base.exists():
        base.mkdir()
        make(base)
    folder = scratch / f"case_{number}"
    shutil.copytree(base, folder)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        damage(rng, folder)
    try:
        tokens = open_given(folder, SETTINGS)
        tokens.check_contents()
        found = [*tokens.train.tolist(), *tokens.val.tolist()]
    except InputError as error:
        is_line = 0 < len(str(error)) < 1000 and str(error).isprintable()
        return None if is_line else f"not one line: {str(error)!r}"
    except Exception as error:  # whatever else is raised is the fault that is looked for
        return f"{type(error).__name__}: {error}"
    finally:
        expected = _expected(read, folder)
        shutil.rmtree(folder)
    if expected is None:
        return "read what a plain reader refuses"
    # The order of the files may differ: held-out files come last.
    return (
        None if sorted(found) == sorted(token % (1 << 32) for token in expected) else "other tokens than a plain reader"
    )


def _expected(read: Callable[[Path], list[int]], path: Path) -> list[int] | None:
    for each in path.iterdir():
        if each.is_fifo():  # a plain reader would wait for it
            each.unlink()
    try:
        return read(path)
    except (UnreadableError, OSError, ValueError, struct.error, IndexError):
        return None


def main() -> int:
    """Run the cases; 1 where some have faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this case alone")
    arguments = parser.parse_args()
    numbers = range(arguments.cases) if arguments.only is None else [arguments.only]
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in numbers:
            signal.alarm(60)  # a case that hangs ends the command
            found = fault(arguments.seed, number, Path(scratch))
            if found is not None:
                bad += 1
                print(f"case {number}: {found}", flush=True)
    print(f"{len(numbers)} cases, {bad} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
