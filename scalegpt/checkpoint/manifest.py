"""``checkpoint.json``, a checkpoint's manifest: its tensors, where each piece is stored, and the digest of every file.

A manifest is one JSON object in canonical form (keys sorted, no spaces, ASCII). Its entry ``sha256`` is the digest of all its
other entries. A file in another form, or with another digest, is damaged. ``docs/CHECKPOINTS.md`` describes all entries. A
manifest may come from a stranger, so it can name only files in the checkpoint's directory.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from scalegpt.backends.base import WEIGHT
from scalegpt.config.optimizers import EXP_AVG, EXP_AVG_SQ
from scalegpt.errors import InputError
from scalegpt.text import brief

FORMAT = "scalegpt-checkpoint"

VERSION, VERSION_WITH_OTHER_STATES = 2, 3
"""The versions that are written and read. In version 2 every parameter has exactly the tensors :data:`STATES_OF_VERSION_2`,
which its first readers require. In version 3 a parameter may have other tensors. Nothing else differs."""

STATES_OF_VERSION_2 = frozenset({WEIGHT, EXP_AVG, EXP_AVG_SQ})

MANIFEST = "checkpoint.json"

MANIFEST_LIMIT = 128 << 20
"""The largest manifest that is read, in bytes: about two million pieces, for example 1,200 tensors on 1,700 ranks."""

LARGEST, MOST_DIMENSIONS = 2**63 - 1, 8
"""The largest count of elements or bytes, and the most dimensions of a tensor, that a manifest may state."""

MOST_PROGRESS = 2**53
"""The largest count of steps, sequences or tokens that a manifest may state; sums of such counts still fit 64 bits."""

NAME = re.compile(r"step_([0-9]{8,})")
"""The name of a checkpoint's directory, with its step."""

WEIGHTS, MOMENTS = "weights", "moments"
KINDS = WEIGHTS, MOMENTS
"""The kinds of files, one of each per rank. Inference reads only the weights, a third of all bytes with AdamW."""

_FILE = re.compile(r"rank_[0-9]{5,}\.(weights|moments)(\.[0-9a-f]{16})?\.safetensors")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class DamagedError(InputError):
    """A checkpoint differs from what was written; an earlier checkpoint may be undamaged."""


class MisnamedError(DamagedError):
    """A checkpoint's directory has the name of another step than its manifest."""


class UnreadableError(InputError):
    """A checkpoint cannot be read now, because of permissions or the disk; it may be undamaged."""


@dataclass(frozen=True)
class Progress:
    """The progress of a run: all that a resumed run needs besides the canonical tensors.

    The order of the data follows from the seed and the number of sequences consumed. Dropout's random numbers follow
    from seed, step and rank. No random states need to be stored.

    Attributes:
        tokens: number of tokens trained on up to ``step``.
        val_loss: held-out loss of the last evaluation; None without one, or if it is not finite.
        best_val_loss: lowest held-out loss so far; None without one.
        skipped_steps: number of steps that a guard skipped, which the optimizer does not count.
        good_steps: number of steps since the loss scale last changed; under DeepSpeed, since the last overflow.
        seed: the run's seed.
        sequences: number of windows consumed or skipped so far, which is the position of the next step's first window.
        left_out: number of windows that rollbacks skipped.
        rollbacks: number of rollbacks after a loss spike.
    """

    step: int
    tokens: int
    val_loss: float | None = None
    best_val_loss: float | None = None
    skipped_steps: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    seed: int = 0
    sequences: int = 0
    left_out: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class Header:
    """The entries of a manifest about the run.

    Attributes:
        progress: the run's progress when it was saved.
        config: the run's configuration in the form of a configuration file.
        tokenizer: the tokenizer's description, from its ``as_dict``.
        data: digest of the tokens on which the run was trained; None if it is not known.
        run: id of the run that wrote the checkpoint.
        written_by: backend, ZeRO stage, ranks and versions, for people; the program never reads them.
    """

    progress: Progress
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    data: str | None = None
    run: str = ""
    written_by: dict[str, Any] = field(default_factory=dict)

    @property
    def train(self) -> dict[str, Any]:
        """The training settings in the configuration; empty if the configuration has none."""
        return section if isinstance(section := self.config.get("train"), dict) else {}


