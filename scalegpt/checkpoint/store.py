"""Where checkpoints lie, how they are written, and how they are found again.

A checkpoint is a directory ``checkpoints/step_00001000`` of three files, none of them a pickle::

    checkpoint.json           step, losses, loss scale, tokenizer, data, configuration, SHA-256 of the other files
    weights.safetensors       fp32 master weights by parameter name
    optimizer.safetensors     "exp_avg/NAME" and "exp_avg_sq/NAME", fp32

It is written under a temporary name, synced to disk and renamed, and goes by a temporary name again before it is deleted,
so that a directory with this name is complete. Which is the newest follows from the names alone.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scalegpt.backends.base import MOMENTS, ParameterState
from scalegpt.data.writer import sync
from scalegpt.errors import InputError, RunError

FORMAT = "scalegpt-checkpoint"
VERSION = 1
HEADER, WEIGHTS, OPTIMIZER = "checkpoint.json", "weights.safetensors", "optimizer.safetensors"

_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Progress:
    """How far a run is: everything besides weights and moments that a resumed run needs.

    The random numbers of dropout follow from seed and step, and the order of the data from the seed.

    Attributes:
        val_loss: of the last evaluation.
        skipped_steps: those that a guard kept from counting in the optimizer.
        sequences: the place in the data's order where the next step begins, in windows: those consumed and those left out.
            None, in checkpoints of older versions: as many as the tokens make.
        left_out: windows of the data that rollbacks left out.
        rollbacks: how often the run went back behind a loss spike.
    """

    step: int
    tokens: int
    val_loss: float | None = None
    best_val_loss: float | None = None
    skipped_steps: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    sequences: int | None = None
    left_out: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class Header:
    """What ``checkpoint.json`` holds.

    Attributes:
        progress: how far the run was.
        config: the run's configuration in the form of a configuration file.
        tokenizer: the tokenizer, as its ``as_dict`` gives it.
        data: SHA-256 of the tokens it was trained on.
        files: file name → SHA-256.
    """

    progress: Progress
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    data: str | None = None
    files: dict[str, str] = field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    """The directory's name: zero-padded, so that names sort by step."""
    return f"step_{step:08d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / HEADER).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def save(folder: Path, header: Header, states: Iterable[ParameterState]) -> Path:
    """Write a checkpoint; only the first rank calls this.

    Args:
        folder: the run's ``checkpoints`` directory.
        header: what to write beside the tensors; its ``files`` are filled in here.
        states: every parameter's canonical state.

    Returns:
        The new directory; an existing one of that step is left as it is.

    Raises:
        RunError: the disk is full or the folder cannot be written; nothing is left of the attempt.
    """
    final = folder / checkpoint_name(header.progress.step)
    if final.exists():
        return final
    temporary = _temporary(final)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # in a container every process may have the same number
        temporary.mkdir(parents=True)
        digests = _write_tensors(temporary, states)
        document = {"format": FORMAT, "version": VERSION, **asdict(header), "files": digests}
        _write_synced(temporary / HEADER, json.dumps(document, indent=1).encode())
        sync(temporary)
        temporary.rename(final)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"checkpoint {final} cannot be written: {reason}{_free_space(folder)}; earlier checkpoints are whole: "
            "make room, or the folder writable, and run the same command again"
        ) from error
    return final


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints, and what interrupted writes left behind."""
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)
    for path in find_checkpoints(folder)[:-keep]:
        doomed = path.rename(_temporary(path))  # half deleted, it must not pass for a checkpoint
        shutil.rmtree(doomed)


def forget_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, the newest first: a run that goes back takes these steps again."""
    for path in reversed(find_checkpoints(folder)):
        if int(path.name.removeprefix("step_")) > step:
            doomed = path.rename(_temporary(path))
            shutil.rmtree(doomed)
    if folder.is_dir():
        sync(folder)


def read_header(checkpoint: Path, *, files: Iterable[str] = (WEIGHTS, OPTIMIZER)) -> Header:
    """The header of a checkpoint, after checking that the files about to be read are whole.

    Args:
        checkpoint: its directory.
        files: those to check. A large model's moments take minutes to read, and only training needs them.

    Raises:
        InputError: not a checkpoint, of an unknown version, or with a file missing or changed.
    """
    path = checkpoint / HEADER
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise InputError(f"{path}: format {document['format']} {document['version']}; known is {FORMAT} {VERSION}")
        parts = document["config"], document["tokenizer"], document.get("data"), document["files"]
        header = Header(Progress(**document["progress"]), *parts)
        digests = {name: header.files[name] for name in files}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; is {checkpoint} a checkpoint?") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error}); delete {checkpoint} to fall back to an earlier one") from None
    for name, digest in digests.items():
        _check(checkpoint / name, digest)
    return header


def _check(file: Path, digest: str) -> None:
    """Refuse a file that is not what was written.

    Raises:
        InputError: it is missing, cannot be read, or has changed.
    """
    remedy = f"delete {file.parent} to fall back to an earlier checkpoint"
    try:
        if _digest(file) != digest:
            raise InputError(f"{file} is damaged: its SHA-256 is not the one in {HEADER}; {remedy}")
    except FileNotFoundError:
        raise InputError(f"{file} is missing; {remedy}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; mend that, or {remedy}") from None


def read_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The fp32 weights by name, one at a time."""
    with safe_open(checkpoint / WEIGHTS, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - safetensors' file is no mapping
            yield name, file.get_tensor(name)


def read_states(checkpoint: Path) -> Iterator[ParameterState]:
    """Weights and moments, one parameter at a time."""
    with safe_open(checkpoint / OPTIMIZER, framework="pt", device="cpu") as moments:
        stored = set(moments.keys())
        for name, weight in read_weights(checkpoint):
            keys = {key: f"{key}/{name}" for key in MOMENTS}
            yield ParameterState(
                name, weight, {key: moments.get_tensor(entry) for key, entry in keys.items() if entry in stored}
            )


def _write_tensors(folder: Path, states: Iterable[ParameterState]) -> dict[str, str]:
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for state in states:
        weights[state.name] = state.weight.contiguous()
        moments |= {f"{key}/{state.name}": value.contiguous() for key, value in state.moments.items()}
    digests = {}
    for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments)):
        save_file(tensors, folder / name)
        sync(folder / name)
        digests[name] = _digest(folder / name)
    return digests


def _temporary(final: Path) -> Path:
    """The name under which this process writes or deletes a checkpoint; :func:`prune` finds it by its ending."""
    return final.with_name(f".{final.name}.{os.getpid()}.tmp")


def _free_space(folder: Path) -> str:
    place = next((place for place in (folder, *folder.parents) if place.is_dir()), None)
    return f" ({shutil.disk_usage(place).free / 1e9:.1f} GB free)" if place else ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
