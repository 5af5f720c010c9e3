"""``scalegpt checkpoint``: look at a run's checkpoints, and take their weights out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalegpt.cli.output import show, show_json, show_row
from scalegpt.cli.parser import Parser, path_argument
from scalegpt.cli.table import aligned
from scalegpt.errors import InputError, nearest
from scalegpt.units import format_bytes

if TYPE_CHECKING:  # torch takes seconds, which --help need not pay
    from scalegpt.checkpoint.inspection import Verdict

OVERVIEW = """\
scalegpt checkpoint: look at a run's checkpoints, and take their weights out

example:
  scalegpt checkpoint list runs/tiny
  scalegpt checkpoint verify runs/tiny
  scalegpt checkpoint show runs/tiny/checkpoints/step_00001000
  scalegpt checkpoint convert runs/tiny --out tiny.safetensors --dtype bf16

actions (each has --help):
  list      a run's checkpoints: step, size, held-out loss, whole or damaged
  verify    read every byte; name what is damaged (exit status 1)
  show      what a checkpoint says of itself
  convert   the weights as one safetensors file
"""


def main(argv: Sequence[str]) -> int:
    """Run an action; return the exit status.

    Raises:
        InputError: an unknown action or flag, no checkpoint, or one that cannot be used.
    """
    words = list(argv)
    actions = {"list": _list, "verify": _verify, "show": _show, "convert": _convert}
    if not words or words[0] in {"-h", "--help"}:
        print(OVERVIEW, end="")
        return 0 if words else 2
    if words[0] not in actions:
        raise InputError(f"unknown action {words[0]!r}{nearest(words[0], actions)}")
    return actions[words[0]](words[1:])


def _parser(action: str, summary: str, example: str) -> Parser:
    parser = Parser(f"checkpoint {action}", summary, example)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run's folder, or a checkpoint's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _examine(run: Path) -> "list[Verdict]":
    """Look at a run's checkpoints, or at one; those that are deleted meanwhile, as training does, are left out.

    Raises:
        InputError: no checkpoint, or one that was named and is gone.
    """
    from scalegpt.checkpoint.inspection import examine
    from scalegpt.inference.load import checkpoints_of, refuse_deleted

    verdicts: list[Verdict] = []
    while not verdicts:  # all of them were deleted: then there are newer ones
        for path in checkpoints_of(run):
            try:
                verdicts.append(examine(path))
            except OSError:
                if path.is_dir():
                    raise
            if not path.is_dir():
                refuse_deleted(run, path)
        verdicts = [verdict for verdict in verdicts if verdict.path.is_dir()]
    return verdicts


def _list(words: list[str]) -> int:
    parser = _parser(
        "list",
        "List a run's checkpoints, reading all of each.\n"
        "Exit status 0 where some are damaged too: verify tells by its own.",
        "scalegpt checkpoint list runs/tiny",
    )
    arguments = parser.parse(words)
    verdicts = _examine(Path(arguments.run))
    from scalegpt.checkpoint.store import best_checkpoint
    from scalegpt.inference.load import set_aside_in

    best = best_checkpoint([verdict.path for verdict in verdicts if verdict.is_whole])
    aside = [_aside(path) for path in set_aside_in(Path(arguments.run))]
    if arguments.json:
        entries = [{**_entry(verdict), "best": verdict.path == best, "set_aside": False} for verdict in verdicts]
        show_json(entries + [{**_entry(each), "best": False, "set_aside": True} for each in aside])
        return 0
    rows: list[tuple[str, ...]] = [("checkpoint", "step", "size", "held-out loss", "state")]
    rows += [_row(verdict, is_best=verdict.path == best) for verdict in verdicts]
    show(aligned(rows, right={1, 2, 3}))
    for verdict in aside:
        show(*verdict.problems)
    return 0


def _aside(path: Path) -> "Verdict":
    """What is told of a folder that was a checkpoint, and is not looked into."""
    from scalegpt.checkpoint.inspection import Verdict
    from scalegpt.checkpoint.store import REPLACED

    what, way = "set aside as damaged", "delete it when you have looked at it"
    if f".{REPLACED}" in path.name:
        name = path.name.partition(".")[0]
        what, way = "set aside by --resume_step", f"delete it, or rename it to {name} to use it"
    return Verdict(path, None, (f"{what}: {path}; ScaleGPT does not read it: {way}",))


def _row(verdict: "Verdict", *, is_best: bool) -> tuple[str, ...]:
    entry = _entry(verdict)
    step = "-" if entry["step"] is None else f"{entry['step']:,}"
    size = "-" if entry["bytes"] is None else format_bytes(entry["bytes"])
    loss = "-" if entry["val_loss"] is None else f"{entry['val_loss']:.4f}"
    return (
        verdict.path.name,
        step,
        size,
        loss,
        "; ".join(problem.replace(f"{verdict.path}/", "") for problem in verdict.problems)
        or ("whole, the best" if is_best else "whole"),
    )


def _entry(verdict: "Verdict") -> dict[str, Any]:
    manifest = verdict.manifest
    progress = None if manifest is None else manifest.header.progress
    return {
        "checkpoint": str(verdict.path),
        "step": None if progress is None else progress.step,
        "tokens": None if progress is None else progress.tokens,
        "val_loss": None if progress is None else progress.val_loss,
        "bytes": None if manifest is None else manifest.size,
        "files": None if manifest is None else len(manifest.files),
        "whole": verdict.is_whole,
        "problems": list(verdict.problems),
    }


def _verify(words: list[str]) -> int:
    parser = _parser(
        "verify",
        "Read every byte of a checkpoint, or of all of a run's, and compare it with the digests; see that every tensor "
        "is covered.\nExit status 1 where something is damaged or cannot be read; list has 0 even then.",
        "scalegpt checkpoint verify runs/tiny\nscalegpt checkpoint verify runs/tiny/checkpoints/step_00001000",
    )
    arguments = parser.parse(words)
    verdicts = _examine(Path(arguments.run))
    if arguments.json:
        show_json([_entry(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            for problem in verdict.problems:
                show(problem)
            if verdict.manifest is not None and verdict.is_whole:
                manifest = verdict.manifest
                files, size, tensors = len(manifest.files), format_bytes(manifest.size), len(manifest.tensors)
                show(f"{verdict.path} is whole: {files} files, {size}, {tensors} tensors")
    return 0 if all(verdict.is_whole for verdict in verdicts) else 1


def _show(words: list[str]) -> int:
    parser = _parser(
        "show",
        "Show what a checkpoint, or the newest of a run, says of itself; its files are not read.",
        "scalegpt checkpoint show runs/tiny --json",
    )
    arguments = parser.parse(words)
    from scalegpt.checkpoint.inspection import summary
    from scalegpt.checkpoint.reader import read_manifest
    from scalegpt.inference.load import naming_earlier, with_newest

    def read(path: Path) -> dict[str, Any]:
        with naming_earlier(path):
            return summary(path, read_manifest(path))

    facts = with_newest(Path(arguments.run), read)
    if arguments.json:
        show_json(facts)
        return 0
    model = facts["config"].get("model")
    rows = {
        "checkpoint": facts["checkpoint"],
        "run": facts["run"],
        "written by": _words(facts["written_by"]),
        "model": f"{facts['parameters']:,} parameters: {_words(model if isinstance(model, dict) else {})}",
        **{key.replace("_", " "): value for key, value in facts["progress"].items() if value is not None},
        "tokenizer": facts["tokenizer"],
        "data": facts["data"],
        "size": f"{format_bytes(facts['bytes'])} in {len(facts['files'])} files, {facts['pieces']:,} pieces",
    }
    for name, value in rows.items():
        show_row(f"{name:<15}", f"{value:,}" if isinstance(value, int) else value)
    return 0


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


OTHER_FORMATS = {
    ".gguf": "llama.cpp's GGUF",
    ".ggml": "llama.cpp's GGML",
    ".bin": "a pickle of PyTorch's",
    ".pt": "a pickle of PyTorch's",
    ".pth": "a pickle of PyTorch's",
    ".ckpt": "a pickle of PyTorch's",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".onnx": "ONNX",
    ".tflite": "TensorFlow Lite",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".keras": "Keras",
    ".npz": "NumPy's archive",
    ".npy": "a NumPy array",
    ".msgpack": "Flax's msgpack",
    ".mlmodel": "Core ML",
    ".zip": "a ZIP archive",
    ".json": "JSON",
}
"""Endings of names by which other programs know a format, and the format."""


def _check_ending(out: Path) -> None:
    """Refuse a name that promises another format than the one that is written.

    Raises:
        InputError: names what is written.
    """
    promised = OTHER_FORMATS.get(out.suffix.lower())
    if promised is not None:
        raise InputError(
            f"out {out}: {out.suffix} means {promised}, and convert writes safetensors; use "
            f"--out {out.with_suffix('.safetensors')}, which converters for other formats read"
        )


def _convert(words: list[str]) -> int:
    parser = _parser(
        "convert",
        "Write the weights of a checkpoint, or of a run's newest, as one safetensors file under their clean names.",
        "scalegpt checkpoint convert runs/tiny --out tiny.safetensors\n"
        "scalegpt checkpoint convert runs/tiny --out tiny.safetensors --dtype bf16",
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="the file to make")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="of the weights [fp32]")
    arguments = parser.parse(words)
    _check_ending(Path(arguments.out))
    from scalegpt.checkpoint.inspection import convert
    from scalegpt.inference.load import open_weights, with_newest

    path, written = with_newest(
        Path(arguments.run), lambda path: (path, convert(open_weights(path), Path(arguments.out), arguments.dtype))
    )
    facts = {
        "checkpoint": str(path),
        "out": arguments.out,
        "dtype": arguments.dtype,
        "bytes": written.bytes,
        "sha256": written.sha256,
    }
    if arguments.json:
        show_json(facts)
    else:
        show(f"{arguments.out}: {arguments.dtype} weights of {path}, {format_bytes(written.bytes)}")
    return 0