@dataclass(frozen=True, order=True)
class Placed:
    """The place of elements ``start`` to ``start + count`` of a flattened tensor: in ``file``, under ``KEY/NAME@start``."""

    start: int
    count: int
    file: str


@dataclass(frozen=True)
class StoredTensor:
    """A canonical tensor's shape, and the places of its pieces, in the order of their starts."""

    shape: tuple[int, ...]
    pieces: tuple[Placed, ...]


@dataclass(frozen=True)
class StoredFile:
    """The size of a file in bytes, and its SHA-256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``checkpoint.json``.

    Attributes:
        tensors: ``KEY/NAME`` → the tensor; KEY is ``weight`` or the name of an optimizer's state, NAME the parameter.
        files: file name → size and digest.
    """

    header: Header
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]

    @property
    def size(self) -> int:
        """Size of all files except the manifest, in bytes."""
        return sum(file.bytes for file in self.files.values())

    def encode(self) -> bytes:
        """The manifest as the bytes of ``checkpoint.json``."""
        document = {
            "format": FORMAT,
            "version": _version(self.tensors),
            **asdict(self.header),
            "tensors": {
                name: {"shape": tensor.shape, "pieces": [[piece.file, piece.start, piece.count] for piece in tensor.pieces]}
                for name, tensor in self.tensors.items()
            },
            "files": {name: asdict(file) for name, file in self.files.items()},
        }  # fmt: skip
        return _canonical({**document, "sha256": _digest(document)})

    def check_coverage(self) -> None:
        """Check that every tensor is covered by its pieces, without gap or overlap.

        Raises:
            DamagedError: a tensor has a gap or an overlap; the message states the tensor and the element.
        """
        for name, tensor in self.tensors.items():
            end = 0
            for piece in tensor.pieces:
                if piece.start != end or piece.count < 1:
                    what = "an overlap at" if piece.start < end else "a gap before"
                    raise DamagedError(f"{name} has {what} element {piece.start}")
                end += piece.count
            if end != math.prod(tensor.shape):
                raise DamagedError(f"{name} ends at element {end} of {math.prod(tensor.shape)}")


def checkpoint_name(step: int) -> str:
    """The name of a step's directory, zero-padded so that names sort by step: ``step_00001000``."""
    return f"step_{step:08d}"


def entry_name(tensor: str, start: int) -> str:
    """The name of a piece inside its file: ``KEY/NAME`` of its tensor, and its first element."""
    return f"{tensor}@{start}"


def file_name(rank: int, kind: str, mark: str = "") -> str:
    """A rank's file of one of :data:`KINDS`: ``rank_00000.weights.safetensors``; with a mark before the last ending."""
    return f"rank_{rank:05d}.{kind}{mark}.safetensors"


def kind_of(file: str) -> str:
    """The kind of a file, from its name; one of :data:`KINDS`."""
    return file.split(".")[1]


def kind_of_key(key: str) -> str:
    """The kind of file, one of :data:`KINDS`, that stores the canonical tensors of a key, for example ``weight``."""
    return WEIGHTS if key == WEIGHT else MOMENTS


def decode(content: bytes) -> Manifest:
    """Parse and check a manifest. The caller puts the manifest's path before the messages of errors.

    Raises:
        DamagedError: the manifest differs from what was written, or has a value that is not allowed.
        InputError: the manifest is undamaged, but of another format or version.
    """
    try:
        document = json.loads(content)
        if not isinstance(document, dict):
            raise DamagedError("it is not a JSON object")
        _check_digest(document, content)
        if document.get("format") != FORMAT or document.get("version") not in (VERSION, VERSION_WITH_OTHER_STATES):
            raise InputError(
                f"has the format {document.get('format')} {document.get('version')}, not {FORMAT} {VERSION} or "
                f"{VERSION_WITH_OTHER_STATES}; use the ScaleGPT that wrote it"
            )
        manifest = _parse(document)
        if document["version"] != _version(manifest.tensors):
            raise DamagedError(f"its version, {document['version']}, does not match its tensors")
        manifest.check_coverage()
        _check_sizes(manifest)
    except InputError as error:
        raise type(error)(brief(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{type(error).__name__}: {brief(error)}") from None
    return manifest


def _check_sizes(manifest: Manifest) -> None:
    """Check that every file is large enough for the fp32 elements that the manifest places in it."""
    elements = dict.fromkeys(manifest.files, 0)
    for tensor in manifest.tensors.values():
        for piece in tensor.pieces:
            elements[piece.file] += piece.count
    for name, file in manifest.files.items():
        if elements[name] * 4 > file.bytes:
            raise DamagedError(f"it places {elements[name]:,} elements in the {file.bytes:,} bytes of {name}")


def _version(tensors: Iterable[str]) -> int:
    """The version of a manifest with these tensors (``KEY/NAME``): 2 if all parameters have AdamW's states, else 3."""
    keys: dict[str, set[str]] = {}
    for name in tensors:
        key, _, parameter = name.partition("/")
        keys.setdefault(parameter, set()).add(key)
    return VERSION if all(each == STATES_OF_VERSION_2 for each in keys.values()) else VERSION_WITH_OTHER_STATES


def _check_digest(document: dict[str, Any], content: bytes) -> None:
    if "sha256" not in document and (document.get("format"), document.get("version")) == (FORMAT, 1):
        raise InputError(
            f"has the version 1, not {VERSION}; use the ScaleGPT that wrote it, or train again with --fresh"
        )
    if document.get("sha256") != _digest({key: value for key, value in document.items() if key != "sha256"}):
        raise DamagedError("its SHA-256 does not match the one stated in it")
    if content != _canonical(document):
        raise DamagedError("it is not in canonical form")


def _parse(document: Mapping[str, Any]) -> Manifest:
    files = {name: _file(name, **entry) for name, entry in document["files"].items()}
    tensors = {name: _tensor(name, entry, files) for name, entry in document["tensors"].items()}
    parts = {key: document[key] for key in ("config", "tokenizer", "data", "run", "written_by")}
    for key in ("config", "tokenizer", "written_by"):
        if not isinstance(parts[key], dict):
            raise TypeError(f"{key} is not an object")
    if not isinstance(parts["data"], str | None) or not isinstance(parts["run"], str):
        raise TypeError("data or run is not a string")
    return Manifest(Header(_progress(document["progress"]), **parts), tensors, files)


def _progress(values: Mapping[str, Any]) -> Progress:
    progress = Progress(**values)
    for each in fields(Progress):
        value = getattr(progress, each.name)
        is_right = _is_count(value) if each.type is int else value is None or _is_number(value)
        is_too_far = each.type is int and each.name != "seed" and is_right and value > MOST_PROGRESS
        if not is_right or is_too_far or (value is None and each.default is not None):
            raise DamagedError(f"its progress has the invalid {each.name} {value!r}")
    if progress.skipped_steps > progress.step or progress.left_out > progress.sequences:
        raise DamagedError("its progress has more skipped steps than steps, or more skipped data than data")
    return progress


def _file(name: str, bytes: int, sha256: str) -> StoredFile:
    if not _FILE.fullmatch(name):
        raise DamagedError(f"it names {name!r}, which is not a file of a checkpoint")
    if not _is_count(bytes) or not _DIGEST.fullmatch(sha256):
        raise DamagedError(f"its entry for {name} is invalid")
    return StoredFile(bytes, sha256)


def _tensor(name: str, entry: Mapping[str, Any], files: Mapping[str, StoredFile]) -> StoredTensor:
    key, _, parameter = name.partition("/")
    if not _KEY.fullmatch(key) or not parameter:
        raise DamagedError(f"it names the invalid tensor {name!r}")
    kind, pieces = kind_of_key(key), []
    for file, start, count in entry["pieces"]:
        if file not in files or kind_of(file) != kind or not _is_count(start) or not _is_count(count):
            raise DamagedError(f"its entry for {name} is invalid: file {file!r}, start {start}, count {count}")
        pieces.append(Placed(start, count, file))
    shape = tuple(entry["shape"])
    if len(shape) > MOST_DIMENSIONS or not all(_is_count(size) for size in shape):
        raise DamagedError(f"it gives {name} the invalid shape {entry['shape']}")
    return StoredTensor(shape, tuple(pieces))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value)


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(document)).hexdigest()


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def tensors_of(manifest: Manifest, key: str) -> Iterator[tuple[str, StoredTensor]]:
    """Yield each parameter's name and its tensor of a key, for example ``weight``, in the order of the manifest."""
    for name, tensor in manifest.tensors.items():
        kind, _, parameter = name.partition("/")
        if kind == key:
            yield parameter, tensor
